import functools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmini.errors import ConfigError
from fedmini.privacy import accounting, encoding
from fedmini.privacy.accounting import CalibrationRequest, UnitRequest
from fedmini.types import PrivacyEvent

RESERVED = accounting.RESERVED_DELTA
DEVICE = PrivacyEvent("device", "shared", 4.0, 1.0, 1, 1.0)
REQUEST = UnitRequest("device", "shared", 0.5, 50_000, 70, 1e-6, noise_multiplier=2.0)

# (z, sampling rate, compositions, delta) -> (PLD, RDP, Opacus PRV), measured for this project with both libraries
PUBLISHED = {
    (1.0, 1.0, 1, 1e-5): (4.3772, 4.7285, 4.3874),
    (2.0, 1.0, 100, 1e-6): (35.5663, 37.4292, 35.5774),
    (0.6, 0.01, 1000, 1e-5): (7.4336, 8.6804, 7.4442),
    (1.0, 0.01, 1000, 1e-5): (1.8282, 2.1014, 1.8384),
    (0.8, 0.001, 10000, 1e-6): (0.9473, 1.7036, 0.9573),
    (2.0, 0.1, 100, 1e-6): (2.6750, 2.9142, 2.6852),
    (5.0, 0.3, 200, 1e-9): (5.3423, 5.6187, 5.3525),
    (1.0, 0.05, 200, 1e-10): (8.1010, 8.7393, 8.1112),
}


def spent(z_eff: float, sampling_rate: float, count: int, target_delta: float) -> float:
    event = PrivacyEvent("example", "local", z_eff, sampling_rate, 1, 1.0)
    return accounting.epsilon(event, count, target_delta)


def closed_form_delta(mu: float, epsilon: float) -> float:
    """Of a Gaussian whose means are mu standard deviations apart (arXiv:1805.06530, Theorem 8)."""
    far = stats.norm.logcdf(-mu / 2 - epsilon / mu) + epsilon
    return float(stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(far))


def bisect(delta_of, target_delta: float, high: float = 200.0) -> float:
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > target_delta else (low, middle)
    return high


@pytest.mark.parametrize(("setting", "published"), PUBLISHED.items())
def test_epsilon_is_the_published_one(setting, published):
    z, sampling_rate, count, target_delta = setting
    assert spent(z, sampling_rate, count, target_delta + RESERVED) == pytest.approx(published[0], abs=6e-5)


@pytest.mark.parametrize("setting", list(PUBLISHED))
def test_epsilon_lies_just_below_opacus_prv_and_not_above_renyi(setting):
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    z, sampling_rate, count, target_delta = setting
    ours = spent(z, sampling_rate, count, target_delta + RESERVED)
    prv.history = [(z, sampling_rate, count)]
    assert 0 <= prv.get_epsilon(target_delta, eps_error=0.01) - ours <= 0.012
    renyi = RdpAccountant()
    renyi.compose(dp_event.PoissonSampledDpEvent(sampling_rate, dp_event.GaussianDpEvent(z)), count)
    assert ours <= renyi.get_epsilon(target_delta) + 1e-6


@pytest.mark.parametrize(
    ("z", "count", "target_delta"), [(1.0, 1, 1e-5), (4.77, 16, 1e-6), (30.0, 5, 1e-8), (2.0, 30, 1e-4)]
)
def test_without_sampling_epsilon_is_the_closed_form(z, count, target_delta):
    exact = bisect(lambda epsilon: closed_form_delta(math.sqrt(count) / z, epsilon), target_delta)
    assert abs(spent(z, 1.0, count, target_delta + RESERVED) - exact) < 1e-3


def test_epsilon_is_what_dp_accounting_says_of_the_event_and_of_a_mixture():
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(1.5)), 20)
    accountant.compose(dp_event.GaussianDpEvent(8.0), 4)
    sampled = PrivacyEvent("example", "shared", 1.5, 0.1, 5, 1.0)
    whole = PrivacyEvent("example", "shared", 8.0, 1.0, 1, 1.0)
    ours = accounting.compose([(sampled, 4), (whole, 4)], 1e-6 + RESERVED)
    assert ours == pytest.approx(accountant.get_epsilon(1e-6), abs=1e-6)
    assert accounting.compose([(sampled, 2), (whole, 4), (sampled, 2)], 1e-6 + RESERVED) == ours


def test_epsilon_moves_the_right_way_and_is_never_negative():
    base = spent(2.2, 0.1, 10, 1e-6)
    assert spent(2.3, 0.1, 10, 1e-6) < base < spent(2.1, 0.1, 10, 1e-6)
    assert spent(2.2, 0.05, 10, 1e-6) < base < spent(2.2, 0.2, 10, 1e-6)
    assert spent(2.2, 0.1, 5, 1e-6) < base < spent(2.2, 0.1, 20, 1e-6)
    assert spent(2.2, 0.1, 10, 1e-5) < base < spent(2.2, 0.1, 10, 1e-7)
    assert spent(2.2, 0.1, 0, 1e-6) == 0.0
    for z_eff, sampling_rate, count, target_delta in [(1e6, 1.0, 1, 0.9), (1e4, 1e-4, 1, 1e-3), (1e6, 1e-3, 1000, 0.1)]:
        assert spent(z_eff, sampling_rate, count, target_delta) >= 0.0


@settings(max_examples=12)
@given(st.floats(2, 20), st.integers(1, 20), st.floats(-11, -2))
def test_without_sampling_epsilon_never_falls_below_the_closed_form(z_eff, count, log_delta):
    target_delta = 10**log_delta
    ours = spent(z_eff, 1.0, count, target_delta)
    assert closed_form_delta(math.sqrt(count) / z_eff, ours) <= target_delta * (1 + 1e-9)


def test_an_event_composes_all_its_steps():
    event = PrivacyEvent("example", "local", 2.0, 0.1, 4, 1.0)
    assert accounting.epsilon(event, 3, 1e-6) == spent(2.0, 0.1, 12, 1e-6)


def test_two_units_are_two_numbers():
    with pytest.raises(ConfigError, match="two numbers"):
        accounting.compose([(DEVICE, 1), (replace(DEVICE, unit="example"), 1)], 1e-6)


def test_hopeless_noise_is_a_large_number_or_infinite_and_nonsense_is_refused():
    assert 100 < spent(0.2, 1.0, 20, 1e-6) < 500
    assert spent(0.04, 1.0, 1, 1e-6) == math.inf
    for nonsense in ((0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)):
        with pytest.raises(ConfigError):
            spent(*nonsense, 1, 1e-6)
    for target_delta in (0.0, 1e-12, 1.0):
        with pytest.raises(ConfigError, match="target_delta"):
            spent(1.0, 1.0, 1, target_delta)


# --- the integer mechanism itself, by brute force: one coordinate, where every probability can be written down


def discrete_gaussian_mass(variance: float, reach: int) -> np.ndarray:
    support = np.arange(-reach, reach + 1).astype(float)
    weights = np.exp(-(support**2) / (2 * variance))
    return weights / weights.sum()


@functools.lru_cache
def noise_mass(variance: float, num_shares: int) -> np.ndarray:
    """Of the sum of `num_shares` shares, by convolution: nothing about the sum of discrete Gaussians is assumed."""
    share = discrete_gaussian_mass(variance, math.ceil(12 * math.sqrt(variance)) + 3)
    mass = share
    for _ in range(num_shares - 1):
        mass = np.convolve(mass, share)
    return mass


def neighbours(
    noise: np.ndarray, value: float, sampling_rate: float, bits: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The laws of one release with and without a unit whose scaled value is `value`: rounded, sampled, wrapped."""
    low = math.floor(value)
    absent = np.concatenate([noise, np.zeros(low + 1)])
    present = np.zeros_like(absent)
    for shift, chance in ((low, 1 - (value - low)), (low + 1, value - low)):
        present[shift : shift + noise.size] += chance * noise
    present = sampling_rate * present + (1 - sampling_rate) * absent
    if bits is None:
        return present, absent
    width = 2**bits
    pad = -absent.size % width
    folded = [np.pad(mass, (0, pad)).reshape(-1, width).sum(axis=0) for mass in (present, absent)]
    return folded[0], folded[1]


def hockey_stick_epsilon(first: np.ndarray, second: np.ndarray, num_releases: int, target_delta: float) -> float:
    """The larger epsilon of both directions, over all pairs of outcomes where there are two releases."""
    assert num_releases in (1, 2)
    found = []
    for one, other in ((first, second), (second, first)):
        if num_releases == 2:
            keep = (one > 1e-14) | (other > 1e-14)  # what is dropped has mass below 1e-10, and delta is 1e-5
            one, other = one[keep], other[keep]
            one, other = np.outer(one, one).ravel(), np.outer(other, other).ravel()
        delta_of = functools.partial(
            lambda one, other, epsilon: np.maximum(one - math.exp(epsilon) * other, 0).sum(), one, other
        )
        found.append(bisect(delta_of, target_delta, high=60.0))
    return max(found)


@pytest.mark.parametrize(
    ("num_shares", "value", "sampling_rate", "num_releases", "bits"),
    [
        (1, 24.0, 1.0, 1, None),
        (1, 24.5, 1.0, 2, None),
        (4, 50.5, 1.0, 2, None),
        (4, 50.6, 0.1, 1, None),
        (4, 50.6, 0.1, 2, None),
        (1, 19.5, 0.5, 1, None),
        (4, 50.5, 1.0, 1, 9),
        (4, 50.6, 0.1, 1, 7),
    ],
)
def test_the_integer_mechanism_is_no_less_private_than_the_accountant_says(
    num_shares, value, sampling_rate, num_releases, bits
):
    """Small z and the smallest share that is allowed: where the argument has least room."""
    bound = encoding.sensitivity(value, 1.0, 1)
    assert math.ceil(value) <= bound  # both ways to round are within the check
    z_eff = accounting.effective_multiplier(16**2, num_shares, bound)
    claimed = spent(z_eff, sampling_rate, num_releases, 1e-5)
    law = neighbours(noise_mass(16**2, num_shares), value, sampling_rate, bits)
    real = hockey_stick_epsilon(*law, num_releases, 1e-5)
    assert real <= claimed
    if bits is None:
        assert real > 0.9 * claimed  # not by being wasteful


def test_twin_with_an_eighth_less_noise_the_brute_force_catches_the_claim():
    claimed = spent(accounting.effective_multiplier(16**2, 4, encoding.sensitivity(50.5, 1.0, 1)), 1.0, 1, 1e-5)
    law = neighbours(noise_mass(14**2, 4), 50.5, 1.0, None)
    assert hockey_stick_epsilon(*law, 1, 1e-5) > claimed


def test_a_share_below_sixteen_is_refused():
    assert accounting.effective_multiplier(256, 9, 100.0) == math.sqrt(9 * 247) / 100
    with pytest.raises(ConfigError, match="16 integer units"):
        accounting.effective_multiplier(255, 9, 100.0)


def test_twin_without_the_floor_many_tiny_shares_are_less_private_than_their_variances_say():
    """A share of sigma 0.2 is nearly always zero: a hundred of them aren't a Gaussian of sigma 2."""
    claimed = spent(math.sqrt(100) * 0.2 / 1.0, 1.0, 1, 1e-5)
    law = neighbours(noise_mass(0.2**2, 100), 1.0, 1.0, None)
    assert hockey_stick_epsilon(*law, 1, 1e-5) > 2 * claimed


def test_the_plan_holds_when_only_the_honest_shares_that_it_counts_on_are_there():
    plan = accounting.plan_unit(replace(REQUEST, num_coordinates=1, num_shares=7, noise_multiplier=1.0))
    assert real_epsilon(plan.noise_variance, 7) <= accounting.epsilon(replace(DEVICE, z_eff=plan.z_eff), 1, 1e-5)


def test_twin_planned_for_everybody_the_honest_shares_alone_are_too_little():
    plan = accounting.plan_unit(replace(REQUEST, num_coordinates=1, num_shares=10, noise_multiplier=1.0))
    assert real_epsilon(plan.noise_variance, 7) > accounting.epsilon(replace(DEVICE, z_eff=plan.z_eff), 1, 1e-5) * 1.1


def real_epsilon(noise_variance: int, num_shares: int) -> float:
    noise = discrete_gaussian_mass(noise_variance * num_shares, math.ceil(9 * math.sqrt(noise_variance * num_shares)))
    return hockey_stick_epsilon(*neighbours(noise, 2.0**13, 1.0, None), 1, 1e-5)


def test_a_plan_from_a_multiplier_has_its_noise_and_loses_below_one_percent():
    plan = accounting.plan_unit(REQUEST)
    assert plan.clip_norm * plan.scale == 2**13
    assert plan.noise_variance == math.ceil((2.0 * 2**13) ** 2 / 70)
    assert 0.99 * 2.0 <= plan.z_eff < 2.0
    assert (plan.noise_multiplier, plan.num_shares, plan.target_delta) == (2.0, 70, 1e-6)


@given(
    st.floats(0.3, 50),
    st.integers(1, 500),
    st.integers(1, 2**20),
    st.floats(1e-3, 1e3),
)
def test_a_plan_from_an_effective_multiplier_reaches_it_with_the_smallest_share(
    wanted, num_shares, num_coordinates, clip_norm
):
    request = replace(
        REQUEST,
        noise_multiplier=None,
        z_eff=wanted,
        num_shares=num_shares,
        num_coordinates=num_coordinates,
        clip_norm=clip_norm,
    )
    plan = accounting.plan_unit(request)
    bound = encoding.sensitivity(clip_norm, plan.scale, num_coordinates)
    assert plan.z_eff >= wanted
    assert plan.z_eff >= 0.99 * plan.noise_multiplier
    assert accounting.effective_multiplier(plan.noise_variance - 1, num_shares, bound) < wanted * (1 + 1e-12)


def test_a_plan_whose_integers_are_too_coarse_is_refused():
    with pytest.raises(ConfigError, match=r"1 % is accepted"):
        accounting.plan_unit(replace(REQUEST, num_coordinates=2**26))
    with pytest.raises(ConfigError, match="16 integer units"):
        accounting.plan_unit(replace(REQUEST, num_shares=2 * 10**6))
    for both in (None, 2.0):
        with pytest.raises(ConfigError, match="exactly one"):
            accounting.plan_unit(replace(REQUEST, noise_multiplier=both, z_eff=both))


@pytest.mark.parametrize(
    "request_",
    [
        CalibrationRequest(8.0, 1e-5, 0.03, 20),
        CalibrationRequest(2.0, 1e-5, 0.03, 200),
        CalibrationRequest(4.0, 1e-6, 1.0, 16),
        CalibrationRequest(0.5, 1e-6, 0.001, 10_000),
        CalibrationRequest(0.01, 1e-5, 0.1, 6),
        CalibrationRequest(300.0, 1e-5, 1.0, 6),
    ],
)
def test_calibration_finds_the_smallest_multiplier_that_keeps_the_target(request_):
    z_eff = accounting.calibrate(request_, None)
    kept = spent(z_eff, request_.sampling_rate, request_.num_compositions, request_.target_delta)
    passed = spent(z_eff * 0.999, request_.sampling_rate, request_.num_compositions, request_.target_delta)
    assert kept <= request_.target_epsilon < passed


@pytest.mark.parametrize(("target_epsilon", "count", "z"), [(1, 1, 4.22), (2, 8, 6.31), (4, 100, 11.94), (8, 4, 1.31)])
def test_calibration_gives_the_published_multipliers(target_epsilon, count, z):
    assert accounting.calibrate(CalibrationRequest(target_epsilon, 1e-6, 1.0, count), None) == pytest.approx(
        z, abs=0.012
    )


def test_a_calibrated_plan_keeps_its_target():
    z_eff = accounting.calibrate(CalibrationRequest(4.0, 1e-6, 1.0, 16), None)
    plan = accounting.plan_unit(replace(REQUEST, noise_multiplier=None, z_eff=z_eff))
    assert accounting.epsilon(replace(DEVICE, z_eff=plan.z_eff), 16, 1e-6) <= 4.0


def test_calibration_is_remembered_and_a_damaged_memory_is_recomputed(tmp_path):
    request = CalibrationRequest(4.0, 1e-6, 1.0, 16)
    folder = tmp_path / "cache"
    z_eff = accounting.calibrate(request, folder)
    path = folder / "calibration.json"
    (entry,) = json.loads(path.read_text()).values()
    assert entry["z_eff"] == z_eff
    lowered = path.read_text().replace(str(z_eff), str(z_eff / 2))
    for damaged in ("", "[]", "{", path.read_text()[:-9], lowered, '{"x": 1}'):
        path.write_text(damaged)
        assert accounting.calibrate(request, folder) == z_eff
    assert [file.name for file in folder.iterdir()] == ["calibration.json"]
    assert accounting.calibrate(request, path) == z_eff  # a file is no folder: not remembered, but right


def test_an_impossible_target_is_refused():
    for request in (CalibrationRequest(-1.0, 1e-5, 1.0, 1), CalibrationRequest(1.0, 1e-5, 1.0, 0)):
        with pytest.raises(ConfigError, match="calibration"):
            accounting.calibrate(request, None)


def test_importing_the_accountant_loads_no_slow_library():
    code = "import sys, fedmini.privacy.ledger; print([m for m in ('dp_accounting', 'scipy', 'torch') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_a_cold_calibration_takes_less_than_five_seconds_of_processor_time():
    code = (
        "import time; from fedmini.privacy.accounting import CalibrationRequest, calibrate\n"
        "calibrate(CalibrationRequest(8.0, 1e-5, 0.03, 200), None); print(time.process_time())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(answer.stdout) < 5.0


def test_an_epsilon_that_is_shown_is_never_less_than_it_is() -> None:
    assert accounting.rounded_up(3.9412, 2) == "3.95"
    assert accounting.rounded_up(2.0, 2) == "2.00"
    assert accounting.rounded_up(7.9990001) == "8.000"
    assert accounting.rounded_up(math.inf) == "infinity"
