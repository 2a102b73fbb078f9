"""The arrays' privacy loss distributions are dp_accounting's own, and leave no memory behind."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmini.privacy import gaussian_loss

ROOT = Path(__file__).resolve().parent.parent


def parts(found: privacy_loss_distribution.PrivacyLossDistribution) -> list[tuple[object, ...]]:
    """Both directions of a distribution: the masses as bytes, and all else as it is."""

    def values(pmf: pld_pmf.PLDPmf) -> tuple[object, ...]:
        found = sorted(vars(pmf).items())
        return type(pmf), *(
            (name, value.tobytes() if isinstance(value, np.ndarray) else value) for name, value in found
        )

    return [values(found._pmf_remove), values(found._pmf_add)]


def theirs(z_eff: float, sampling_rate: float, grid: float) -> privacy_loss_distribution.PrivacyLossDistribution:
    return privacy_loss_distribution.from_gaussian_mechanism(
        z_eff, sampling_prob=sampling_rate, value_discretization_interval=grid
    )


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 50), st.one_of(st.floats(1e-6, 1), st.just(1.0)), st.sampled_from([1e-2, 1e-3]))
@example(1.0, 1 - math.exp(-0.5), 1e-2)  # the least loss is a point of the grid, -0.5
@example(1.0, 1 - math.exp(-0.123), 1e-3)
@example(1.0, 1 - 1e-9, 1e-2)
@example(1.0, 1e-9, 1e-2)
@example(1000.0, 0.5, 1e-2)  # so much noise that a few points hold all of it
@example(0.05, 0.5, 1e-2)
def test_the_masses_are_those_of_dp_accounting_to_the_bit(z_eff: float, sampling_rate: float, grid: float) -> None:
    assert parts(gaussian_loss.distribution(z_eff, sampling_rate, grid)) == parts(theirs(z_eff, sampling_rate, grid))


@pytest.mark.parametrize(("z_eff", "sampling_rate"), [(1.0, 0.5), (0.9, 0.02), (4.0, 1.0)])
def test_the_masses_are_those_of_dp_accounting_on_the_fine_grid_too(z_eff: float, sampling_rate: float) -> None:
    assert parts(gaussian_loss.distribution(z_eff, sampling_rate, 1e-4)) == parts(theirs(z_eff, sampling_rate, 1e-4))


def test_the_epsilons_of_many_rounds_leave_no_memory_behind() -> None:
    """Without `forget_plans` it is 100 MB and more: 32 tables of the lengths of the last transforms."""
    code = (
        "from pathlib import Path\n"
        "from fedmini.privacy import accounting\n"
        "from fedmini.types import PrivacyEvent\n"
        "event = PrivacyEvent('example', 'shared', 1.0, 0.5, 1, 1.0)\n"
        "def held(): return int(Path('/proc/self/statm').read_text().split()[1]) / 256\n"
        "accounting.epsilon(event, 1, 1e-3)\n"
        "before = held()\n"
        "for count in range(2, 25): accounting.epsilon(event, count, 1e-3)\n"
        "print(held() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) < 50  # MB
