import dataclasses

import pytest
import tiny_llama
import torch

from fedmini.config import BaseSection
from fedmini.errors import ConfigError
from fedmini.model.generation import Sampling
from fedmini.model.loading import load_base
from fedmini.model.lora import LoraModel

CONVERSATION = [{"role": "user", "content": "abc"}]


def model(base=None):
    return tiny_llama.with_random_adapter(LoraModel(base or tiny_llama.base(), tiny_llama.SHAPE))


def test_a_greedy_reply_is_what_transformers_generates():
    lora_model = model()
    tokenizer = lora_model.base.tokenizer
    prompt = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    generated = lora_model.module.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, use_cache=True
    )
    expected = tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)

    pieces = list(lora_model.reply(CONVERSATION, Sampling(max_new_tokens=20)))

    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_a_seeded_reply_repeats_and_another_seed_differs():
    lora_model = model()
    replies = [
        "".join(lora_model.reply(CONVERSATION, Sampling(max_new_tokens=20, temperature=2.0, seed=seed)))
        for seed in (1, 1, 2)
    ]

    assert replies[0] == replies[1] != replies[2]


def test_a_tiny_top_p_leaves_only_the_likeliest_token():
    lora_model = model()

    sampled = list(lora_model.reply(CONVERSATION, Sampling(20, temperature=1.0, top_p=1e-6, seed=0)))

    assert sampled == list(lora_model.reply(CONVERSATION, Sampling(20)))


def test_the_reply_ends_where_the_model_ends_its_turn():
    base = tiny_llama.base()
    base.module.generation_config.eos_token_id = list(range(64))

    assert list(model(base).reply(CONVERSATION)) == []


def test_holding_the_weights_dense_changes_nothing_and_is_let_go(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    base = load_base(BaseSection(path=path, compute_dtype="float32", accelerator="cpu"), tmp_path / "cache", print)
    lora_model = model(base)
    expected = list(lora_model.reply(CONVERSATION, Sampling(12)))

    assert list(lora_model.reply(CONVERSATION, Sampling(12, hold_dense=True))) == expected
    assert all(getattr(module, "_held", None) is None for module in lora_model.module.modules())


def test_a_conversation_that_does_not_fit_is_refused_without_its_text():
    with pytest.raises(ConfigError, match="this base holds 128") as caught:
        model().reply([{"role": "user", "content": "secret " * 40}])

    assert "secret" not in str(caught.value)


def test_a_base_without_a_chat_template_is_refused():
    base = tiny_llama.base()
    base.tokenizer.chat_template = None

    with pytest.raises(ConfigError, match="no chat template"):
        model(dataclasses.replace(base)).reply(CONVERSATION)


def test_a_checkpointed_model_replies_too():
    lora_model = tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), tiny_llama.SHAPE, checkpointing=True))

    assert list(lora_model.reply(CONVERSATION, Sampling(8))) == list(model().reply(CONVERSATION, Sampling(8)))
