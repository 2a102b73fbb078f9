"""L2 clipping of one unit's vector, before anything else happens to it."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmini.errors import ConfigError


def factor(norm: float, clip_norm: float) -> float:
    """What a vector of this L2 norm is multiplied by, so that its norm is at most `clip_norm`: 1 where it is already.

    0 where the norm is not finite: such a vector is to be taken for zeros, and is still released, with its noise.
    Guarantee: the norm is <= clip_norm * (1 + 1e-6) afterwards, where it was taken in float64 (`vectors.norm`).
    """
    _check(clip_norm)
    if norm <= clip_norm:
        return 1.0
    return clip_norm / norm if math.isfinite(norm) else 0.0


def clip(vector: NDArray[np.floating[Any]], clip_norm: float) -> NDArray[np.float64]:
    """Scale a vector down so that its L2 norm is at most `clip_norm`.

    Shape (num_coordinates,), any float in, float64 out; the norm is taken in float64 over all coordinates as one
    (arXiv:1710.06963), and can't overflow. Guarantee: norm <= clip_norm * (1 + 1e-6), and a vector within the norm is
    unchanged. A zero vector stays zero. A non-finite vector gives zeros: it is still released, with its noise.
    """
    return _clip(vector, clip_norm)[0]


def clip_rows(rows: NDArray[np.floating[Any]], clip_norm: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`clip` for each row of (num_units, num_coordinates), and whether it was scaled down, (num_units,).

    A row that is not finite gives zeros, and counts as clipped.
    """
    clipped, was_clipped = np.empty(rows.shape), np.empty(len(rows), np.bool_)
    for index, row in enumerate(rows):
        clipped[index], was_clipped[index] = _clip(row, clip_norm)
    return clipped, was_clipped


def _clip(vector: NDArray[np.floating[Any]], clip_norm: float) -> tuple[NDArray[np.float64], bool]:
    _check(clip_norm)
    values = np.array(vector, dtype=np.float64)
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0.0:
        return values, False
    if not math.isfinite(largest):
        return np.zeros_like(values), True
    direction = values / largest  # its norm lies between 1 and sqrt(num_coordinates), whatever the vector's is
    direction_norm = float(np.linalg.norm(direction))
    if largest <= clip_norm / direction_norm:
        return values, False
    direction *= clip_norm / direction_norm
    return direction, True


def _check(clip_norm: float) -> None:
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ConfigError(f"clip_norm must be a positive number, got {clip_norm}")
