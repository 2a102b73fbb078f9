"""Exact discrete Gaussian noise, and the cryptographic stream that every random choice is drawn from.

The sampler below is rejection from a staircase. The integers are cut into blocks of equal width; a block is chosen
with an integer weight that is at least the largest value of 2**54 exp(-x**2 / 2 variance) in it, then an integer x
uniformly within the block, and x is kept with probability 2**54 exp(-x**2 / 2 variance) / weight. What is kept has the
discrete Gaussian's law exactly. Floats only decide a coin that isn't within 2**-40 of its threshold, far beyond their
error; the others (one in 2**39) are decided with 240 random bits against 100 decimal digits. Two deviations are left:
the support ends 14 standard deviations out (total variation below 2**-140 a coordinate), and a coin is misjudged
with probability 2**-239. So the result is the same on every machine, whatever its exp() does in the last digit.
"""

import decimal
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmini.errors import CohortError, ConfigError
from fedmini.types import IntVector

Words = NDArray[np.uint64]

MAX_VARIANCE = 2**44  # squares of 14 standard deviations are then exact in float64
CHUNK_SIZE = 2**16  # proposals at once: they stay in the processor's cache
COIN_BITS = 48  # of an acceptance word; the 16 below place x within its block, whose width is at most 2**16
COIN_MARGIN = 2.0 ** (COIN_BITS - 40)


class RandomStream:
    """A stream of random bits: the key stream of AES-256 in counter mode.

    A stream belongs to one thread, and not to a forked child as well: both would draw the same bits.
    """

    __slots__ = ("_key_stream", "is_seeded")

    def __init__(self, key: bytes, is_seeded: bool) -> None:
        self._key_stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self.is_seeded = is_seeded

    @classmethod
    def from_os(cls) -> Self:
        """A stream with a fresh key from the operating system: the only kind that protects anyone."""
        return cls(os.urandom(32), is_seeded=False)

    @classmethod
    def seeded(cls, seed: int, *labels: str | int) -> Self:
        """A reproducible stream, for simulations and tests. Different labels give unrelated streams."""
        text = json.dumps(["fedmini/stream/v1", seed, *labels], separators=(",", ":"))  # quotes tell "1" from 1
        return cls(hashlib.sha256(text.encode()).digest(), is_seeded=True)

    def __repr__(self) -> str:
        return f"RandomStream(is_seeded={self.is_seeded})"

    def uint64(self, size: int) -> Words:
        """`size` uniform 64-bit words."""
        return np.frombuffer(self._key_stream.update(bytes(8 * size)), dtype="<u8").astype(np.uint64, copy=False)

    def below(self, bound: int | Words, size: int | None = None) -> Words:
        """Exactly uniform integers in [0, bound): `size` of them, or one for each element of an array of bounds."""
        bounds = np.asarray(bound, dtype=np.uint64)
        if not np.all(bounds > 0):
            raise ConfigError("a uniform draw needs a bound of at least 1, got 0")
        if bounds.ndim == 0:
            bounds = np.broadcast_to(bounds, (1 if size is None else size,))
        drawn = np.empty(bounds.shape, dtype=np.uint64)
        surplus = (np.uint64(0) - bounds) % bounds  # 2**64 mod bound: so many words would favour the small results
        missing = np.arange(bounds.size)
        while missing.size:
            words = self.uint64(missing.size)
            fair = words >= surplus[missing]
            drawn[missing[fair]] = words[fair] % bounds[missing[fair]]
            missing = missing[~fair]
        return drawn

    def uniform(self, size: int) -> NDArray[np.float64]:
        """`size` uniform multiples of 2**-53 in [0, 1)."""
        return (self.uint64(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def subset(self, population_size: int, subset_size: int) -> IntVector:
        """`subset_size` of range(population_size), sorted; every such subset is equally likely."""
        if subset_size > population_size:
            raise CohortError(f"can't draw {subset_size} of {population_size} without replacement")
        while True:
            words = self.uint64(population_size)
            if np.unique(words).size == population_size:  # a tie would favour somebody
                return np.sort(np.argsort(words)[:subset_size])

    def poisson_sample(self, population_size: int, sampling_rate: float) -> IntVector:
        """Indices, each of range(population_size) independently with probability `sampling_rate`.

        The probability is rounded down to a multiple of 2**-64: never above the rate that is accounted for.
        """
        if not 0 <= sampling_rate <= 1:
            raise ConfigError(f"sampling_rate must be between 0 and 1, got {sampling_rate}")
        words = self.uint64(population_size)
        threshold = math.floor(math.ldexp(sampling_rate, 64))
        sampled = np.ones(words.shape, np.bool_) if threshold == 2**64 else words < np.uint64(threshold)
        return np.flatnonzero(sampled).astype(np.int64)


Streams = Callable[..., RandomStream]
"""Where randomness comes from: called with labels that say what it is for (`"rounding"`, step), it gives a stream."""


def discrete_gaussian(variance: int, size: int, stream: RandomStream) -> IntVector:
    """`size` independent integers, each x with probability proportional to exp(-x**2 / (2 * variance)).

    Exact up to a total variation of 2**-140 a coordinate, as argued at the top of this module. The variance is any
    integer from 1 to MAX_VARIANCE, otherwise ConfigError. The time taken depends on what is drawn, very little: draw
    the whole vector before any message is sent.
    """
    if not 1 <= variance <= MAX_VARIANCE:
        raise ConfigError(f"the noise variance must be an integer from 1 to 2**44, got {variance}")
    staircase = _staircase(variance)
    drawn = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        num_proposals = min(CHUNK_SIZE, (size - filled) * 33 // 32 + 64)
        accepted = _propose(staircase, num_proposals, stream)[: size - filled]
        drawn[filled : filled + accepted.size] = accepted
        filled += accepted.size
    return drawn


@dataclass(frozen=True, slots=True)
class _Staircase:
    """Integer weights that lie above a discrete Gaussian's mass, block by block."""

    variance: int
    width_bits: int  # a block is 2**width_bits integers
    num_negative: int  # blocks below zero, and as many above
    weights: NDArray[np.float64]  # (2 * num_negative,), integers
    ends: Words  # (2 * num_negative,), their running sums


@functools.lru_cache(maxsize=64)
def _staircase(variance: int) -> _Staircase:
    sigma = math.isqrt(variance - 1) + 1
    width_bits = max(0, (sigma // 64).bit_length() - 1)  # blocks of 1/64 to 1/128 sigma: under 1 % is refused
    width = 2**width_bits
    num_negative = 14 * sigma // width + 2
    starts = np.arange(-num_negative, num_negative) * width
    nearest = np.where(starts >= 0, starts, 1 - starts - width).astype(np.float64)  # to zero, of a block's integers
    # exp() is right to a few units in the last place; a factor of 1 + 2**-40 above it is certainly not below.
    weights = np.ceil(2.0**54 * (1 + 2.0**-40) * np.exp(-(nearest**2) / (2 * variance)))
    ends = np.cumsum(weights.astype(np.uint64))  # below 2**63: at most 2**54 * 2.51 * 128, and 1 for each far block
    return _Staircase(variance, width_bits, num_negative, weights, ends)


def _propose(staircase: _Staircase, num_proposals: int, stream: RandomStream) -> IntVector:
    ends = staircase.ends
    blocks = np.searchsorted(ends, stream.below(int(ends[-1]), num_proposals), side="right")
    words = stream.uint64(num_proposals)
    places = (words & np.uint64(2**staircase.width_bits - 1)).astype(np.int64)
    integers = ((blocks - staircase.num_negative) << staircase.width_bits) + places
    accepted = _accept(staircase, integers, staircase.weights[blocks], words >> np.uint64(64 - COIN_BITS), stream)
    return integers[accepted]


def _accept(
    staircase: _Staircase,
    integers: IntVector,
    weights: NDArray[np.float64],
    coins: Words,
    stream: RandomStream,
    *,
    margin: float = COIN_MARGIN,
) -> NDArray[np.bool_]:
    squares = (integers * integers).astype(np.float64)
    thresholds = np.exp(squares / (-2.0 * staircase.variance)) * (2.0 ** (54 + COIN_BITS) / weights)
    distances = thresholds - coins.astype(np.float64)
    accepted: NDArray[np.bool_] = distances > 0
    for i in np.flatnonzero(np.abs(distances - 0.5) <= margin + 0.5):
        accepted[i] = _accept_exactly(staircase.variance, int(integers[i]), int(weights[i]), int(coins[i]), stream)
    return accepted


def _accept_exactly(variance: int, integer: int, weight: int, coin: int, stream: RandomStream) -> bool:
    """Whether a uniform number that begins with the bits of `coin` is below the probability of keeping `integer`."""
    for word in stream.uint64(3):
        coin = coin << 64 | int(word)
    with decimal.localcontext(decimal.Context(prec=100, Emin=-(10**6), Emax=10**6)):
        density = (decimal.Decimal(-integer * integer) / (2 * variance)).exp()
        return bool(decimal.Decimal(coin) * weight < density * 2 ** (54 + COIN_BITS + 192))
