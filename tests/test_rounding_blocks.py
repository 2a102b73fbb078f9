"""What works in blocks gives the integers of the few lines that say what is meant: those stand here, and are slow."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini import vectors
from fedmini.errors import ConfigError, UpdateError
from fedmini.privacy import clipping, encoding, noise
from fedmini.privacy.noise import RandomStream

SIZES = st.sampled_from([1, 2, 3, 100, 8191, 8192, 8193, 20_000])
SEEDS = st.integers(0, 2**32)


def plain_rounding(scaled: np.ndarray, norm_bound: float, stream: RandomStream) -> np.ndarray:
    """Rounding a whole vector at once, with the coins of one draw after the other."""
    largest_square = math.floor(Fraction(norm_bound) ** 2)
    floors = np.floor(scaled)
    for _ in range(encoding.MAX_REDRAWS):
        coins = (stream.uint64(scaled.size) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        rounded = floors.astype(np.int64) + (coins < scaled - floors)
        if sum(int(x) ** 2 for x in rounded) <= largest_square:
            return rounded
    return np.trunc(scaled).astype(np.int64)


def plain_discrete_gaussian(variance: int, size: int, stream: RandomStream) -> np.ndarray:
    """The same staircase, with a division and a search for each block, and an exponential for each coin."""
    staircase = noise._staircase(variance)
    accepted = np.zeros(0, np.int64)
    while accepted.size < size:
        left = size - accepted.size
        num_proposals = min(noise.CHUNK_SIZE, left * 33 // 32 + 64)
        drawn = stream.below(int(staircase.ends[-1]), num_proposals)
        blocks = np.searchsorted(staircase.ends, drawn, side="right")
        words = stream.uint64(num_proposals)
        places = (words & np.uint64(2**staircase.width_bits - 1)).astype(np.int64)
        integers = ((blocks - staircase.num_negative) << staircase.width_bits) + places
        coins = words >> np.uint64(64 - noise.COIN_BITS)
        kept = noise._accept(staircase, integers, staircase.weights[blocks], coins, stream)
        accepted = np.concatenate([accepted, integers[kept][:left]])
    return accepted


def a_vector(size: int, norm: float, seed: int) -> np.ndarray:
    vector = (np.random.default_rng(seed).normal(size=size)).astype(np.float32)
    return (vector * np.float32(norm / np.linalg.norm(vector.astype(np.float64)))).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.floats(0.5, 1e5), st.integers(1, 3), SEEDS)
def test_a_sum_of_rounded_units_is_that_of_whole_vectors_rounded_one_after_the_other(size, reach, num, seed) -> None:
    rows = np.stack([a_vector(size, 1.0, seed + index) for index in range(num)])
    bound = encoding.sensitivity(1.001, reach, size)
    stream, again = RandomStream.seeded(seed), RandomStream.seeded(seed)
    expected = sum(plain_rounding(row.astype(np.float64) * reach, bound, stream) for row in rows)
    np.testing.assert_array_equal(encoding.round_sum(rows, reach, bound, again), expected)
    assert stream.uint64(1) == again.uint64(1)  # as many words were drawn


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([400, 8192, 9000]), st.sampled_from([0.5, -0.5]), st.floats(0.98, 1.02), SEEDS)
def test_what_is_redrawn_is_redrawn_from_the_same_words(size, half, tightness, seed) -> None:
    """Halves lengthen most: at a bound of sqrt(size / 2), about every second draw is refused."""
    vector = np.full(size, half)
    bound = tightness * math.sqrt(size / 2)
    stream, again = RandomStream.seeded(seed), RandomStream.seeded(seed)
    expected = plain_rounding(vector, bound, stream)
    np.testing.assert_array_equal(encoding.round_stochastically(vector, 1.0, bound, again), expected)
    assert stream.uint64(1) == again.uint64(1)


def test_a_refused_draw_leaves_nothing_in_the_sum() -> None:
    """Two units of halves, the second of which is redrawn until it is zeros: the first stays as it was."""
    first, second = np.full(8200, 0.25), np.full(8200, 0.5)
    bound = 45.3  # 90.6 of a draw of the second's norm is 64, and its own 45.28
    total = encoding.IntegerSum(8200, 1.0, bound, RandomStream.seeded(5))
    total.add((first, 1.0))
    before = total.integers
    total.add((second, 1.0))
    assert before.any() and np.array_equal(total.integers, before)


CORNERS = [0.0, -0.0, 1.0, -1.0, 2.0**-53, -(2.0**-53), -(2.0**-54), -0.75 * 2.0**-53, 1e-300, -1e-300, 5e-324, -5e-324]
CORNERS += [1 - 2.0**-53, -1 + 2.0**-53, 8192.0, 8192 + 2.0**-40, -8192 - 2.0**-40, 0.5, -0.5, 1 / 3, -1 / 3]


class Words:
    """A stream whose words are given."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def uint64(self, size: int, scratch: np.ndarray | None = None) -> np.ndarray:
        assert size == self._words.size
        return self._words.copy()


@given(
    st.sampled_from(CORNERS) | st.floats(-1e4, 1e4),
    st.sampled_from([0, 1, 2**53 - 1, 2**53 - 2, 2**52, 2**52 - 1]) | st.integers(0, 2**53 - 1),
    st.integers(-2, 2),
)
def test_a_coin_on_or_beside_its_fraction_decides_as_the_comparison_with_it_does(number, coin, beside) -> None:
    fraction = number - math.floor(number)
    near = min(max(int(fraction * 2**53) + beside, 0), 2**53 - 1)
    for chosen in (coin, near):
        words = Words(np.array([chosen << 11], np.uint64))
        (found,) = encoding.round_stochastically(np.array([number]), 1.0, 2e4, words)  # type: ignore[arg-type]
        assert found == math.floor(number) + (chosen * 2.0**-53 < fraction)


def test_a_unit_comes_in_parts_each_with_its_factor() -> None:
    """A gradient that is clipped to half, and metrics behind it; and one that is not finite, which is zeros."""
    gradient, behind = np.array([2.0, -4.0, 6.0], np.float32), np.array([1.0, 3.0])
    total = encoding.IntegerSum(5, 2.0, 100.0, RandomStream.seeded(6))
    total.add((gradient, 0.5), (behind, 1.0))
    assert total.integers.tolist() == [2, -4, 6, 2, 6]
    total.add((np.array([np.nan, np.inf, 1.0], np.float32), 0.0), (behind, 1.0))
    assert total.integers.tolist() == [2, -4, 6, 4, 12]
    total.clear()
    assert not total.integers.any()


@pytest.mark.parametrize("last", [np.nan, np.inf, 100.0])
def test_a_unit_that_is_refused_leaves_the_sum_as_it_was(last: float) -> None:
    unit = np.ones(9000)
    total = encoding.IntegerSum(9000, 1.0, 100.0, RandomStream.seeded(7))
    total.add((unit, 1.0))
    with pytest.raises(UpdateError, match="clip it first"):
        total.add((np.append(unit[1:], last), 1.0))
    assert np.array_equal(total.integers, unit)


def test_a_bound_whose_square_float64_does_not_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower the scale"):
        encoding.IntegerSum(1, 1.0, 2.0**25 + 1, RandomStream.seeded(8))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.floats(1e-30, 1e30), st.floats(1e-3, 1e3))
def test_the_norm_in_blocks_is_the_norm_to_twelve_digits_and_clips_as_clip_does(size, norm, clip_norm) -> None:
    vector = a_vector(size, norm, size)
    found = vectors.norm(vector)
    assert found == pytest.approx(float(np.linalg.norm(vector.astype(np.float64))), rel=1e-12)
    factor = clipping.factor(found, clip_norm)
    np.testing.assert_allclose(vector * np.float64(factor), clipping.clip(vector, clip_norm), rtol=1e-12)
    assert vectors.norm(vector) * factor <= clip_norm * (1 + 1e-6)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([1, 2, 9, 256, 257, 10_007, 2556**2, 21_000**2 + 5, 2**40 + 1, noise.MAX_VARIANCE])
    | st.integers(1, 2**44),
    st.sampled_from([0, 1, 5, 3900, 3970, 4096, 63_500, 63_600, 140_000]),
    SEEDS,
)
def test_the_noise_is_that_of_a_search_for_each_block_and_an_exponential_for_each_coin(variance, size, seed) -> None:
    stream, again = RandomStream.seeded(seed), RandomStream.seeded(seed)
    expected = plain_discrete_gaussian(variance, size, stream)
    np.testing.assert_array_equal(noise.discrete_gaussian(variance, size, again), expected)
    assert stream.uint64(1) == again.uint64(1)


@pytest.mark.parametrize("variance", [1, 2, 255, 256, 2556**2, 2**40, noise.MAX_VARIANCE])
def test_a_sure_coin_keeps_the_integer_of_its_block_that_is_farthest_from_zero(variance: int) -> None:
    staircase = noise._staircase(variance)
    width = 2**staircase.width_bits
    starts = np.arange(-staircase.num_negative, staircase.num_negative) * width
    farthest = np.where(starts >= 0, starts + width - 1, starts)
    coins = staircase.sure_coins - np.uint64(1)
    some = np.flatnonzero(staircase.sure_coins > 0)
    for index in some[:: max(1, some.size // 200)]:
        assert noise._accept_exactly(
            variance, int(farthest[index]), int(staircase.weights[index]), int(coins[index]), RandomStream.seeded(0)
        )
    assert some.size


@pytest.mark.parametrize("variance", [1, 257, 21_000**2 + 5, noise.MAX_VARIANCE])
def test_the_guide_names_the_block_of_every_word_in_its_cell(variance: int) -> None:
    ends, guide = noise._staircase(variance).ends, noise._guide(variance)
    words = RandomStream.seeded(variance, "guide").uint64(200_000)
    cells = np.arange(2**noise.GUIDE_BITS, dtype=np.uint64) << np.uint64(48)
    words = np.concatenate([words, cells, cells + np.uint64(2**48 - 1)])
    named = guide[(words >> np.uint64(48)).astype(np.int64)]
    blocks = np.searchsorted(ends, words % ends[-1], side="right")
    assert np.all((named == blocks) | (named == -1))
    assert (named == -1).mean() < 0.1


@given(st.integers(0, 40_000), st.integers(0, 40_000))
@settings(max_examples=20, deadline=None)
def test_words_drawn_in_pieces_are_those_drawn_at_once(first: int, second: int) -> None:
    whole, pieces = RandomStream.seeded(9), RandomStream.seeded(9)
    scratch = np.empty(second + noise.SPARE_WORDS, np.uint64)
    together = np.concatenate([pieces.uint64(first), pieces.uint64(second, scratch)])
    np.testing.assert_array_equal(together, whole.uint64(first + second))


def test_a_unit_of_another_size_never_enters_a_sum() -> None:
    """Coordinates that it lacks would be those of whatever the memory held before."""
    total = encoding.IntegerSum(4, 1.0, 100.0, RandomStream.seeded(1))
    for size in (2, 3, 5):
        with pytest.raises(UpdateError, match=f"expected a unit of 4 coordinates, got {size}"):
            total.add((np.ones(size), 1.0))
    assert not total.integers.any()


def test_a_unit_that_is_past_its_bound_by_a_floats_last_digit_is_refused() -> None:
    with pytest.raises(UpdateError, match="clip it first"):
        encoding.round_stochastically(np.ones(3), 1.0, math.sqrt(3), RandomStream.seeded(1))
