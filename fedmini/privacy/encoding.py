"""Float vectors <-> integers: rounding with a checked norm, and the modulus in which the integers are summed.

One unit's vector is rounded by itself, and its integer norm is checked: that number, `sensitivity`, is what the
accountant divides by. Sums are never clipped or rounded (docs/accounting.md, "Each unit is rounded by itself").
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmini.errors import ConfigError, UpdateError
from fedmini.privacy.noise import SPARE_WORDS, RandomStream
from fedmini.types import IntVector, Residues
from fedmini.vectors import BLOCK_SIZE

MAX_REDRAWS = 200  # at 0.61 a refusal, 1e-43 of the vectors come this far
LARGE_VECTOR = 2**19  # coordinates; from here on the grid is made finer
LARGEST_BOUND = 2**25  # of an integer norm
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


class IntegerSum:
    """The sum of clipped units, each scaled and rounded by itself first: zeros until one is added.

    Shape (num_coordinates,). Guarantee: one unit more or less, with the other units' coins as they are, changes the sum by
    at most `norm_bound` in L2. Rounding the float sum instead would break that: the two sums would be rounded with
    unrelated fractions. A `norm_bound` above 2**25 raises ConfigError: float64 would not hold its square exactly.
    """

    def __init__(self, num_coordinates: int, scale: float, norm_bound: float, stream: RandomStream) -> None:
        if not norm_bound <= LARGEST_BOUND:
            raise ConfigError(f"expected an integer norm of at most 2**25, got {norm_bound:g}: lower the scale")
        self._scale, self._norm_bound, self._stream = scale, norm_bound, stream
        numerator, denominator = norm_bound.as_integer_ratio()
        self._largest_square = numerator**2 // denominator**2
        self._total = np.zeros(num_coordinates)  # integers
        self._with_next = np.empty(num_coordinates)  # the same and one unit more, which may yet be refused
        size = min(num_coordinates, BLOCK_SIZE)
        self._words = np.empty(size + SPARE_WORDS, np.uint64)
        self._scaled, self._coins, self._rounded = np.empty(size), np.empty(size), np.empty(size)
        self._is_equal = np.empty(size, np.bool_)

    @property
    def integers(self) -> IntVector:
        """The sum, int64: a copy."""
        return self._total.astype(np.int64)

    def clear(self) -> None:
        """Begin again, at zeros."""
        self._total.fill(0.0)

    def add(self, *parts: tuple[NDArray[np.floating[Any]], float]) -> None:
        """Add the unit whose coordinates are those of its parts, behind each other, each times its part's factor.

        A factor of 0 makes a part zeros, whatever is in it. The unit is rounded as `round_stochastically` says.
        """
        if (size := sum(coordinates.size for coordinates, _ in parts)) != self._total.size:
            raise UpdateError(f"expected a unit of {self._total.size} coordinates, got {size}")
        for _ in range(MAX_REDRAWS):
            if self._add_rounded(parts, self._round) <= self._largest_square:
                break
        else:
            if (
                self._add_rounded(parts, np.trunc) > self._largest_square
            ):  # by the last digit of a float: not of a clipped unit
                raise UpdateError("a vector that rounds past its bound even towards zero: clip it first")
        self._total, self._with_next = self._with_next, self._total

    def _add_rounded(
        self, parts: Sequence[tuple[NDArray[np.floating[Any]], float]], rounding: Callable[..., NDArray[np.float64]]
    ) -> float:
        """Put the sum with the unit in it, once rounded, into `_with_next`; the square of the unit's integer norm, exactly."""
        start, square, scaled_square = 0, 0.0, 0.0
        for scaled in self._scaled_blocks(parts):
            scaled_square += float(scaled @ scaled)
            if not math.sqrt(scaled_square) <= self._norm_bound:
                raise UpdateError(
                    f"expected a clipped vector of scaled norm <= {self._norm_bound:.1f}, got a larger one: clip it first"
                )
            rounded = rounding(scaled, out=self._rounded[: scaled.size])
            square += float(rounded @ rounded)  # integers below 2**53
            stop = start + scaled.size
            np.add(self._total[start:stop], rounded, out=self._with_next[start:stop])
            start = stop
        return square

    def _scaled_blocks(self, parts: Sequence[tuple[NDArray[np.floating[Any]], float]]) -> Iterator[NDArray[np.float64]]:
        for coordinates, factor in parts:
            for start in range(0, coordinates.size, BLOCK_SIZE):
                block = coordinates[start : start + BLOCK_SIZE]
                scaled = self._scaled[: block.size]
                if factor == 0:
                    scaled.fill(0.0)
                else:
                    np.multiply(block, np.float64(factor * self._scale), out=scaled)
                yield scaled

    def _round(self, scaled: NDArray[np.float64], out: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each number rounded up where a coin in [0, 1) is below its fraction: to the ceiling of number - coin.

        A float difference that is no integer lies between the same two integers as the exact one. Where one is, all of the
        block's fractions are compared with their coins.
        """
        words = self._stream.uint64(scaled.size, self._words)
        words >>= np.uint64(11)
        coins = self._coins[: scaled.size]
        coins[:] = words.view(np.int64)  # faster than from uint64
        coins *= 2.0**-53
        differences = np.subtract(scaled, coins, out=coins)
        np.ceil(differences, out=out)
        if np.count_nonzero(np.equal(out, differences, out=self._is_equal[: scaled.size])):
            floors = np.floor(scaled)
            np.add(floors, words * 2.0**-53 < scaled - floors, out=out)
        return out


def round_stochastically(
    vector: NDArray[np.floating[Any]], scale: float, norm_bound: float, stream: RandomStream
) -> IntVector:
    """Integers whose expectation is vector * scale, redrawn until their L2 norm is at most `norm_bound`.

    Shape (num_coordinates,). Guarantee: norm <= norm_bound, compared in exact integers, for every draw of the stream.
    The redrawing biases the expectation by less than 1e-3 of the norm. After MAX_REDRAWS it rounds towards zero, which
    can't pass the bound. A vector that isn't clipped (norm * scale > norm_bound, or not finite) raises UpdateError.
    """
    return round_sum(vector[None], scale, norm_bound, stream)


def round_sum(vectors: NDArray[np.floating[Any]], scale: float, norm_bound: float, stream: RandomStream) -> IntVector:
    """The sum of clipped rows, each rounded by itself first, as `IntegerSum` has it.

    Shape (num_units, num_coordinates) in, (num_coordinates,) out; no rows give zeros.
    """
    total = IntegerSum(vectors.shape[1], scale, norm_bound, stream)
    for row in vectors:
        total.add((row, 1.0))
    return total.integers


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
    residues: Residues = integers.astype(np.uint32)  # mod 2**32, a multiple of the modulus
    return _reduced(residues, bits)


def add(total: Residues, vector: Residues, bits: int) -> Residues:
    """The sum mod 2**bits of two vectors of residues."""
    residues: Residues = total + vector  # mod 2**32, a multiple of the modulus
    return _reduced(residues, bits)


def _reduced(residues: Residues, bits: int) -> Residues:
    """The residues mod 2**bits, in place."""
    if bits < 32:
        residues &= np.uint32(2**bits - 1)
    return residues


def unwrap(residues: Residues, bits: int) -> IntVector:
    """The integers nearest to zero with these residues: from -2**(bits - 1) to 2**(bits - 1) - 1."""
    integers = residues.astype(np.int64)
    return np.where(integers >= 2 ** (bits - 1), integers - 2**bits, integers)
