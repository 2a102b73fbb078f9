import dataclasses
import re

import numpy as np
import pytest
import tiny_llama
import torch

from fedmini.errors import ConfigError, ModelMismatchError
from fedmini.model import frozen_draw
from fedmini.model.lora import LoraModel
from fedmini.types import LoraShape

SHAPE = tiny_llama.SHAPE
GOLDEN_A = [
    [0.09191888570785522, -0.07311278581619263, 0.14320480823516846, -0.45362329483032227],
    [0.1335882544517517, 0.3969470262527466, 0.11291384696960449, -0.3562108278274536],
]
NAME_OF_A = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"


def test_the_template_names_the_trained_tensors_as_peft_does_sorted():
    model = LoraModel(tiny_llama.base(), SHAPE)

    assert model.template == (
        ("base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight", (32, 2)),
        ("base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight", (16, 2)),
        ("base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight", (32, 2)),
        ("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight", (16, 2)),
    )
    assert model.num_parameters == 2 * (32 + 32 + 16 + 16)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [shape for _, shape in model.template]


def test_training_a_as_well_adds_it_to_the_template():
    model = LoraModel(tiny_llama.base(), dataclasses.replace(SHAPE, trained="AB"))

    assert (NAME_OF_A, (2, 32)) in model.template
    np.testing.assert_array_equal(
        model.initial_adapter()[NAME_OF_A], frozen_draw.kaiming_uniform(0, NAME_OF_A, (2, 32))
    )


def test_a_new_model_answers_as_its_base_and_leaves_it_unchanged():
    base = tiny_llama.base()
    tokens = torch.tensor([[3, 4, 5]])
    before = base.module(tokens).logits

    model = LoraModel(base, SHAPE)
    changed = tiny_llama.with_random_adapter(LoraModel(base, SHAPE))

    assert torch.equal(model.module(tokens).logits, before)
    assert torch.equal(base.module(tokens).logits, before)
    assert not torch.allclose(changed.module(tokens).logits, before)


def test_building_a_model_draws_nothing_from_torchs_generator():
    base = tiny_llama.base()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    LoraModel(base, SHAPE)

    assert torch.equal(torch.rand(3), expected)


def test_the_frozen_a_never_changes_between_versions():
    drawn = frozen_draw.kaiming_uniform(0, NAME_OF_A, (2, 4))

    assert drawn.tolist() == GOLDEN_A
    assert np.abs(frozen_draw.kaiming_uniform(1, NAME_OF_A, (8, 64))).max() <= 1 / 8
    assert abs(frozen_draw.kaiming_uniform(1, NAME_OF_A, (64, 64)).std() * 8 - 1 / np.sqrt(3)) < 0.02


def test_seed_and_name_each_change_the_frozen_a():
    first = frozen_draw.kaiming_uniform(0, "a", (2, 4))

    assert not np.array_equal(first, frozen_draw.kaiming_uniform(1, "a", (2, 4)))
    assert not np.array_equal(first, frozen_draw.kaiming_uniform(0, "b", (2, 4)))


def test_flat_and_adapter_are_two_views_of_the_same_numbers():
    model = LoraModel(tiny_llama.base(), SHAPE)
    vector = np.arange(model.num_parameters, dtype=np.float32)

    model.set_flat(vector)

    np.testing.assert_array_equal(model.flat(), vector)
    first_name, first_shape = model.template[0]
    np.testing.assert_array_equal(model.adapter()[first_name], np.arange(64, dtype=np.float32).reshape(first_shape))
    model.set_adapter(model.initial_adapter())
    assert not model.flat().any()


def test_an_adapter_is_a_copy():
    model = LoraModel(tiny_llama.base(), SHAPE)
    model.adapter()[model.template[0][0]][:] = 1

    assert not model.flat().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adapter: adapter.pop(min(adapter)), "is missing"),
        (lambda adapter: adapter.update(other=np.zeros(1, np.float32)), "is not part of"),
        (lambda adapter: adapter.update({min(adapter): np.zeros((1, 2), np.float32)}), "has shape"),
        (lambda adapter: adapter[min(adapter)].fill(np.nan), "not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_whole(change, message):
    model = LoraModel(tiny_llama.base(), SHAPE)
    adapter = {name: values + 1 for name, values in model.adapter().items()}
    change(adapter)

    with pytest.raises(ModelMismatchError, match=message):
        model.set_adapter(adapter)

    assert not model.flat().any()


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ModelMismatchError, match="expected shape"):
        LoraModel(tiny_llama.base(), SHAPE).set_flat(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("v_porj",)}, "unknown module 'v_porj'; this base has down_proj, gate_proj, k_proj"),
        ({"target_modules": ("embed_tokens",)}, "embed_tokens is an embedding or the head"),
        ({"target_modules": ("lm_head",)}, "lm_head is an embedding or the head"),
        ({"target_modules": ("self_attn",)}, "unknown module"),
        ({"target_modules": ()}, "no layer would be adapted"),
        ({"layers": (0, 2)}, "2 is out of range; this base has layers 0 to 1"),
        ({"layers": ()}, "no layer would be adapted"),
    ],
)
def test_a_shape_that_would_be_silently_wrong_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoraModel(tiny_llama.base(), dataclasses.replace(SHAPE, **changes))


def test_a_module_that_shares_its_weight_is_refused():
    base = tiny_llama.base()
    first, second = base.module.model.layers
    second.self_attn.v_proj.weight = first.self_attn.v_proj.weight

    with pytest.raises(ConfigError, match="shares its weight"):
        LoraModel(base, SHAPE)


def test_a_base_that_changes_its_logits_after_the_head_is_refused():
    base = tiny_llama.base()
    base.module.lm_head = torch.nn.Linear(32, 64, bias=True)
    base.module.lm_head.bias.data.fill_(0.0)
    base.module.lm_head.bias.data[3] = 5.0

    with pytest.raises(ConfigError, match="changes its logits after the head"):
        LoraModel(base, SHAPE)


def test_evaluation_sums_the_nats_of_every_target():
    model = tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), SHAPE))
    examples = tiny_llama.examples((5, 30, 8, 8, 17))
    expected = 0.0
    for example in examples:
        tokens = torch.from_numpy(example.tokens).long()
        scores = model.module(tokens[None]).logits[0, :-1].log_softmax(-1)
        wanted = torch.from_numpy(example.is_target)[1:]
        expected -= float(scores.detach()[torch.arange(len(tokens) - 1), tokens[1:]][wanted].sum())

    total, num_targets = model.evaluate(examples, batch_size=2)

    assert total == pytest.approx(expected, rel=1e-5)
    assert num_targets == sum(int(example.is_target.sum()) for example in examples)
    assert model.evaluate([], batch_size=2) == (0.0, 0)


def test_the_fingerprint_changes_with_weights_tokenizer_template_and_frozen_a_only():
    base = tiny_llama.base()
    first = LoraModel(base, SHAPE).fingerprint
    other_template = tiny_llama.base()
    other_template.tokenizer.chat_template += " "
    used = tiny_llama.base()
    used.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)

    assert re.fullmatch("[0-9a-f]{64}", first)
    assert LoraModel(used, SHAPE).fingerprint == first
    assert tiny_llama.with_random_adapter(LoraModel(base, SHAPE)).fingerprint == first
    assert LoraModel(dataclasses.replace(base, weights_digest="1" * 64), SHAPE).fingerprint != first
    assert LoraModel(other_template, SHAPE).fingerprint != first
    assert LoraModel(base, dataclasses.replace(SHAPE, seed=1)).fingerprint != first
    assert LoraModel(base, LoraShape(2, 4.0, ("v_proj",), None, "B", 0)).fingerprint != first
