"""Metrics travel as coordinates of a unit's vector: bounded whatever they are, and means come back from their sum."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmini import metrics

anything = st.floats(allow_nan=True, allow_infinity=True)


@given(loss=anything, targets=st.integers(0, 10**9), clipped=st.booleans(), clip_norm=st.floats(1e-3, 1e3))
def test_metric_coordinates_never_pass_their_share_of_the_clip_norm(loss, targets, clipped, clip_norm) -> None:
    found = metrics.coordinates([loss], [targets], [clipped], clip_norm, max_length=64)[0]
    assert np.linalg.norm(found) <= metrics.METRIC_SHARE * clip_norm * (1 + 1e-12)


@given(clip_norm=st.floats(1e-3, 1e3))
def test_a_full_vector_and_full_metrics_together_stay_within_the_clip_norm(clip_norm: float) -> None:
    full = metrics.coordinates([1e9], [10**6], [True], clip_norm, max_length=64)[0]
    joint = math.hypot(metrics.room_for_vector(clip_norm), float(np.linalg.norm(full)))
    assert joint <= clip_norm * (1 + 1e-12)


def test_means_over_the_units_come_back_from_the_sum() -> None:
    rows = metrics.coordinates([2.0, 4.0], [10, 30], [True, False], clip_norm=0.5, max_length=64)
    found = metrics.decode(rows.sum(axis=0), clip_norm=0.5, max_length=64, noise_std=0.0)
    assert found is not None
    assert found.loss == pytest.approx(3.0)
    assert found.mean_targets == pytest.approx(20.0)
    assert found.clipped_fraction == pytest.approx(0.5)
    assert found.loss_error == 0.0


def test_a_loss_above_the_cap_counts_as_the_cap() -> None:
    rows = metrics.coordinates([math.nan, 1e6], [1, 1], [False, False], clip_norm=1.0, max_length=64)
    found = metrics.decode(rows.sum(axis=0), clip_norm=1.0, max_length=64, noise_std=0.0)
    assert found is not None
    assert found.loss == pytest.approx(metrics.LOSS_CAP)


def test_nothing_is_reported_where_the_noise_drowns_the_count() -> None:
    rows = metrics.coordinates([2.0], [1], [False], clip_norm=1.0, max_length=64)
    assert metrics.decode(rows.sum(axis=0), clip_norm=1.0, max_length=64, noise_std=0.05) is None


def test_the_error_bar_is_the_noise_in_the_mean() -> None:
    """1,000 units at loss 3: the spread of decoded losses under known noise is what `loss_error` says."""
    generator = np.random.default_rng(0)
    exact = metrics.coordinates([3.0] * 1000, [5] * 1000, [False] * 1000, 1.0, 64).sum(axis=0)
    std = 2.0
    found = [metrics.decode(exact + generator.normal(0, std, 4), 1.0, 64, std) for _ in range(2000)]
    losses = [item.loss for item in found if item]
    errors = [item.loss_error for item in found if item]
    assert np.std(losses) == pytest.approx(np.mean(errors), rel=0.1)
