import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmini.errors import ConfigError
from fedmini.privacy import clipping

any_float = st.floats(width=64, allow_nan=True, allow_infinity=True)
vectors = hnp.arrays(np.float64, st.integers(0, 40), elements=any_float)
clip_norms = st.floats(1e-6, 1e6)


@given(vectors, clip_norms)
def test_no_vector_leaves_longer_than_the_clip_norm(vector, clip_norm):
    clipped = clipping.clip(vector, clip_norm)
    assert clipped.dtype == np.float64
    assert clipped.shape == vector.shape
    assert np.linalg.norm(clipped) <= clip_norm * (1 + 1e-6)


@given(hnp.arrays(np.float64, 5, elements=st.floats(-1e3, 1e3)), st.floats(1e-3, 1e6))
def test_a_vector_within_the_norm_is_unchanged_and_another_keeps_its_direction(vector, clip_norm):
    clipped = clipping.clip(vector, clip_norm)
    norm = np.linalg.norm(vector)
    if norm <= clip_norm * (1 - 1e-9):
        np.testing.assert_array_equal(clipped, vector)
    else:
        np.testing.assert_allclose(clipped, vector * (clip_norm / norm), rtol=1e-9, atol=1e-300)


def test_three_four_is_scaled_to_a_fifth():
    np.testing.assert_allclose(clipping.clip(np.array([3.0, 4.0], np.float32), 1.0), [0.6, 0.8], rtol=1e-15)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_with_one_non_finite_coordinate_becomes_zeros(bad):
    np.testing.assert_array_equal(clipping.clip(np.array([1.0, bad, 2.0]), 1.0), np.zeros(3))


@pytest.mark.parametrize("size", [1e30, 1e300, 1.7e308, 5e-324])
def test_the_norm_neither_overflows_nor_underflows(size):
    clipped = clipping.clip(np.full(4, size), 1.0)
    assert np.linalg.norm(clipped) <= 1 + 1e-6
    if size > 1:
        np.testing.assert_allclose(clipped, np.full(4, 0.5), rtol=1e-12)
    else:
        np.testing.assert_array_equal(clipped, np.full(4, size))


def test_zero_stays_zero_and_the_argument_is_not_changed():
    vector = np.zeros(3, np.float32)
    clipping.clip(vector, 1.0)[0] = 7
    np.testing.assert_array_equal(vector, np.zeros(3))


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_norm_that_is_no_positive_number_is_refused(clip_norm):
    with pytest.raises(ConfigError, match="clip_norm"):
        clipping.clip(np.ones(2), clip_norm)
