"""From a configuration to a manifest and a forecast: noise calibrated, encoding sized, and warnings where it can't work."""

import math
from pathlib import Path

import pytest

from fedmini import config, forecast, planning
from fedmini.errors import ConfigError
from fedmini.privacy import accounting, encoding
from fedmini.types import Manifest
from tests import tiny_run

TEMPLATE = (("x.lora_B.weight", (64, 4)),)
BASE = planning.Base("base", TEMPLATE)


def a_config(tmp_path: Path, mode: str, **changes) -> config.RunConfig:
    return tiny_run.config(tmp_path, mode, changes)


def a_manifest(chosen: config.RunConfig) -> Manifest:
    return planning.make_manifest(chosen, "run", BASE, None)


def test_a_target_epsilon_is_reached_from_below_with_spare_attempts_counted(tmp_path: Path) -> None:
    privacy = {"example": {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 3.0, "target_delta": 1e-5}}
    chosen = a_config(tmp_path, "none", privacy=privacy, rounds={"num_rounds": 5, "spare_attempts": 2})
    (unit,) = forecast.forecast(a_manifest(chosen)).units
    assert unit.num_releases == 7
    assert 2.99 < unit.epsilon <= 3.0


def test_local_steps_count_in_the_calibration(tmp_path: Path) -> None:
    privacy = {"example": {"noise": "local", "clip_norm": 1.0, "target_epsilon": 3.0, "target_delta": 1e-5}}
    chosen = a_config(tmp_path, "none", privacy=privacy, local={"num_steps": 4})
    manifest = a_manifest(chosen)
    unit = manifest.release.example
    assert unit is not None
    one_by_one = accounting.PrivacyEvent("example", "local", unit.z_eff, 0.5, 1, 1.0)
    assert accounting.epsilon(one_by_one, 3 * 4, 1e-5) <= 3.0


def test_a_device_in_at_most_so_many_rounds_needs_less_noise(tmp_path: Path) -> None:
    privacy = {"device": {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 3.0, "target_delta": 1e-5}}
    often = a_manifest(a_config(tmp_path, "none", privacy=privacy, rounds={"num_rounds": 8}))
    once = a_manifest(a_config(tmp_path, "none", privacy=privacy, rounds={"num_rounds": 8, "max_participations": 1}))
    assert often.release.device is not None and once.release.device is not None
    assert often.release.device.z_eff == pytest.approx(once.release.device.z_eff * math.sqrt(8), rel=0.01)


def test_separation_bounds_how_often_a_device_is_counted_and_that_bound_is_kept(tmp_path: Path) -> None:
    chosen = a_config(tmp_path, "device-shared", rounds={"num_rounds": 7, "min_separation": 3})
    assert planning.num_releases(chosen) == 3  # rounds 1, 4, 7


def test_noise_shares_are_sized_for_the_honest_devices_that_are_counted_on(tmp_path: Path) -> None:
    """20 survivors at least, a tenth corrupt: 18 shares have to add up to the whole noise."""
    chosen = a_config(
        tmp_path,
        "device-shared",
        rounds={"cohort_size": 24, "min_survivors": 20, "assumed_corrupt_fraction": 0.1},
    )
    unit = a_manifest(chosen).release.device
    assert unit is not None
    assert unit.num_shares == 18
    assert math.sqrt(18 * unit.noise_variance) == pytest.approx(unit.noise_multiplier * 2**13, rel=1e-3)


def test_where_no_device_can_be_counted_on_the_plan_is_refused(tmp_path: Path) -> None:
    chosen = a_config(tmp_path, "device-shared", rounds={"min_survivors": 1, "assumed_corrupt_fraction": 0.5})
    with pytest.raises(ConfigError, match="leave no honest device to count on"):
        a_manifest(chosen)


def test_the_server_needs_no_other_share(tmp_path: Path) -> None:
    unit = a_manifest(a_config(tmp_path, "device-server")).release.device
    assert unit is not None and unit.num_shares == 1


@pytest.mark.parametrize(
    ("privacy", "num_metrics"),
    [("none", 4), ("example-local", 0), ("example-shared", 4), ("device-shared", 4), ("device-server", 4), ("both", 0)],
)
def test_metrics_travel_only_where_the_same_noise_covers_them(tmp_path: Path, privacy: str, num_metrics: int) -> None:
    assert a_manifest(a_config(tmp_path, privacy)).release.num_metrics == num_metrics


@pytest.mark.parametrize("privacy", sorted(tiny_run.PRIVACY))
def test_the_modulus_holds_the_largest_sum_that_is_planned_for(tmp_path: Path, privacy: str) -> None:
    chosen = a_config(tmp_path, privacy, rounds={"cohort_size": 100, "min_survivors": 80})
    manifest = a_manifest(chosen)
    release = manifest.release
    units = 100 * (6 + 10 * math.sqrt(6) if release.sums_examples else 1)
    largest = units * release.encoding_norm * release.scale
    assert 2 ** (release.modulus_bits - 1) > largest


def test_where_the_noise_drowns_the_signal_the_plan_names_a_cohort_and_a_rank_that_help(tmp_path: Path) -> None:
    """Multiplier 2 over 8 devices and 260 coordinates: 2 sqrt(260) / 8 = 4.0 times the signal, so 11 devices, or rank 2."""
    privacy = {"device": {"noise": "server", "clip_norm": 1.0, "noise_multiplier": 2.0, "target_delta": 1e-5}}
    eight = {"rounds": {"cohort_size": 8, "min_survivors": 8}, "lora": {"lora_rank": 4}}
    chosen = a_config(tmp_path, "none", privacy=privacy, **eight)
    found = forecast.forecast(a_manifest(chosen))
    assert found.noise_to_signal == pytest.approx(2 * math.sqrt(260) / 8, rel=0.01)
    assert found.cohort_needed == 11
    better = a_config(tmp_path, "none", privacy=privacy, rounds={"cohort_size": 11, "min_survivors": 8})
    assert forecast.forecast(a_manifest(better)).cohort_needed is None
    assert found.rank_needed == 2


def test_shared_noise_is_one_noise_whatever_the_number_of_devices(tmp_path: Path) -> None:
    """Twice the devices, each of which can be counted on: half the noise against the signal; local noise: root two."""
    ratios = {}
    for privacy in ("example-shared", "example-local"):
        for cohort in (8, 16):
            chosen = a_config(tmp_path, privacy, rounds={"cohort_size": cohort, "min_survivors": cohort})
            ratios[privacy, cohort] = forecast.forecast(a_manifest(chosen)).noise_to_signal
    assert ratios["example-shared", 8] / ratios["example-shared", 16] == pytest.approx(2, rel=0.01)
    assert ratios["example-local", 8] / ratios["example-local", 16] == pytest.approx(math.sqrt(2), rel=0.01)


def test_a_lone_honest_device_is_worth_less_and_the_forecast_says_how_much(tmp_path: Path) -> None:
    chosen = a_config(tmp_path, "device-shared")
    (unit,) = forecast.forecast(a_manifest(chosen)).units
    assert unit.epsilon_lone is not None and unit.epsilon_lone > unit.epsilon


def test_bytes_are_those_of_the_packed_vector_and_the_adapter(tmp_path: Path) -> None:
    chosen = a_config(tmp_path, "device-shared")
    manifest = a_manifest(chosen)
    found = forecast.forecast(manifest)
    assert found.num_coordinates == 64 * 4 + 4
    assert found.upload_bytes_per_device == math.ceil(260 * manifest.release.modulus_bits / 8)
    assert found.download_bytes_per_device == 4 * 256


def test_a_manifest_hash_changes_with_every_field_a_device_agrees_to(tmp_path: Path) -> None:
    base = a_manifest(a_config(tmp_path, "example-shared"))
    changes = [
        {"local": {"sampling_rate": 0.25}},
        {"local": {"max_length": 32}},
        {"local": {"detach_prefix": True}},
        {"rounds": {"min_survivors": 3}},
        {"lora": {"lora_alpha": 8.0}},
        {"rounds": {"num_rounds": 4}},
    ]
    hashes = {a_manifest(a_config(tmp_path, "example-shared", **change)).hash for change in changes}
    assert len(hashes | {base.hash}) == len(changes) + 1


def test_the_encoding_of_an_unprotected_update_is_fine_enough(tmp_path: Path) -> None:
    release = a_manifest(a_config(tmp_path, "none")).release
    assert 1 / release.scale < 1e-4
    assert encoding.sensitivity(release.encoding_norm, release.scale, 260) * 5 < 2**31


def test_a_small_expected_batch_does_not_make_the_modulus_too_small(tmp_path: Path) -> None:
    """The denominator may be set to anything; what a sum holds is what devices draw: 1.0 of up to 200 examples."""
    chosen = a_config(
        tmp_path,
        "example-shared",
        data={"source": "in memory", "max_examples_per_device": 200, "held_out_devices": 2},
        local={"sampling_rate": 1.0, "expected_batch_size": 1.0},
        rounds={"num_rounds": 3, "cohort_size": 50, "min_survivors": 50},
    )
    release = a_manifest(chosen).release
    assert 2 ** (release.modulus_bits - 1) > 50 * 200 * 2**13


def test_noise_beyond_the_samplers_reach_is_refused_before_anything_is_debited(tmp_path: Path) -> None:
    privacy = {"device": {"noise": "server", "clip_norm": 1.0, "noise_multiplier": 1000.0, "target_delta": 1e-5}}
    with pytest.raises(ConfigError, match="noise multiplier"):
        a_manifest(a_config(tmp_path, "none", privacy=privacy))


def test_assuming_more_corrupt_devices_than_secure_aggregation_bears_is_refused_for_shared_noise() -> None:
    values = {
        "run": {"name": "test"},
        "base": {"name": "smollm2-135m-q4"},
        "data": {"source": "x.jsonl", "held_out_devices": 1},
        "local": {"sampling_rate": 0.5, "expected_batch_size": 4.0},
        "rounds": {"num_rounds": 3, "cohort_size": 10, "assumed_corrupt_fraction": 0.4},
    }
    unit = {"clip_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-5}
    base = planning.Base("base", (("w", (3, 2)),))
    shared = config.parse_run_config(values | {"privacy": {"device": unit | {"noise": "shared"}}})
    with pytest.raises(ConfigError, match=r"4 of min_survivors = 10 devices may be corrupt .* a third at most"):
        planning.make_manifest(shared, "run", base, None)
    local = config.parse_run_config(values | {"privacy": {"example": unit | {"noise": "local"}}})
    assert planning.make_manifest(local, "run", base, None).release.n_honest == 6
