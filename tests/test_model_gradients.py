import copy

import autograd_reference
import numpy as np
import pytest
import tiny_llama
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, get_peft_model

from fedmini.model.lora import LoraModel
from fedmini.types import LoraShape

EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (7, 20, 3, 12)


def model(shape=tiny_llama.SHAPE, **options):
    return tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), shape, **options))


def one_by_one(lora_model, examples):
    """The gradient of each example alone, by plain autograd through PEFT's own layers."""
    rows = []
    for example in examples:
        autograd_reference.mean_loss_gradient(lora_model, [example])
        rows.append(torch.cat([parameter.grad.flatten() for parameter in lora_model.parameters()]))
    return torch.stack(rows)


def assert_rows_close(got, expected):
    """1e-6 over all rows; a single short example, whose terms nearly cancel, may be off by 5e-6 of its own norm."""
    error, expected = got.double() - expected.double(), expected.double()
    assert error.norm() <= 1e-6 * expected.norm()
    assert (error.norm(dim=1) <= 5e-6 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["B", "AB"])
@pytest.mark.parametrize(
    ("lora_rank", "targets", "layers"),
    [
        (1, ("v_proj",), None),
        (2, ("v_proj", "o_proj"), (1,)),
        (4, EVERYTHING, None),
        (8, ("q_proj", "down_proj"), (0,)),
    ],
)
def test_every_row_is_the_gradient_of_that_example_alone(lora_rank, targets, layers, trained, checkpointing):
    lora_model = model(LoraShape(lora_rank, 4.0, targets, layers, trained, 0), checkpointing=checkpointing)
    examples = tiny_llama.examples(LENGTHS)

    result = lora_model.example_gradients(examples)

    assert_rows_close(result.gradients, one_by_one(lora_model, examples))
    np.testing.assert_allclose(result.norms, result.gradients.double().norm(dim=1), rtol=1e-12)
    assert result.num_targets.tolist() == [int(example.is_target.sum()) for example in examples]


@pytest.mark.parametrize("trained", ["B", "AB"])
def test_rows_equal_those_of_opacus_hooks_on_plain_peft(trained):
    shape = LoraShape(3, 6.0, EVERYTHING, None, trained, 5)
    lora_model = model(shape)
    examples = tiny_llama.examples((11, 11, 11))
    plain = get_peft_model(
        copy.deepcopy(tiny_llama.llama()), LoraConfig(r=3, lora_alpha=6, target_modules=list(EVERYTHING))
    )
    ours = dict(lora_model.module.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.copy_(ours[name])
                parameter.requires_grad_(trained == "AB" or "lora_B" in name)
    hooked = GradSampleModule(plain, batch_first=True, loss_reduction="sum", strict=False)
    tokens = torch.stack([torch.from_numpy(example.tokens).long() for example in examples])
    is_target = torch.stack([torch.from_numpy(example.is_target) for example in examples])[:, 1:]

    # Opacus wants the batch first in every input: the positions are given once for each example.
    logits = hooked(input_ids=tokens, position_ids=torch.arange(11).expand(3, -1), use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    means = (losses.view(3, -1) * is_target).sum(1) / is_target.sum(1)
    means.sum().backward()
    names = {id(parameter): name for name, parameter in lora_model.module.named_parameters()}
    theirs = dict(plain.named_parameters())
    expected = [theirs[names[id(parameter)]].grad_sample.flatten(1) for parameter in lora_model.parameters()]

    result = lora_model.example_gradients(examples)

    np.testing.assert_allclose(result.losses, means.detach().numpy(), rtol=1e-6)
    assert_rows_close(result.gradients, torch.cat(expected, dim=1))


@pytest.mark.parametrize("others", [(), (40,), (2, 33, 5)])
def test_a_row_does_not_depend_on_who_else_is_in_the_batch(others):
    lora_model = model()
    mine = tiny_llama.examples((9,), seed=3)
    alone = lora_model.example_gradients(mine)

    together = lora_model.example_gradients([*tiny_llama.examples(others, seed=4), *mine])

    assert_rows_close(together.gradients[-1:], alone.gradients)
    assert together.losses[-1] == pytest.approx(alone.losses[0], rel=1e-6)


def test_what_follows_the_last_target_changes_nothing():
    lora_model = model()
    (example,) = tiny_llama.examples((9,))
    longer = type(example)(
        np.append(example.tokens, [5, 6, 7]).astype(np.int32), np.append(example.is_target, [False] * 3)
    )

    assert torch.equal(
        lora_model.example_gradients([longer]).gradients, lora_model.example_gradients([example]).gradients
    )


def test_an_empty_batch_gives_no_rows_and_an_optimizer_step_of_nothing():
    lora_model = model()
    before = lora_model.flat()
    optimizer = dp_optimizer(lora_model, clip_norm=1.0)

    result = lora_model.example_gradients([])
    optimizer.step()

    assert result.gradients.shape == (0, lora_model.num_parameters)
    assert result.losses.shape == result.norms.shape == result.num_targets.shape == (0,)
    np.testing.assert_array_equal(lora_model.flat(), before)


def test_opacus_clips_and_sums_our_rows():
    lora_model = model()
    before = lora_model.flat()
    clip_norm = 0.05
    optimizer = dp_optimizer(lora_model, clip_norm)

    result = lora_model.example_gradients(tiny_llama.examples(LENGTHS))
    optimizer.step()

    factors = np.minimum(1, clip_norm / result.norms)
    assert (factors < 1).any()
    expected = before - 0.5 * (factors[:, None] * result.gradients.double().numpy()).sum(0) / 4
    np.testing.assert_allclose(lora_model.flat(), expected, rtol=1e-4, atol=1e-7)


def dp_optimizer(lora_model, clip_norm):
    return DPOptimizer(
        torch.optim.SGD(lora_model.parameters(), lr=0.5),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=4,
    )


def test_the_mean_gradient_is_the_mean_of_the_rows():
    lora_model = model(LoraShape(2, 4.0, EVERYTHING, None, "AB", 0))
    examples = tiny_llama.examples(LENGTHS)
    rows = lora_model.example_gradients(examples)

    mean, losses = lora_model.mean_gradient(examples)

    torch.testing.assert_close(mean, rows.gradients.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses, rows.losses, rtol=1e-6)


def test_the_mean_gradient_of_nothing_is_zero():
    lora_model = model()

    mean, losses = lora_model.mean_gradient([])

    assert torch.count_nonzero(mean) == 0 and losses.shape == (0,)


def test_recording_leaves_grad_alone_and_stops_when_it_is_over():
    lora_model = model()

    lora_model.example_gradients(tiny_llama.examples((5,)))

    assert all(parameter.grad is None for parameter in lora_model.parameters())
    assert lora_model._recorder.recording is None


def test_only_layers_from_the_lowest_adapted_one_take_part_in_backward():
    lora_model = model(LoraShape(2, 4.0, ("v_proj",), (1,), "B", 0))
    needs_gradient = []
    for layer in lora_model._causal.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: needs_gradient.append(output.requires_grad))

    lora_model.example_gradients(tiny_llama.examples((5, 6)))

    assert needs_gradient == [False, True]
