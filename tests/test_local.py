"""What a device computes: Poisson batches, clipped and rounded example by example, with Opacus as the engine."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer

from fedmini import local
from fedmini.model.lora import LoraModel
from fedmini.privacy import accounting, clipping, encoding
from fedmini.privacy.noise import RandomStream
from fedmini.types import IntVector, LocalPlan, UnitPlan
from tests import autograd_reference, tiny_llama

PLAN = LocalPlan(1, 0.5, 4.0, 0.1, "sgd", 64, detach_prefix=False)
LENGTHS = (5, 9, 7, 12, 6, 8, 11, 10)


def a_unit(model: LoraModel, noise: str = "shared", num_metrics: int = 4, **changes: float) -> UnitPlan:
    request = accounting.UnitRequest(
        unit="example",
        noise=noise,  # type: ignore[arg-type]
        clip_norm=changes.get("clip_norm", 0.05),
        num_coordinates=model.num_parameters + num_metrics,
        num_shares=1,
        target_delta=1e-5,
        noise_multiplier=1.0,
    )
    return accounting.plan_unit(request)


def a_model() -> LoraModel:
    return tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), tiny_llama.SHAPE))


def a_local_run(
    plan: LocalPlan = PLAN, seed: int = 3, physical_batch_size: int = 32, lengths=LENGTHS
) -> local.LocalRun:
    return local.LocalRun(tiny_llama.examples(lengths), plan, physical_batch_size, partial(RandomStream.seeded, seed))


def sum_gradients(model: LoraModel, run: local.LocalRun, unit: UnitPlan, num_metrics: int) -> IntVector:
    return local.run_alone(model, local.sum_gradients(model.parameters(), run, unit, num_metrics))


def train_adapter(model: LoraModel, run: local.LocalRun, unit: UnitPlan | None) -> local.Training:
    return local.run_alone(model, local.train_adapter(model.parameters(), run, unit))


EVERYTHING = replace(PLAN, sampling_rate=1.0)


def test_the_sum_over_a_batch_is_the_sum_of_clipped_gradients_up_to_rounding() -> None:
    model = a_model()
    unit = a_unit(model, num_metrics=0)
    found = sum_gradients(model, a_local_run(EVERYTHING), unit, num_metrics=0)
    rows = model.example_gradients(tiny_llama.examples(LENGTHS)).gradients.double().numpy()
    factors = np.minimum(1, unit.clip_norm / np.linalg.norm(rows, axis=1))
    expected = (rows * factors[:, None]).sum(axis=0)
    assert np.abs(found / unit.scale - expected).max() <= len(LENGTHS) / unit.scale
    assert (factors < 1).any() and found.dtype == np.int64


def test_the_integer_sum_is_opacuss_own_clipped_sum_up_to_rounding() -> None:
    model = a_model()
    unit = a_unit(model, num_metrics=0)
    found = sum_gradients(model, a_local_run(EVERYTHING), unit, num_metrics=0)
    stock = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=unit.clip_norm,
        expected_batch_size=1,
    )
    model.example_gradients(tiny_llama.examples(LENGTHS))
    stock.clip_and_accumulate()
    theirs = np.concatenate([parameter.summed_grad.numpy().ravel() for parameter in stock.params])
    assert np.abs(found / unit.scale - theirs).max() <= (len(LENGTHS) + 0.1) / unit.scale


def test_one_example_moves_the_integers_by_at_most_the_bound_the_noise_is_sized_for() -> None:
    model = a_model()
    unit = a_unit(model, clip_norm=1e-4)  # far below every gradient's norm
    bound = encoding.sensitivity(unit.clip_norm, unit.scale, model.num_parameters + 4)
    for seed in range(20):
        found = sum_gradients(model, a_local_run(EVERYTHING, seed, lengths=(9,)), unit, num_metrics=4)
        assert 0 < np.linalg.norm(found.astype(float)) <= bound


def test_without_clipping_one_example_would_pass_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the same check catches a device that does not clip."""
    model = a_model()
    unit = a_unit(model, clip_norm=1e-4)
    monkeypatch.setattr(clipping, "factor", lambda norm, clip_norm: 1.0)
    with pytest.raises(Exception, match="expected a clipped vector"):
        sum_gradients(model, a_local_run(EVERYTHING, lengths=(9,)), unit, num_metrics=4)


def test_the_size_of_a_physical_batch_changes_nothing_but_rounding() -> None:
    model = a_model()
    unit = a_unit(model)
    whole = sum_gradients(model, a_local_run(EVERYTHING), unit, num_metrics=4)
    pieces = sum_gradients(model, a_local_run(EVERYTHING, physical_batch_size=3), unit, num_metrics=4)
    assert np.abs(whole - pieces).max() <= len(LENGTHS) * 2


def test_an_empty_batch_gives_zeros_before_the_noise() -> None:
    model = a_model()
    nothing = replace(PLAN, sampling_rate=1e-12)
    assert not sum_gradients(model, a_local_run(nothing), a_unit(model), num_metrics=4).any()


def test_an_empty_batch_is_a_private_step_of_noise_alone() -> None:
    model = a_model()
    unit = a_unit(model, noise="local", num_metrics=0)
    nothing = replace(PLAN, sampling_rate=1e-12)
    training = train_adapter(model, a_local_run(nothing), unit)
    expected_std = unit.noise_variance**0.5 / unit.scale * PLAN.learning_rate / PLAN.expected_batch_size
    assert np.std(training.delta) == pytest.approx(expected_std, rel=0.25)


def test_a_private_step_divides_by_the_expected_batch_not_by_what_was_drawn() -> None:
    """Twice the expected batch size, half the step: whatever was really drawn."""
    deltas = []
    for expected in (4.0, 8.0):
        model = a_model()
        unit = a_unit(model, noise="local", num_metrics=0)
        plan = replace(EVERYTHING, expected_batch_size=expected)
        deltas.append(train_adapter(model, a_local_run(plan), unit).delta)
    assert deltas[0] == pytest.approx(2 * deltas[1], rel=1e-3, abs=1e-7)


def test_noise_is_drawn_anew_in_every_local_step() -> None:
    model = a_model()
    unit = a_unit(model, noise="local", num_metrics=0)
    nothing = replace(PLAN, sampling_rate=1e-12)
    one = train_adapter(a_model(), a_local_run(nothing), unit).delta
    four = train_adapter(a_model(), a_local_run(replace(nothing, num_steps=4)), unit).delta
    assert np.std(four) == pytest.approx(2 * np.std(one), rel=0.3)  # not 4: the four draws are independent


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_without_privacy_are_plain_torch_steps_on_the_mean_gradient(optimizer: str) -> None:
    plan = replace(EVERYTHING, num_steps=3, optimizer=optimizer)  # type: ignore[arg-type]
    training = train_adapter(a_model(), a_local_run(plan, physical_batch_size=3), None)
    model = a_model()
    start = model.flat()
    stock = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](model.parameters(), lr=0.1)
    for _ in range(3):
        autograd_reference.mean_loss_gradient(model, tiny_llama.examples(LENGTHS))
        stock.step()
    assert training.delta == pytest.approx(model.flat() - start, rel=1e-3, abs=2e-5)
    assert training.loss > 0 and training.mean_targets > 0


def test_each_example_is_drawn_on_its_own_with_the_sampling_rate() -> None:
    plan = replace(PLAN, sampling_rate=0.3)
    examples = tiny_llama.examples((4,) * 50)
    sizes = [
        len(local._poisson_batch(local.LocalRun(examples, plan, 8, partial(RandomStream.seeded, seed)), 0))
        for seed in range(400)
    ]
    assert np.mean(sizes) == pytest.approx(15, abs=0.6)
    assert np.var(sizes) == pytest.approx(50 * 0.3 * 0.7, rel=0.25)  # binomial: no fixed size, never cut
