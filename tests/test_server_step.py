"""The server's optimizers, checked by hand on one coordinate."""

import numpy as np
import pytest

from fedmini.errors import ConfigError
from fedmini.server_step import ServerPlan, learning_rate_at, server_step
from fedmini.types import LedgerPosition, ServerState
from tests.test_rounds import NO_PRIVACY, a_run

ZEROS = {"x.lora_B.weight": np.zeros((3, 2), np.float32)}
MEAN = np.array([1.0, -2.0, 0.0, 0.5, 0.0, 0.0])


def steps(num_steps: int, **changes: object) -> np.ndarray:
    values = dict(over_selection=1.0, spare_attempts=0, optimizer="average", learning_rate=0.1, momentum=0.9)
    values |= dict(second_moment=0.99, decay="none") | changes
    manifest = a_run(NO_PRIVACY).manifest
    state = ServerState(0, ZEROS, 0, None, None, {}, LedgerPosition(0, ""))
    for _ in range(num_steps):
        state = server_step(state, MEAN, manifest, ServerPlan(**values))  # type: ignore[arg-type]
    return state.adapter["x.lora_B.weight"].ravel()


def test_average_adds_the_mean_times_the_learning_rate() -> None:
    assert steps(2) == pytest.approx(0.2 * MEAN)


def test_momentum_carries_nine_tenths_of_the_last_step() -> None:
    assert steps(2, optimizer="momentum") == pytest.approx(0.1 * (1 + 1.9) * MEAN)


def test_bias_corrected_adam_moves_by_the_learning_rate_whatever_the_size() -> None:
    assert steps(3, optimizer="adam") == pytest.approx(0.3 * np.sign(MEAN), rel=1e-5)


@pytest.mark.parametrize(("decay", "expected"), [("none", 0.1), ("linear", 0.05), ("cosine", 0.05)])
def test_half_way_a_decaying_rate_is_half(decay: str, expected: float) -> None:
    plan = ServerPlan(1.0, 0, "average", 0.1, 0.9, 0.99, decay)  # type: ignore[arg-type]
    assert learning_rate_at(5, 10, plan) == pytest.approx(expected)
    assert learning_rate_at(0, 10, plan) == pytest.approx(0.1)


def test_a_step_that_overflows_is_refused_and_nothing_is_committed() -> None:
    with pytest.raises(ConfigError, match=r"lower rounds\.server_learning_rate"):
        steps(1, learning_rate=1e39)
