"""What the server does with the mean of a round: plain averaging, momentum, or Adam (arXiv:2003.00295)."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmini import vectors
from fedmini.errors import ConfigError
from fedmini.types import Manifest, ServerState, Vector

ADAM_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What only the server does with a sum: whom it asks, and what step it takes. No device has to agree to it."""

    over_selection: float
    spare_attempts: int
    optimizer: Literal["average", "momentum", "adam"]
    learning_rate: float
    momentum: float
    second_moment: float
    decay: Literal["none", "linear", "cosine"]


def num_asked(cohort_size: int, over_selection: float) -> int:
    """How many devices a round asks, so that `cohort_size` are left; a float's last digit adds nobody."""
    return math.ceil(cohort_size * over_selection - 1e-9)


def server_step(state: ServerState, mean: NDArray[np.float64], manifest: Manifest, server: ServerPlan) -> ServerState:
    """The state after one step of the server's optimizer on the decoded mean; round and ledger are left alone.

    `mean` has shape (num_parameters,): a mean of adapter changes, or, where gradients are summed, one of gradients,
    which the step goes against. Adam is bias-corrected.
    """
    change = -manifest.local.learning_rate * mean if manifest.release.sums_examples else mean
    num_updates = state.num_updates + 1
    momentum, second_moment, direction = state.momentum, state.second_moment, change
    if server.optimizer == "momentum":
        momentum = _mixed(momentum, server.momentum, change, 1.0)
        direction = momentum.astype(np.float64)
    elif server.optimizer == "adam":
        momentum = _mixed(momentum, server.momentum, change, 1 - server.momentum)
        second_moment = _mixed(second_moment, server.second_moment, np.square(change), 1 - server.second_moment)
        corrected = momentum.astype(np.float64) / (1 - server.momentum**num_updates)
        spread = np.sqrt(second_moment.astype(np.float64) / (1 - server.second_moment**num_updates))
        direction = corrected / (spread + ADAM_EPSILON)
    step = learning_rate_at(state.round_num, manifest.num_rounds, server) * direction
    flat = vectors.flatten(state.adapter, manifest.template).astype(np.float64) + step
    if not (np.abs(flat) < np.finfo(np.float32).max).all():
        raise ConfigError(
            f"round {state.round_num + 1} would make the adapter's numbers overflow: lower rounds.server_learning_rate; "
            "everything up to the round before is saved"
        )
    return replace(
        state,
        adapter=vectors.unflatten(flat.astype(np.float32), manifest.template),
        num_updates=num_updates,
        momentum=momentum,
        second_moment=second_moment,
    )


def _mixed(before: Vector | None, keep: float, new: NDArray[np.float64], weight: float) -> Vector:
    old = np.zeros_like(new) if before is None else before.astype(np.float64)
    return (keep * old + weight * new).astype(np.float32)


def learning_rate_at(round_index: int, num_rounds: int, server: ServerPlan) -> float:
    """The server's learning rate in the round after `round_index` committed ones."""
    done = round_index / num_rounds
    factor = {"none": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[server.decay]
    return server.learning_rate * factor
