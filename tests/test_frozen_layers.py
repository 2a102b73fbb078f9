"""What layers below the adapted ones say of an example is computed once, and changes nothing but the time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini import simulation
from fedmini.model.frozen_layers import FrozenLayers, StatesInMemory
from fedmini.model.lora import LoraModel
from fedmini.simulation import devices
from fedmini.types import EncodedExample, LoraShape
from tests import tiny_architectures, tiny_llama, tiny_run

TOP = (1,)  # of two layers


class Counted(StatesInMemory):
    """How often something was computed, as it is then kept."""

    num_kept = 0

    def keep(self, name: bytes, content: bytes) -> None:
        self.num_kept += 1
        super().keep(name, content)


class ByOrder(Counted):
    """The defence removed: states by the order in which they came, whatever they are about."""

    num_read = 0

    def read(self, name: bytes) -> bytes | None:
        self.num_read += 1
        held = list(self._held.values())
        return held[(self.num_read - 1) % len(held)] if held else None


def pair(family: str = "llama", layers: tuple[int, ...] | None = TOP, trained: str = "AB", **how):
    """Two models with the same adapter: one that computes all layers anew, and one that is to keep states."""
    targets = tiny_architectures.FAMILIES[family].targets
    shape = LoraShape(2, 4.0, targets, layers, trained, 0)
    plain, keeping = (LoraModel(tiny_architectures.base(family), shape, **how) for _ in range(2))
    tiny_llama.with_random_adapter(plain)
    keeping.set_adapter(plain.adapter())
    return plain, keeping


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", tiny_architectures.FAMILIES)
def test_gradients_and_losses_are_those_of_all_layers_in_each_family_of_models(family: str, checkpointing: bool):
    plain, keeping = pair(family, checkpointing=checkpointing)
    kept = Counted(10**6)
    assert keeping.keep_states(kept).num_layers == 1
    computed = kept.num_kept
    examples = tiny_llama.examples((5, 9, 30, 17))

    expected = plain.example_gradients(examples)
    for _ in range(2):
        found = keeping.example_gradients(examples)
        assert_same(found.gradients, expected.gradients)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)
    assert kept.num_kept - computed == len(examples), "each was computed once"
    np.testing.assert_allclose(keeping.mean_losses(examples, 3), plain.mean_losses(examples, 3), rtol=1e-6)
    assert keeping.evaluate(examples, 3)[0] == pytest.approx(plain.evaluate(examples, 3)[0], rel=1e-6)
    assert_same(keeping.mean_gradient(examples)[0], plain.mean_gradient(examples)[0])


MODELS = pair()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    seed=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
)
def test_whatever_is_drawn_in_whatever_order_each_gradient_is_its_own_examples(lengths, seed, order):
    plain, keeping = MODELS
    keeping.keep_states(StatesInMemory(10**6))
    examples = tiny_llama.examples(tuple(lengths), seed)
    for _ in range(3):
        drawn = [order.choice(examples) for _ in range(order.randint(1, 5))]
        assert_same(keeping.example_gradients(drawn).gradients, plain.example_gradients(drawn).gradients)


def test_that_property_fails_where_states_are_kept_by_order_and_not_by_content():
    plain, keeping = pair()
    keeping.keep_states(ByOrder(10**6))
    examples = tiny_llama.examples((9, 9, 9))
    with pytest.raises(AssertionError):
        for drawn in (examples, examples[::-1]):
            assert_same(keeping.example_gradients(drawn).gradients, plain.example_gradients(drawn).gradients)


def test_one_example_at_a_time_gives_the_same_bits_however_often():
    plain, keeping = pair()
    keeping.keep_states(StatesInMemory(10**6))
    for example in 2 * tiny_llama.examples((5, 9, 30, 17)):
        expected = plain.example_gradients([example]).gradients
        assert torch.equal(keeping.example_gradients([example]).gradients, expected)


def test_what_is_kept_of_an_example_does_not_depend_on_who_else_was_drawn():
    _, alone = pair()
    _, among = pair()
    kept_alone, kept_among = StatesInMemory(10**6), StatesInMemory(10**6)
    examples = tiny_llama.examples((5, 9, 30, 17))
    alone.keep_states(kept_alone)
    alone.example_gradients(examples[1:2])
    among.keep_states(kept_among)
    among.example_gradients(examples)
    assert kept_alone._held.items() <= kept_among._held.items()


def test_a_detached_prefix_is_as_before():
    prefix = [3, 4, 5, 6, 7]
    plain, keeping = pair(detached_prefix=prefix)
    keeping.keep_states(StatesInMemory(10**6))
    examples = tiny_llama.examples((12, 20))
    for example in examples[:1]:
        example.tokens[:5], example.is_target[:6] = prefix, False
    for _ in range(2):
        assert_same(keeping.example_gradients(examples).gradients, plain.example_gradients(examples).gradients)


def test_with_a_trained_layer_at_the_bottom_nothing_is_kept():
    for layers in (None, (0,), (0, 1)):
        plain, keeping = pair(layers=layers)
        kept = Counted(10**6)
        assert keeping.keep_states(kept).num_layers == 0
        examples = tiny_llama.examples((5, 9))
        assert torch.equal(keeping.example_gradients(examples).gradients, plain.example_gradients(examples).gradients)
        assert kept.num_kept == 0


def test_a_new_adapter_changes_nothing_of_what_is_kept():
    plain, keeping = pair()
    kept = Counted(10**6)
    keeping.keep_states(kept)
    examples = tiny_llama.examples((5, 9))
    keeping.example_gradients(examples)
    computed = kept.num_kept
    for model in (plain, keeping):
        model.set_flat(np.full(model.num_parameters, 0.03, np.float32))
    assert_same(keeping.example_gradients(examples).gradients, plain.example_gradients(examples).gradients)
    assert kept.num_kept == computed


def test_another_base_and_another_lowest_layer_have_states_of_their_own():
    shape = LoraShape(2, 4.0, ("v_proj",), TOP, "B", 0)
    examples = tiny_llama.examples((5,))
    names = set()
    for base in (tiny_llama.base(), replace(tiny_llama.base(), weights_digest="1" * 64)):
        kept = StatesInMemory(10**6)
        model = LoraModel(base, shape)
        model.keep_states(kept)
        model.example_gradients(examples)
        names |= set(kept._held)
    assert len(names) == 2


def test_where_the_room_ends_no_more_is_kept_and_the_result_is_the_same():
    plain, keeping = pair()
    kept = StatesInMemory(32 * 4 * 20)  # 20 tokens of hidden size 32 in float32
    keeping.keep_states(kept)
    examples = tiny_llama.examples((9, 30, 8))  # of which the last token is never read
    for _ in range(2):
        assert_same(keeping.example_gradients(examples).gradients, plain.example_gradients(examples).gradients)
    assert sorted(len(one) for one in kept._held.values()) == [32 * 4 * 7, 32 * 4 * 8]


def test_only_the_examples_that_are_still_there_stay():
    _, keeping = pair()
    kept = Counted(10**6)
    frozen = keeping.keep_states(kept)
    examples = tiny_llama.examples((5, 9, 30))
    keeping.example_gradients(examples)
    frozen.keep_only(examples[1:])
    assert len(kept._held) == 2
    computed = kept.num_kept
    keeping.example_gradients(examples[1:])
    assert kept.num_kept == computed
    frozen.keep_only([])
    assert kept._held == {}


def test_a_model_whose_upper_layers_look_at_more_than_the_layer_below_keeps_nothing():
    _, keeping = pair()
    lower, upper = keeping._causal.base_model.layers
    heard = []
    lower.self_attn.register_forward_hook(lambda layer, inputs, output: heard.append(output[0]))
    original = upper.forward

    def looks_further(hidden, *inputs, **named):  # at the attention of the lowest layer, as some models do
        return original(hidden, *inputs, **named) + (heard.pop() if heard else 0.0)

    upper.forward = looks_further
    assert FrozenLayers(keeping._causal, keeping.base, StatesInMemory(10**6)).num_layers == 0


class Failing(StatesInMemory):
    """Once it is told to, it fails."""

    is_failing = False

    def keep(self, name: bytes, content: bytes) -> None:
        if self.is_failing:
            raise OSError("no")


def test_layers_are_whole_again_after_an_error():
    plain, keeping = pair()
    kept = Failing(10**6)
    keeping.keep_states(kept)
    kept.is_failing = True
    examples = tiny_llama.examples((5, 9))
    with pytest.raises(OSError, match="no"):
        keeping.example_gradients(examples)
    kept.is_failing = False
    assert_same(keeping.example_gradients(examples).gradients, plain.example_gradients(examples).gradients)
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(keeping.module(tokens).logits, plain.module(tokens).logits)


@pytest.mark.parametrize("devices_per_batch", [1, 3])
def test_a_simulation_that_keeps_states_learns_what_one_without_learns(tmp_path: Path, devices_per_batch: int):
    adapters = []
    for max_hidden_bytes in (10**7, 0):
        simulated = {"num_threads": 1, "workers": 1, "devices_per_batch": devices_per_batch}
        simulated["max_hidden_bytes"] = max_hidden_bytes
        changes = {"lora": {"layers": TOP}, "simulation": simulated}
        config = tiny_run.config(tmp_path, "none", changes)
        model, _ = devices.load_model(config, tmp_path / "cache", lambda note: None)
        assert (model._frozen is not None and model._frozen.num_layers == 1) is (max_hidden_bytes > 0)
        result = simulation.simulate(config, data=tiny_run.rows(), output=tmp_path / f"{max_hidden_bytes}")
        adapters.append(np.concatenate([values.ravel() for _, values in sorted(result.adapter.items())]))
    assert np.linalg.norm(adapters[0]) > 0
    np.testing.assert_allclose(adapters[1], adapters[0], atol=1e-5 * np.abs(adapters[0]).max())


def test_an_example_is_never_in_a_name() -> None:
    _, keeping = pair()
    kept = StatesInMemory(10**6)
    keeping.keep_states(kept)
    example = EncodedExample(np.full(9, 7, np.int32), np.array([False] * 8 + [True]))
    keeping.example_gradients([example])
    (name,) = kept._held
    assert len(name) == 32 and np.full(4, 7, np.int32).tobytes() not in name
