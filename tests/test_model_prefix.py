"""A beginning that a batch's examples share is read once; losses stay what they were, gradients hold it constant."""

import numpy as np
import pytest
import torch

from fedmini.errors import ConfigError
from fedmini.model import loss, prefix
from fedmini.model.lora import LoraModel
from fedmini.types import EncodedExample
from tests import tiny_llama

BEGINNING = np.array([3, 4, 5, 6, 7, 8], np.int32)


def with_beginning(examples: list[EncodedExample]) -> list[EncodedExample]:
    return [
        EncodedExample(
            np.concatenate([BEGINNING, example.tokens]), np.concatenate([np.zeros(6, np.bool_), example.is_target])
        )
        for example in examples
    ]


EXAMPLES = with_beginning(tiny_llama.examples((5, 9, 7, 12)))


def a_model(detach: bool) -> LoraModel:
    prefix_tokens = tuple(BEGINNING.tolist()) if detach else ()
    return tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), tiny_llama.SHAPE, detached_prefix=prefix_tokens))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_losses_are_those_of_reading_everything(name: str) -> None:
    whole, detached = a_model(False), a_model(True)
    for model in (whole, detached):
        model._causal.set_attn_implementation(name)
    assert detached.example_gradients(EXAMPLES).losses == pytest.approx(
        whole.example_gradients(EXAMPLES).losses, rel=1e-5
    )


def test_evaluation_with_a_shared_beginning_is_the_sum_over_single_examples() -> None:
    model = a_model(False)
    together = model.evaluate(EXAMPLES, batch_size=4)
    alone = [model.evaluate([example], batch_size=1) for example in EXAMPLES]
    assert together[0] == pytest.approx(sum(nats for nats, _ in alone), rel=1e-5)
    assert together[1] == sum(count for _, count in alone)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_gradient_is_that_of_a_model_to_which_the_beginning_is_constant(name: str) -> None:
    """Reference: autograd over one example at a time, on keys and values of the beginning that carry no gradient."""
    model = a_model(True)
    model._causal.set_attn_implementation(name)
    rows = model.example_gradients(EXAMPLES).gradients
    model._causal.set_attn_implementation("eager")
    for row, example in zip(rows, EXAMPLES, strict=True):
        batch = loss.batch_of([example], torch.device("cpu"))
        with torch.no_grad():
            past = model._causal.base_model(input_ids=batch.tokens[:, :6], use_cache=True).past_key_values
        hidden = model._causal.base_model(input_ids=batch.tokens[:, 6:], past_key_values=past).last_hidden_state
        logits = model._causal.lm_head(hidden[batch.rows, batch.columns - 6])
        value = torch.nn.functional.cross_entropy(logits, batch.targets)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(value, model.parameters())])
        assert torch.allclose(row, expected, rtol=1e-4, atol=1e-6)


COMPANIONS = [
    [],
    with_beginning(tiny_llama.examples((7, 9), seed=5)),
    tiny_llama.examples((6, 11), seed=6),  # these begin otherwise
    [EXAMPLES[1]] * 2,  # these share more than the beginning with it: all of it
]


@pytest.mark.parametrize("companions", COMPANIONS)
@pytest.mark.parametrize("mine", [EXAMPLES[1], tiny_llama.examples((9,), seed=3)[0]])
def test_a_row_does_not_depend_on_who_else_is_in_the_batch(companions, mine) -> None:
    """Differential privacy rests on this: else one example more would move what the others contribute."""
    model = a_model(True)
    alone = model.example_gradients([mine])
    together = model.example_gradients([*companions, mine])
    assert torch.allclose(together.gradients[-1], alone.gradients[0], rtol=1e-4, atol=1e-6)
    assert together.losses[-1] == pytest.approx(alone.losses[0], rel=1e-5)


def test_a_prefix_taken_from_the_batch_would_make_rows_depend_on_each_other(monkeypatch) -> None:
    """The twin: with the beginning that this batch happens to share, the test above fails."""

    def shared_in_batch(model: LoraModel, examples):
        batch = loss.batch_of(examples, torch.device("cpu"))
        return [(list(range(len(examples))), prefix.shared_length(batch))]

    monkeypatch.setattr(LoraModel, "by_prefix", shared_in_batch)
    model = a_model(True)
    mine, other = EXAMPLES[1], with_beginning(tiny_llama.examples((9,), seed=5))[0]
    same = model.example_gradients([mine, mine]).gradients[-1]
    mixed = model.example_gradients([other, mine]).gradients[-1]
    assert not torch.allclose(same, mixed, rtol=0.05)


def test_a_new_adapter_is_read_anew() -> None:
    model = a_model(True)
    before = model.evaluate(EXAMPLES, 4)[0]
    tiny_llama.with_random_adapter(model, seed=9)
    after = model.evaluate(EXAMPLES, 4)[0]
    fresh = tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), tiny_llama.SHAPE), seed=9)
    assert after != before
    assert after == fresh.evaluate(EXAMPLES, 4)[0]


def test_an_optimizer_step_in_place_is_noticed() -> None:
    model = a_model(True)
    model.example_gradients(EXAMPLES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    fresh = LoraModel(tiny_llama.base(), tiny_llama.SHAPE)
    fresh.set_flat(model.flat())
    assert model.evaluate(EXAMPLES, 4)[0] == fresh.evaluate(EXAMPLES, 4)[0]


def test_what_predicts_a_target_is_never_part_of_the_beginning() -> None:
    """All tokens alike, the first target at 3: position 2 predicts it, so at most positions 0 and 1 are shared."""
    tokens = np.full(12, 5, np.int32)
    is_target = np.zeros(12, np.bool_)
    is_target[[8, 11]] = True
    batch = loss.batch_of([EncodedExample(tokens, is_target)] * 2, torch.device("cpu"))
    assert prefix.shared_length(batch) == 7


def test_a_short_beginning_is_not_worth_a_pass() -> None:
    examples = tiny_llama.examples((5, 9))
    assert prefix.shared_length(loss.batch_of(examples, torch.device("cpu"))) == 0


def test_detaching_a_prefix_under_checkpointing_is_refused() -> None:
    with pytest.raises(ConfigError, match="under checkpointing"):
        LoraModel(tiny_llama.base(), tiny_llama.SHAPE, checkpointing=True, detached_prefix=(3, 4))
