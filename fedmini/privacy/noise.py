"""Exact discrete Gaussian noise, and the cryptographic stream that every random choice is drawn from.

The sampler below is rejection from a staircase. The integers are cut into blocks of equal width; a block is chosen
with an integer weight that is at least the largest value of 2**54 exp(-x**2 / 2 variance) in it, then an integer x
uniformly within the block, and x is kept with probability 2**54 exp(-x**2 / 2 variance) / weight. What is kept has the
discrete Gaussian's law exactly. Floats only decide a coin that isn't within 2**-40 of its threshold, far beyond their
error; the others (one in 2**39) are decided with 240 random bits against 100 decimal digits. Two deviations are left:
the support ends 14 standard deviations out (total variation below 2**-140 a coordinate), and a coin is misjudged
with probability 2**-239. So the result is the same on every machine, whatever its exp() does in the last digit.

Two tables spare most of that work and change nothing that is drawn: by the first 16 bits of a word, the block it chooses;
by block, the coins that keep all of its integers.
"""

import decimal
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

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
GUIDE_BITS = 16  # of a word: most often they say already which block it falls into
SPARE_WORDS = 2  # the cipher wants room for almost one block of 16 bytes more than it writes

_ZEROS = memoryview(bytes(2**16))  # encrypted, they are the key stream
_FROM_ZERO = modes.CTR(bytes(16))
_encode_labels = json.JSONEncoder(separators=(",", ":")).encode


class RandomStream:
    """A stream of random bits: the key stream of AES-256 in counter mode.

    A stream belongs to one thread, and not to a forked child as well: both would draw the same bits.
    """

    __slots__ = ("_key_stream", "is_seeded")

    def __init__(self, key: bytes, is_seeded: bool) -> None:
        self._key_stream = Cipher(algorithms.AES(key), _FROM_ZERO).encryptor()
        self.is_seeded = is_seeded

    @classmethod
    def from_os(cls) -> Self:
        """A stream with a fresh key from the operating system: the only kind that protects anyone."""
        return cls(os.urandom(32), is_seeded=False)

    @classmethod
    def seeded(cls, seed: int, *labels: str | int) -> Self:
        """A reproducible stream, for simulations and tests. Different labels give unrelated streams."""
        text = _encode_labels(["fedmini/stream/v1", seed, *labels])  # quotes tell "1" from 1
        return cls(hashlib.sha256(text.encode()).digest(), is_seeded=True)

    def __repr__(self) -> str:
        return f"RandomStream(is_seeded={self.is_seeded})"

    def uint64(self, size: int, scratch: Words | None = None) -> Words:
        """`size` uniform 64-bit words: the first of `scratch`, where it is given, which has room for SPARE_WORDS more."""
        words = np.empty(size + SPARE_WORDS, np.uint64) if scratch is None else scratch
        room = words.data.cast("B")
        for start in range(0, 8 * size, len(_ZEROS)):
            self._key_stream.update_into(_ZEROS[: 8 * size - start], room[start:])
        drawn = words[:size]
        return drawn if sys.byteorder == "little" else drawn.byteswap(inplace=True)

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
        words = self.uint64(size)
        words >>= np.uint64(11)
        drawn = words.astype(np.float64)
        drawn *= 2.0**-53
        return drawn

    def subset(self, population_size: int, subset_size: int) -> IntVector:
        """`subset_size` of range(population_size), sorted; every such subset is equally likely."""
        if subset_size > population_size:
            raise CohortError(f"can't draw {subset_size} of {population_size} without replacement")
        while True:
            words = self.uint64(population_size)
            order = np.argsort(words)
            in_order = words[order]
            if not np.any(in_order[1:] == in_order[:-1]):  # a tie would favour somebody
                return np.sort(order[:subset_size])

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
    sure_coins: Words  # (2 * num_negative,): a coin below that keeps every integer of the block


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
    least = _thresholds(nearest + (width - 1), weights, variance)  # of the integer that is farthest from zero
    sure_coins = np.maximum(np.floor(least - 2 * COIN_MARGIN), 0).astype(np.uint64)
    return _Staircase(variance, width_bits, num_negative, weights, ends, sure_coins)


@functools.lru_cache(maxsize=16)
def _guide(variance: int) -> NDArray[np.intp]:
    """The block that all words with the same first GUIDE_BITS bits fall into; -1 where they fall into several.

    Shape (2**GUIDE_BITS,). A word falls into the block that holds its remainder by the sum of the weights.
    """
    ends = _staircase(variance).ends
    firsts = np.arange(2**GUIDE_BITS, dtype=np.uint64) << np.uint64(64 - GUIDE_BITS)
    lasts = firsts + np.uint64(2 ** (64 - GUIDE_BITS) - 1)
    blocks = np.searchsorted(ends, firsts % ends[-1], side="right")
    is_one = (firsts // ends[-1] == lasts // ends[-1]) & (
        blocks == np.searchsorted(ends, lasts % ends[-1], side="right")
    )
    return np.where(is_one, blocks, -1)


def _propose(staircase: _Staircase, num_proposals: int, stream: RandomStream) -> IntVector:
    blocks = _blocks(staircase, num_proposals, stream)
    coins = stream.uint64(num_proposals)
    integers = (coins & np.uint64(2**staircase.width_bits - 1)).view(np.int64)  # places within the block, yet
    coins >>= np.uint64(64 - COIN_BITS)
    accepted = coins < staircase.sure_coins.take(blocks)
    unsure = np.flatnonzero(~accepted)
    blocks_of_unsure = blocks.take(unsure)
    blocks -= staircase.num_negative
    blocks <<= staircase.width_bits
    integers += blocks
    weights = staircase.weights.take(blocks_of_unsure)
    accepted[unsure] = _accept(staircase, integers.take(unsure), weights, coins.take(unsure), stream)
    return integers[accepted]


def _blocks(staircase: _Staircase, num_proposals: int, stream: RandomStream) -> NDArray[np.intp]:
    """Blocks of the staircase, each drawn with its weight: those that hold uniform integers below the weights' sum."""
    ends = staircase.ends
    surplus = np.uint64(2**64 % int(ends[-1]))  # so many words would favour the first blocks
    words = stream.uint64(num_proposals)
    missing = np.flatnonzero(words < surplus)
    while missing.size:
        fresh = stream.uint64(missing.size)
        words[missing] = fresh
        missing = missing[fresh < surplus]
    blocks: NDArray[np.intp]
    if num_proposals < 2 ** (GUIDE_BITS - 4):  # a guide would cost more than it saves
        blocks = np.searchsorted(ends, words % ends[-1], side="right")
        return blocks
    blocks = _guide(staircase.variance).take((words >> np.uint64(64 - GUIDE_BITS)).view(np.int64))
    unsure = np.flatnonzero(blocks < 0)
    blocks[unsure] = np.searchsorted(ends, words.take(unsure) % ends[-1], side="right")
    return blocks


def _accept(
    staircase: _Staircase,
    integers: IntVector,
    weights: NDArray[np.float64],
    coins: Words,
    stream: RandomStream,
    *,
    margin: float = COIN_MARGIN,
) -> NDArray[np.bool_]:
    thresholds = _thresholds(integers, weights, staircase.variance)
    distances = thresholds - coins.astype(np.float64)
    accepted: NDArray[np.bool_] = distances > 0
    for i in np.flatnonzero(np.abs(distances - 0.5) <= margin + 0.5):
        accepted[i] = _accept_exactly(staircase.variance, int(integers[i]), int(weights[i]), int(coins[i]), stream)
    return accepted


def _thresholds(integers: NDArray[Any], weights: NDArray[np.float64], variance: int) -> NDArray[np.float64]:
    """What a coin must lie below for its integer to be kept, in a block of this weight; right to a factor 1 +- 2**-44."""
    squares = (integers * integers).astype(np.float64)
    thresholds: NDArray[np.float64] = np.exp(squares / (-2.0 * variance)) * (2.0 ** (54 + COIN_BITS) / weights)
    return thresholds


def _accept_exactly(variance: int, integer: int, weight: int, coin: int, stream: RandomStream) -> bool:
    """Whether a uniform number that begins with the bits of `coin` is below the probability of keeping `integer`."""
    for word in stream.uint64(3):
        coin = coin << 64 | int(word)
    with decimal.localcontext(decimal.Context(prec=100, Emin=-(10**6), Emax=10**6)):
        density = (decimal.Decimal(-integer * integer) / (2 * variance)).exp()
        return bool(decimal.Decimal(coin) * weight < density * 2 ** (54 + COIN_BITS + 192))
