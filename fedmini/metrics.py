"""Metrics as coordinates of a unit's vector: bounded, clipped and noised with the rest, and therefore free.

A unit (an example, or a device's whole update) carries four coordinates behind its gradient or update. Each lies in
[0, 1] before it is scaled so that all four together have an L2 norm of at most `METRIC_SHARE * clip_norm`; the rest
of the vector is clipped to what is left, so that the joint vector's norm is at most `clip_norm` and the metrics come
back unshrunk.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

NAMES = ("units", "loss", "targets", "clipped")
EVALUATION_NAMES = ("units", "loss")  # of an evaluation, whose vector is nothing but these
METRIC_SHARE = 0.1  # of the clip norm: what is left for the gradient is 0.995 of it
LOSS_CAP = 10.0  # nats a token; a uniform guess over 22,000 words


@dataclass(frozen=True, slots=True)
class MetricSums:
    """What the sum of a cohort's metric coordinates says: means over the units that took part, noised."""

    loss: float  # nats a token, each unit's capped at LOSS_CAP
    loss_error: float  # one standard deviation of the noise in it
    mean_targets: float  # trained tokens of a unit
    clipped_fraction: float
    clipped_fraction_error: float


def room_for_vector(clip_norm: float) -> float:
    """The norm that is left for a unit's gradient or update beside its metrics."""
    return clip_norm * math.sqrt(1 - METRIC_SHARE**2)


def capped(losses: ArrayLike) -> NDArray[np.float64]:
    """Within [0, LOSS_CAP]; what is not a number counts as the cap."""
    return np.asarray(np.fmax(np.fmin(np.asarray(losses, np.float64), LOSS_CAP), 0.0))  # fmin prefers a number


def coordinates(
    losses: ArrayLike, targets: ArrayLike, clipped: ArrayLike, clip_norm: float, max_length: int
) -> NDArray[np.float64]:
    """Metric coordinates of n units, shape (n, 4). `losses` in nats a token; a loss that is not finite counts as the cap."""
    bounded = capped(losses)
    found = np.ones((*bounded.shape, len(NAMES)))
    found[..., 1] = bounded / LOSS_CAP
    found[..., 2] = np.minimum(np.maximum(np.asarray(targets, np.float64) / max_length, 0.0), 1.0)
    found[..., 3] = clipped
    found *= _step(clip_norm)
    return found


def evaluation_coordinates(losses: ArrayLike, clip_norm: float) -> NDArray[np.float64]:
    """What n units say of their losses in an evaluation, shape (n, 2): each of a norm of at most `clip_norm`."""
    bounded = capped(losses)
    return np.stack((np.ones_like(bounded), bounded / LOSS_CAP), axis=-1) * _evaluation_step(clip_norm)


def decode_evaluation(sums: NDArray[np.float64], clip_norm: float, noise_std: float) -> tuple[float, float] | None:
    """The units' mean loss, and one standard deviation of the noise in it; None where the noise drowns the count.

    `sums` is the decoded sum, shape (2,), `noise_std` that of the noise in each of its coordinates.
    """
    units, loss = (float(value) for value in sums / _evaluation_step(clip_norm))
    error = noise_std / _evaluation_step(clip_norm)
    if units <= 3 * error or units <= 0:
        return None
    return loss / units * LOSS_CAP, _error_of_ratio(loss / units, error / units) * LOSS_CAP


def expected_evaluation_error(num_units: float, clip_norm: float, noise_std: float) -> float:
    """What `decode_evaluation`'s error is for so many units, in nats a token, whose loss lies in the middle of its range."""
    return _error_of_ratio(0.5, noise_std / _evaluation_step(clip_norm) / num_units) * LOSS_CAP


def decode(sums: NDArray[np.float64], clip_norm: float, max_length: int, noise_std: float) -> MetricSums | None:
    """Means over the units from the decoded sum of their coordinates, shape (4,); None where the noise drowns the count.

    `noise_std` is the standard deviation of the noise in each decoded coordinate of the sum.
    """
    units, loss, targets, clipped = (float(value) for value in sums / _step(clip_norm))
    error = noise_std / _step(clip_norm)
    if units <= 3 * error or units <= 0:
        return None
    return MetricSums(
        loss=loss / units * LOSS_CAP,
        loss_error=_error_of_ratio(loss / units, error / units) * LOSS_CAP,
        mean_targets=targets / units * max_length,
        clipped_fraction=clipped / units,
        clipped_fraction_error=_error_of_ratio(clipped / units, error / units),
    )


def _error_of_ratio(ratio: float, relative_error: float) -> float:
    """First order: both the sum and the count that divides it carry the same noise."""
    return relative_error * math.hypot(1.0, ratio)


def _evaluation_step(clip_norm: float) -> float:
    return clip_norm / math.sqrt(len(EVALUATION_NAMES))


def _step(clip_norm: float) -> float:
    return METRIC_SHARE * clip_norm / math.sqrt(len(NAMES))
