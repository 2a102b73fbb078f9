"""Our rows and their clipped sum against Opacus's hooks on plain PEFT, for whatever family of models transformers has."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, get_peft_model

from fedmini.errors import ConfigError
from fedmini.model.lora import LoraModel
from fedmini.types import EncodedExample, LoraShape
from tests import tiny_architectures, tiny_llama
from tests.tiny_architectures import FAMILIES

CLIP_NORM = 0.5
MIXED = (7, 20, 3, 12)


def a_model(family: str, shape: LoraShape, checkpointing: bool = False) -> LoraModel:
    model = LoraModel(tiny_architectures.base(family), shape, checkpointing=checkpointing)
    return tiny_llama.with_random_adapter(model)


def a_shape(family: str, trained: str = "B", lora_rank: int = 3, targets: tuple[str, ...] = ()) -> LoraShape:
    return LoraShape(lora_rank, 6.0, targets or FAMILIES[family].targets, None, trained, 5)  # type: ignore[arg-type]


def opacus_hooks(
    ours: LoraModel, family: str, shape: LoraShape, is_trained: bool = False
) -> tuple[GradSampleModule, list[torch.nn.Parameter]]:
    """Plain PEFT on the same base, hooked by Opacus; its trained parameters, in our order."""
    config = LoraConfig(
        r=shape.lora_rank,
        lora_alpha=shape.lora_alpha,  # type: ignore[arg-type]
        target_modules=list(shape.target_modules),
        layers_to_transform=None if shape.layers is None else list(shape.layers),
    )
    plain = get_peft_model(tiny_architectures.module(family), config).train(is_trained)
    for part in plain.modules():  # Opacus hooks record of what is in training mode only
        part.training |= isinstance(part, torch.nn.Linear)
    values = dict(ours.module.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(values[name])
                parameter.requires_grad_(values[name].requires_grad)
    names = {id(parameter): name for name, parameter in ours.module.named_parameters()}
    theirs = dict(plain.named_parameters())
    trained = [theirs[names[id(parameter)]] for parameter in ours.parameters()]
    return GradSampleModule(plain, batch_first=True, loss_reduction="sum", strict=False), trained


def fill_grad_samples(hooked: GradSampleModule, examples: list[EncodedExample]) -> None:
    """One forward and backward of each example's own mean loss; shorter examples are padded on the right."""
    length = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    is_target = torch.zeros(len(examples), length)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
        is_target[row, : len(example.tokens)] = torch.from_numpy(example.is_target)
    # Opacus wants the batch first in every input: the positions are given once for each example.
    positions = torch.arange(length).expand(len(examples), -1)
    logits = hooked(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    ((losses * is_target[:, 1:]).sum(1) / is_target[:, 1:].sum(1)).sum().backward()


def clipped_sum(parameters: list[torch.nn.Parameter], clip_norm: float = CLIP_NORM) -> torch.Tensor:
    """What Opacus's own optimizer makes of the parameters' `grad_sample`."""
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=1.0), noise_multiplier=0.0, max_grad_norm=clip_norm, expected_batch_size=1
    )
    optimizer.clip_and_accumulate()
    return torch.cat([parameter.summed_grad.flatten() for parameter in parameters])


def assert_rows_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-6 over all rows, 5e-6 for each; of a gradient below 0.1 that much of 0.1, since terms of order 1 cancel in it."""
    error, expected = got.double() - expected.double(), expected.double()
    assert error.norm() <= 1e-6 * expected.norm().clamp(min=0.1)
    assert (error.norm(dim=1) <= 5e-6 * expected.norm(dim=1).clamp(min=0.1)).all()


def assert_alike(ours: LoraModel, family: str, shape: LoraShape, examples: list[EncodedExample]) -> None:
    """Rows and clipped sums within 1e-6 of Opacus's, with the clipping in force for some example at least."""
    hooked, parameters = opacus_hooks(ours, family, shape)
    fill_grad_samples(hooked, examples)
    expected = torch.cat([parameter.grad_sample.flatten(1) for parameter in parameters], dim=1)

    found = ours.example_gradients(examples)

    assert_rows_close(found.gradients, expected)
    clip_norm = float(np.median(found.norms)) * 0.9
    theirs, mine = clipped_sum(parameters, clip_norm), clipped_sum(ours.parameters(), clip_norm)
    assert (mine - theirs).double().norm() <= 2e-6 * max(clip_norm, 0.1) * len(examples) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["B", "AB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_clipped_sums_are_those_of_opacus_hooks(family: str, trained: str, checkpointing: bool) -> None:
    shape = a_shape(family, trained)

    assert_alike(a_model(family, shape, checkpointing), family, shape, tiny_llama.examples(MIXED))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, LoraShape]:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    targets = draw(st.sets(st.sampled_from(FAMILIES[family].targets), min_size=1))
    layers = draw(st.sampled_from([None, (0,), (1,)]))
    trained = draw(st.sampled_from(["B", "AB"]))
    return family, LoraShape(draw(st.integers(1, 9)), draw(st.floats(0.5, 32.0)), tuple(targets), layers, trained, 0)


@given(shapes(), st.lists(st.integers(2, 24), min_size=1, max_size=5), st.booleans(), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_they_are_so_for_any_rank_targets_layers_and_lengths(
    drawn: tuple[str, LoraShape], lengths: list[int], checkpointing: bool, seed: int
) -> None:
    family, shape = drawn

    assert_alike(a_model(family, shape, checkpointing), family, shape, tiny_llama.examples(tuple(lengths), seed))


def test_layers_that_get_the_tokens_of_all_examples_as_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="gets the tokens of all examples as one"):
        a_model("opt", a_shape("opt", targets=("fc1",)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_nobody_sums_to_zero(family: str) -> None:
    model = a_model(family, a_shape(family))

    assert model.example_gradients([]).gradients.shape == (0, model.num_parameters)
    assert not clipped_sum(model.parameters()).any()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bases_dropout_is_off(family: str, checkpointing: bool) -> None:
    model = a_model(family, a_shape(family), checkpointing)
    examples = tiny_llama.examples(MIXED)

    first, second = (model.example_gradients(examples) for _ in range(2))

    assert torch.equal(first.gradients, second.gradients)
    np.testing.assert_array_equal(first.losses, second.losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_check_finds_dropout_that_is_on(family: str) -> None:
    """The twin: were these models in training mode, rows would be those of another network at every step."""
    shape = a_shape(family)
    ours = a_model(family, shape)
    hooked, parameters = opacus_hooks(ours, family, shape, is_trained=True)
    fill_grad_samples(hooked, tiny_llama.examples(MIXED))
    theirs = torch.cat([parameter.grad_sample.flatten(1) for parameter in parameters], dim=1)

    with pytest.raises(AssertionError):
        assert_rows_close(ours.example_gradients(tiny_llama.examples(MIXED)).gradients, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_check_finds_a_loss_that_couples_examples(family: str) -> None:
    """The twin: a mean over all targets of a batch, as `labels=` in transformers has it, is another gradient."""
    shape = a_shape(family)
    ours = a_model(family, shape)
    examples = tiny_llama.examples(MIXED)
    alone = ours.example_gradients(examples)
    weights = alone.num_targets / alone.num_targets.sum()

    with pytest.raises(AssertionError):
        assert_rows_close(torch.from_numpy(weights[:, None]) * alone.gradients, alone.gradients)
