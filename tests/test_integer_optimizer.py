"""Opacus over integers: the same sums and steps as rounding whole rows by hand, and no Opacus where nothing needs it."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini import metrics
from fedmini.integer_optimizer import IntegerDPOptimizer
from fedmini.model.together import Gradients
from fedmini.privacy import accounting, clipping, encoding, noise
from fedmini.privacy.noise import RandomStream
from fedmini.types import LocalPlan, UnitPlan

PLAN = LocalPlan(1, 0.5, 4.0, 0.1, "sgd", 64, detach_prefix=False)
SHAPES = ((3, 2), (5000,), (90, 100))
NUM_PARAMETERS = 14_006


def a_unit(num_metrics: int, clip_norm: float = 0.5) -> UnitPlan:
    request = accounting.UnitRequest(
        unit="example",
        noise="shared" if num_metrics else "local",
        clip_norm=clip_norm,
        num_coordinates=NUM_PARAMETERS + num_metrics,
        num_shares=1,
        target_delta=1e-5,
        noise_multiplier=1.0,
    )
    return accounting.plan_unit(request)


def an_optimizer(unit: UnitPlan, num_metrics: int, seed: int = 3) -> IntegerDPOptimizer:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    sgd = torch.optim.SGD(parameters, lr=0.1)
    return IntegerDPOptimizer(sgd, unit, PLAN, num_metrics, partial(RandomStream.seeded, seed))


def gradients(norms: list[float], seed: int = 1) -> Gradients:
    rows = np.random.default_rng(seed).normal(size=(len(norms), NUM_PARAMETERS)).astype(np.float32)
    for row, norm in zip(rows, norms, strict=True):
        row *= np.float32(norm / np.linalg.norm(row.astype(np.float64)))
    counts = np.arange(1, len(norms) + 1)
    return Gradients(torch.from_numpy(rows), counts * 1.5, counts)


def plain_sum(found: Gradients, unit: UnitPlan, num_metrics: int, seed: int = 3) -> np.ndarray:
    """Each row clipped whole, its metric coordinates behind it, and rounded: as it is described, in float64."""
    room = metrics.room_for_vector(unit.clip_norm) if num_metrics else unit.clip_norm
    rows, was_clipped = clipping.clip_rows(found.rows.numpy(), room)
    if num_metrics:
        behind = metrics.coordinates(found.losses, found.num_targets, was_clipped, unit.clip_norm, PLAN.max_length)
        rows = np.concatenate([rows, behind], axis=1)
    bound = encoding.sensitivity(unit.clip_norm, unit.scale, rows.shape[1])
    return encoding.round_sum(rows, unit.scale, bound, RandomStream.seeded(seed, "rounding"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), max_size=4), st.sampled_from([0, 4]), st.integers(0, 2**32))
def test_the_sum_is_that_of_rows_that_are_clipped_and_rounded_one_by_one(norms, num_metrics, seed) -> None:
    """The clipping's last digit may differ: it would take a coin within 1e-12 of its threshold to see it."""
    unit, found = a_unit(num_metrics), gradients(norms)
    optimizer = an_optimizer(unit, num_metrics, seed)
    optimizer.observe(found)
    optimizer.clip_and_accumulate()
    np.testing.assert_array_equal(optimizer.integer_sum, plain_sum(found, unit, num_metrics, seed))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_counts_as_zeros_that_were_clipped(bad: float) -> None:
    unit, found = a_unit(4), gradients([0.1, 0.1])
    found.rows[0, 9000] = bad
    optimizer = an_optimizer(unit, 4)
    optimizer.observe(found)
    optimizer.clip_and_accumulate()
    np.testing.assert_array_equal(optimizer.integer_sum, plain_sum(found, unit, 4))
    full = metrics.METRIC_SHARE * unit.clip_norm / 2 * unit.scale
    assert optimizer.integer_sum[-4:] == pytest.approx([2 * full, 0.45 * full, 3 / 64 * full, full], abs=2)


def test_a_step_moves_the_parameters_by_the_noised_sum_over_the_expected_batch() -> None:
    unit, found = a_unit(0), gradients([0.1, 5.0])
    optimizer = an_optimizer(unit, 0)
    for step in range(2):
        optimizer.observe(found)
        before = torch.cat([parameter.detach().flatten() for parameter in optimizer.params])
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            noised = plain_sum(found, unit, 0)
            noised += noise.discrete_gaussian(unit.noise_variance, NUM_PARAMETERS, RandomStream.seeded(3, "noise", 0))
            expected = -0.1 * (noised / unit.scale).astype(np.float32) / 4.0
            after = torch.cat([parameter.detach().flatten() for parameter in optimizer.params])
            np.testing.assert_allclose((after - before).numpy(), expected, rtol=1e-6)
    assert not optimizer.integer_sum.any()


def test_a_run_without_example_level_privacy_never_imports_opacus() -> None:
    program = """
import sys
from functools import partial
from fedmini import contributor, local
from fedmini.model.lora import LoraModel
from fedmini.privacy.noise import RandomStream
from fedmini.types import LocalPlan
from tests import tiny_llama
model = LoraModel(tiny_llama.base(), tiny_llama.SHAPE)
plan = LocalPlan(1, 1.0, 2.0, 0.1, "sgd", 64, detach_prefix=False)
run = local.LocalRun(tiny_llama.examples((5, 9)), plan, 8, partial(RandomStream.seeded, 1))
local.run_alone(model, local.train_adapter(model.parameters(), run, None))
print(sorted(name for name in sys.modules if name.split(".")[0] == "opacus"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
