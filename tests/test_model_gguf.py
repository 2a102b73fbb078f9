import gguf
import numpy as np
import pytest
import tiny_llama
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedmini.config import BaseSection
from fedmini.errors import ConfigError
from fedmini.model.gguf_file import GgufFile
from fedmini.model.loading import load_base


def load(path, cache_dir, **options):
    return load_base(BaseSection(path=path, compute_dtype="float32", accelerator="cpu", **options), cache_dir, print)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", ["Q4_1", "Q4_0", "Q8_0", "F16", "F32"])
def test_a_gguf_gives_the_logits_of_transformers_own_dequantised_model(tmp_path, quantization, tied):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf", quantization, tied=tied)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.tensor([[5, 9, 40, 12, 3, 3]])

    ours = load(path, tmp_path / "cache")

    assert ours.weights == "packed"
    with torch.no_grad():
        torch.testing.assert_close(ours.module(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    for name, expected in theirs.state_dict().items():
        if "layers.0" in name or "embed" in name:
            layer = ours.module.get_submodule(name.removesuffix(".weight"))
            weight = layer.packed.dense(torch.float32) if hasattr(layer, "packed") and "embed" in name else layer.weight
            assert torch.equal(weight, expected), name


def test_the_configuration_is_the_one_transformers_reads(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)

    ours = load(path, tmp_path / "cache").module.config

    for key in GgufFile(path).config:
        if key != "rope_theta":
            assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_the_cached_tokenizer_encodes_as_the_ggufs_own(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    conversation = [{"role": "user", "content": "abc DEF.\nxyz"}]

    load(path, tmp_path / "cache")
    ours = load(path, tmp_path / "cache").tokenizer

    text = "abc <|im_end|> a, b!"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.apply_chat_template(conversation, tokenize=False) == theirs.apply_chat_template(
        conversation, tokenize=False
    )
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_a_format_that_is_not_read_is_refused_with_those_that_are(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf", "Q5_1")

    with pytest.raises(ConfigError, match=r"is Q5_1; these are readable: Q4_0, Q4_1, Q8_0, F16, F32"):
        load(path, tmp_path / "cache")


def test_quantised_norms_are_refused(tmp_path, monkeypatch):
    as_it_is = gguf.GGUFWriter.add_tensor

    def quantised(writer, name, values, raw_dtype=None):
        if values.ndim == 1:
            values, raw_dtype = (
                gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0),
                gguf.GGMLQuantizationType.Q8_0,
            )
        as_it_is(writer, name, values, raw_dtype=raw_dtype)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantised)
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")

    with pytest.raises(ConfigError, match="is a norm in Q8_0; only F32 and F16 norms are read"):
        load(path, tmp_path / "cache")


def test_another_architecture_is_refused(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf", architecture="qwen2")

    with pytest.raises(ConfigError, match="only 'llama' is read"):
        load(path, tmp_path / "cache")


def test_scaled_rope_is_refused_instead_of_ignored(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf", rope_scaling=True)

    with pytest.raises(ConfigError, match="rope scaling"):
        load(path, tmp_path / "cache")


@pytest.mark.parametrize("keep", [0, 10, 3000, -5000])
def test_a_truncated_file_is_refused_and_leaves_no_cache(tmp_path, keep):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(ConfigError, match="truncated"):
        load(path, tmp_path / "cache")

    assert list((tmp_path / "cache" / "bases").iterdir()) == []


def test_rows_of_q_and_k_come_in_transformers_order(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf", "F32")
    expected = tiny_llama.llama().state_dict()

    got = {tensor.name: tensor.data for tensor in GgufFile(path).tensors()}

    for projection in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{projection}.weight"
        np.testing.assert_array_equal(got[name], expected[name].numpy())
