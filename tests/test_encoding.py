import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmini.errors import ConfigError, UpdateError
from fedmini.privacy import clipping, encoding
from fedmini.privacy.noise import RandomStream

CLIP = 1.0
finite_vectors = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e3, 1e3))
seeds = st.integers(0, 2**32)


def halves(reach: int) -> np.ndarray:
    """The vector of norm `reach` that rounding lengthens most: every coordinate is a half."""
    return np.full(4 * reach**2, 0.5)


def test_the_clip_norm_is_8192_integers_and_16384_above_half_a_million_coordinates():
    assert 0.7 * encoding.scale_for(0.7, 2**19) == pytest.approx(2**13, rel=1e-15)
    assert 0.7 * encoding.scale_for(0.7, 2**19 + 1) == pytest.approx(2**14, rel=1e-15)


def test_the_sensitivity_is_the_smaller_of_the_two_bounds():
    # d = 4, C s = 100: (100 + 2)**2 = 10404 against 10000 + 1 + (100 + 1) = 10102
    assert encoding.sensitivity(1.0, 100.0, 4) == pytest.approx(math.sqrt(10102))
    # d = 1, C s = 0.1: 1.21 against 0.01 + 0.25 + 0.6
    assert encoding.sensitivity(1.0, 0.1, 1) == pytest.approx(math.sqrt(0.86))
    # d = 4, C s = 0.001: 2.001**2 = 4.004 against 1 + 1.001: never more than the deterministic bound
    assert encoding.sensitivity(1.0, 0.001, 4) <= 2.001


@given(finite_vectors, st.floats(0.5, 300), seeds)
def test_the_integer_norm_never_passes_the_sensitivity(vector, scale, seed):
    bound = encoding.sensitivity(CLIP, scale, vector.size)
    rounded = encoding.round_stochastically(clipping.clip(vector, CLIP), scale, bound, RandomStream.seeded(seed))
    assert rounded.dtype == np.int64
    assert sum(int(x) ** 2 for x in rounded) <= bound**2
    assert np.all(np.abs(rounded - clipping.clip(vector, CLIP) * scale) <= 1)


def test_the_norm_stays_within_the_bound_on_the_hardest_vector():
    vector, stream = halves(8), RandomStream.seeded(1)
    bound = encoding.sensitivity(8.0, 1.0, vector.size)
    for _ in range(300):
        assert np.linalg.norm(encoding.round_stochastically(vector, 1.0, bound, stream)) <= bound


def test_twin_without_the_check_the_hardest_vector_passes_the_bound():
    vector, stream = halves(8), RandomStream.seeded(1)
    bound = encoding.sensitivity(8.0, 1.0, vector.size)
    unchecked = [np.floor(vector + stream.uniform(vector.size)) for _ in range(300)]
    assert any(np.linalg.norm(rounded) > bound for rounded in unchecked)


def test_a_bound_that_no_draw_can_keep_ends_in_rounding_towards_zero():
    vector = np.array([-2.5, 2.5, 0.5, 0.5])
    rounded = encoding.round_stochastically(vector, 1.0, 3.7, RandomStream.seeded(2))
    assert np.linalg.norm(rounded) <= 3.7
    # Its own norm is 3.61, sqrt(13): any draw that keeps it has at most one coordinate away from zero.
    tight = np.full(400, 0.5)  # norm 10; a draw has norm sqrt(200), 14.1, and 10.0 is 10 standard deviations off
    np.testing.assert_array_equal(
        encoding.round_stochastically(tight, 1.0, 10.0, RandomStream.seeded(3)), np.zeros(400, np.int64)
    )


def test_rounding_is_right_on_average():
    vector = np.array([0.3, -0.25, 2.75, -1.0])
    stream = RandomStream.seeded(4)
    mean = np.mean([encoding.round_stochastically(vector, 1.0, 5.0, stream) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(mean, vector, atol=4 * 0.5 / math.sqrt(4000))


@pytest.mark.parametrize("vector", [np.array([3.0, 4.01]), np.array([np.nan, 0.0]), np.array([np.inf, 0.0])])
def test_a_vector_that_was_not_clipped_is_refused(vector):
    with pytest.raises(UpdateError, match="clip it first"):
        encoding.round_stochastically(vector, 1.0, 5.0, RandomStream.seeded(5))


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(1, 30), seeds)
def test_one_example_more_changes_the_sum_by_at_most_the_sensitivity(num_others, num_coordinates, seed):
    stream = RandomStream.seeded(seed, "rows")
    rows = np.stack([clipping.clip(stream.uniform(num_coordinates) - 0.5, CLIP) for _ in range(num_others + 1)])
    bound = encoding.sensitivity(CLIP, 64.0, num_coordinates)
    without = encoding.round_sum(rows[:-1], 64.0, bound, RandomStream.seeded(seed))
    with_it = encoding.round_sum(rows, 64.0, bound, RandomStream.seeded(seed))
    assert np.linalg.norm(with_it - without) <= bound


def test_twin_rounding_the_float_sum_moves_neighbours_further_apart_than_the_sensitivity():
    reach, num_coordinates = 16.0, 4096
    other, example = np.full(num_coordinates, 0.25), np.full(num_coordinates, reach / 64)
    assert np.linalg.norm(example) == reach
    bound = encoding.sensitivity(reach, 1.0, num_coordinates)
    distances = []
    for seed in range(20):
        stream = RandomStream.seeded(seed)
        without = np.floor(other + stream.uniform(num_coordinates))
        with_it = np.floor(other + example + stream.uniform(num_coordinates))
        distances.append(np.linalg.norm(with_it - without))
    assert min(distances) > bound
    # Each by itself: the difference is the example's own rounding, which is checked.
    rows = np.stack([other, example])
    for seed in range(20):
        without = encoding.round_sum(rows[:1], 1.0, bound, RandomStream.seeded(seed))
        with_it = encoding.round_sum(rows, 1.0, bound, RandomStream.seeded(seed))
        assert np.linalg.norm(with_it - without) <= bound


def test_no_rows_sum_to_zeros_and_float32_rows_are_as_good_as_float64():
    stream = RandomStream.seeded(6)
    np.testing.assert_array_equal(encoding.round_sum(np.zeros((0, 3), np.float32), 10.0, 11.0, stream), np.zeros(3))
    rows = np.array([[0.5, 0.0], [0.25, -0.5]], np.float32)  # whole numbers at scale 4
    np.testing.assert_array_equal(encoding.round_sum(rows, 4.0, 5.0, stream), [3, -2])


def test_a_hundred_devices_fit_into_24_bits_and_their_examples_into_32():
    assert encoding.modulus_bits(1.0, 8192.0, 100, None, 2.0, 70) == 24  # 2 (100 * 8193 + 137065): 21 bits
    assert encoding.modulus_bits(1.0, 8192.0, 100, 24.0, 2.0, 70) == 32
    with pytest.raises(ConfigError, match="32 bits"):
        encoding.modulus_bits(1.0, 8192.0, 10_000, 1000.0, 2.0, 7000)


@given(
    st.integers(1, 2000),
    st.none() | st.floats(0.1, 200),
    st.floats(0.01, 100),
    st.floats(0.01, 1.0),
    st.sampled_from([2.0**13, 2.0**14]),
)
def test_the_largest_sum_that_is_planned_for_is_read_back_exactly(num_devices, batch, multiplier, honest, reach):
    num_shares = max(1, int(num_devices * honest))
    try:
        bits = encoding.modulus_bits(2.0, reach / 2, num_devices, batch, multiplier, num_shares)
    except ConfigError:
        return
    units = 1.0 if batch is None else batch + 10 * math.sqrt(batch)
    largest = math.floor(
        num_devices * units * (reach + 1) + 7 * multiplier * reach * math.sqrt(num_devices / num_shares) - 1
    )
    for value in (largest, -largest):
        assert encoding.unwrap(encoding.wrap(np.array([value]), bits), bits)[0] == value


def test_twin_in_the_smaller_modulus_a_sum_that_needs_the_larger_one_is_misread():
    largest = np.array([2 * 100 * 73 * 8193 // 2])
    assert encoding.modulus_bits(1.0, 8192.0, 100, 24.0, 2.0, 70) == 32
    assert encoding.unwrap(encoding.wrap(largest, 32), 32)[0] == largest[0]
    assert encoding.unwrap(encoding.wrap(largest, 24), 24)[0] != largest[0]


@given(
    hnp.arrays(np.int64, (7, 4), elements=st.integers(-(2**20), 2**20)),
    st.sampled_from([24, 32]),
)
def test_the_sum_of_residues_is_the_residue_of_the_sum(vectors, bits):
    total = np.zeros(4, np.uint32)
    for vector in vectors:
        total = encoding.add(total, encoding.wrap(vector, bits), bits)
        assert total.dtype == np.uint32
        assert np.all(total.astype(np.int64) < 2**bits)
    np.testing.assert_array_equal(encoding.unwrap(total, bits), vectors.sum(axis=0))
