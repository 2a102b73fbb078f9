"""The privacy loss distribution of a subsampled Gaussian: dp_accounting's own, made by arrays.

dp_accounting inverts the privacy loss at one point of the grid after the other, which was most of what an epsilon cost.
Here numpy does the same operations on all points at once; every other step is dp_accounting's. Importing this takes 0.7 s.
"""

import math

import numpy as np
from dp_accounting.pld import common, pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray

Losses = NDArray[np.float64]  # (num_points,)

CACHED_PLANS = 16  # of each kind: as many as scipy.fft keeps


def distribution(z_eff: float, sampling_rate: float, grid: float) -> PrivacyLossDistribution:
    """What `from_gaussian_mechanism(z_eff, sampling_prob=sampling_rate, value_discretization_interval=grid)` gives.

    Guarantee: the same masses to the bit. Sensitivity 1, pessimistic, both directions of add-or-remove.
    """
    removed = _masses(z_eff, sampling_rate, grid, AdjacencyType.REMOVE)
    if sampling_rate == 1.0:  # adding is removing then
        return PrivacyLossDistribution(removed)
    return PrivacyLossDistribution(removed, _masses(z_eff, sampling_rate, grid, AdjacencyType.ADD))


def forget_plans() -> None:
    """Give back the tables that scipy.fft keeps of the last lengths: up to 16 MB each, and each number of releases has its own.

    Small ones take their places.
    """
    for length in range(1, CACHED_PLANS + 1):
        common.fft.fft(np.zeros(length))
        common.fft.fft(np.zeros(length, np.complex128))


def _masses(z_eff: float, sampling_rate: float, grid: float, adjacency: AdjacencyType) -> pld_pmf.PLDPmf:
    mechanism = GaussianPrivacyLoss(z_eff, sampling_prob=sampling_rate, adjacency_type=adjacency)
    bounds = mechanism.connect_dots_bounds()
    lowest, highest = math.floor(bounds.epsilon_lower / grid), math.ceil(bounds.epsilon_upper / grid)
    deltas = _deltas(mechanism, z_eff, np.arange(lowest, highest + 1) * grid)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(grid, lowest, highest, deltas)


def _deltas(mechanism: GaussianPrivacyLoss, z_eff: float, losses: Losses) -> Losses:
    """The hockey-stick divergence at each privacy loss, as `mechanism.get_delta_for_epsilon` gives it."""
    deltas = np.zeros(len(losses))
    is_reached = np.full(len(losses), True)
    if mechanism.sampling_prob < 1.0:
        limit = math.log1p(-mechanism.sampling_prob)
        if mechanism.adjacency_type is AdjacencyType.ADD:
            is_reached = losses < -limit
        else:
            is_reached = losses > limit
            deltas[~is_reached] = -np.expm1(losses[~is_reached])
    reached = losses[is_reached]
    cutoffs = _cutoffs(mechanism, z_eff, reached)
    deltas[is_reached] = mechanism.mu_upper_cdf(cutoffs) - np.exp(reached + mechanism.mu_lower_log_cdf(cutoffs))
    return np.clip(deltas, 0, 1)


def _cutoffs(mechanism: GaussianPrivacyLoss, z_eff: float, losses: Losses) -> Losses:
    """The largest outcome whose privacy loss is each of these, as `mechanism.inverse_privacy_loss` gives it."""
    sign = -1.0 if mechanism.adjacency_type is AdjacencyType.ADD else 1.0
    if mechanism.sampling_prob < 1.0:
        losses = sign * _without_sampling(sign * losses, mechanism.sampling_prob)
    removed: Losses = -0.5 - losses * z_eff**2
    return removed if sign > 0 else 1 + removed


def _without_sampling(losses: Losses, sampling_rate: float) -> Losses:
    """log(1 + (exp(loss) - 1) / sampling_rate); -infinity where a loss is the least that there is, or all but."""
    limit = math.log(1 - sampling_rate)
    is_least = np.abs(losses - limit) <= 1e-9 * np.maximum(np.abs(losses), abs(limit))  # math.isclose
    whole, rest = 1 / sampling_rate, 1 - 1 / sampling_rate  # log(whole * exp(loss) + rest)
    raised, taken = losses + np.log(whole), np.log(-rest)
    is_least |= raised <= taken  # by rounding only
    found = np.full(len(losses), -math.inf)
    found[~is_least] = raised[~is_least] + np.log1p(-np.exp(taken - raised[~is_least]))
    found[losses == 0] = np.log(whole + rest)
    return found
