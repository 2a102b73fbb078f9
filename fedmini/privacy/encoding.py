"""Float vectors <-> integers: rounding with a checked norm, and the modulus in which the integers are summed.

One unit's vector is rounded by itself, and its integer norm is checked: that number, `sensitivity`, is what the
accountant divides by. Sums are never clipped or rounded (docs/accounting.md, "Each unit is rounded by itself").
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmini.errors import ConfigError, UpdateError
from fedmini.privacy.noise import RandomStream
from fedmini.types import IntVector, Residues

MAX_REDRAWS = 200  # at 0.61 a refusal, 1e-43 of the vectors come this far
LARGE_VECTOR = 2**19  # coordinates; from here on the grid is made finer
MODULUS_BITS = (24, 32)
PLAIN_LEVELS = 2**20  # integers per range, for vectors that need no integer noise; less where many devices are summed


def scale_for(clip_norm: float, num_coordinates: int) -> float:
    """Integers per unit of the vector: clip_norm * scale is 2**13, above 2**19 coordinates 2**14.

    Fine enough that rounding costs below 1 % of the noise multiplier: accounting.plan_unit refuses where it doesn't.
    """
    return (2.0**14 if num_coordinates > LARGE_VECTOR else 2.0**13) / clip_norm


def plain_scale(norm: float, num_devices: int) -> float:
    """Integers per unit of vectors that nothing noises as integers: so many devices' sum fits 32 bits."""
    return min(PLAIN_LEVELS, 2**30 // num_devices) / norm


def sensitivity(clip_norm: float, scale: float, num_coordinates: int) -> float:
    """The bound on one unit's integer L2 norm, and so on what adding or removing it changes: D2 in the docs.

    A stochastically rounded vector of norm `clip_norm` stays below it with probability 1 - e**-0.5 at least
    (arXiv:2102.06387, Theorem 1); `round_stochastically` redraws until it does.
    """
    reach = clip_norm * scale
    worst_case = (reach + math.sqrt(num_coordinates)) ** 2
    likely = reach**2 + num_coordinates / 4 + (reach + math.sqrt(num_coordinates) / 2)  # sqrt(2 ln(1/beta)) = 1
    return math.sqrt(min(worst_case, likely))


def round_stochastically(
    vector: NDArray[np.float64], scale: float, norm_bound: float, stream: RandomStream
) -> IntVector:
    """Integers whose expectation is vector * scale, redrawn until their L2 norm is at most `norm_bound`.

    Shape (num_coordinates,). Guarantee: norm <= norm_bound, compared in exact integers, for every draw of the stream.
    The redrawing biases the expectation by less than 1e-3 of the norm. After MAX_REDRAWS it rounds towards zero, which
    can't pass the bound. A vector that isn't clipped (norm * scale > norm_bound, or not finite) raises UpdateError.
    """
    scaled = vector * scale
    if not np.linalg.norm(scaled) <= norm_bound:
        raise UpdateError(
            f"expected a clipped vector of scaled norm <= {norm_bound:.1f}, got a larger one: clip it first"
        )
    largest_square = math.floor(Fraction(norm_bound) ** 2)
    floors = np.floor(scaled)
    fractions = scaled - floors
    lower = floors.astype(np.int64)
    for _ in range(MAX_REDRAWS):
        rounded = lower + (stream.uniform(scaled.size) < fractions)
        if int(rounded @ rounded) <= largest_square:
            return rounded
    return np.trunc(scaled).astype(np.int64)


def round_sum(vectors: NDArray[np.floating[Any]], scale: float, norm_bound: float, stream: RandomStream) -> IntVector:
    """The sum of clipped rows, each rounded by itself first.

    Shape (num_units, num_coordinates) in, (num_coordinates,) out; no rows give zeros. Guarantee: one row more or less,
    with the other rows' coins as they are, changes the sum by at most `norm_bound` in L2. Rounding the float sum
    instead would break that: the two sums would be rounded with unrelated fractions.
    """
    total = np.zeros(vectors.shape[1], dtype=np.int64)
    for row in vectors:
        total += round_stochastically(row.astype(np.float64), scale, norm_bound, stream)
    return total


def modulus_bits(
    clip_norm: float,
    scale: float,
    num_devices: int,
    expected_examples: float | None,
    noise_multiplier: float,
    num_shares: int,
) -> int:
    """Bits of the modulus, 24 or 32, in which the sum of `num_devices` vectors and their noise can't be misread.

    `expected_examples`: the expected batch of one device where rounded examples are summed, None where the vector is
    one device's update. Leaves room for a batch 10 and a noise 7 standard deviations out; a wrap beyond that costs
    utility, never privacy. Raises ConfigError where 32 bits are too few.
    """
    reach = clip_norm * scale
    units = 1.0 if expected_examples is None else expected_examples + 10 * math.sqrt(expected_examples)
    signal = num_devices * units * (reach + 1)
    noise = 7 * noise_multiplier * reach * math.sqrt(num_devices / num_shares)
    for bits in MODULUS_BITS:
        if 2**bits >= 2 * (signal + noise):
            return bits
    raise ConfigError(
        f"a sum of {num_devices} devices with {units:.0f} units each at noise multiplier {noise_multiplier:g} needs "
        "more than 32 bits: lower rounds.cohort_size, local.expected_batch_size or the noise"
    )


def wrap(integers: IntVector, bits: int) -> Residues:
    """Integers mod 2**bits, uint32."""
    residues: Residues = (integers & (2**bits - 1)).astype(np.uint32)
    return residues


def add(total: Residues, vector: Residues, bits: int) -> Residues:
    """The sum mod 2**bits of two vectors of residues."""
    residues: Residues = (total + vector) & np.uint32(2**bits - 1)  # uint32 wraps at 2**32, a multiple of the modulus
    return residues


def unwrap(residues: Residues, bits: int) -> IntVector:
    """The integers nearest to zero with these residues: from -2**(bits - 1) to 2**(bits - 1) - 1."""
    integers = residues.astype(np.int64)
    return np.where(integers >= 2 ** (bits - 1), integers - 2**bits, integers)
