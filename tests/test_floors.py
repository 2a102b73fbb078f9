"""What a device refuses, whatever anybody signed: manifests that contradict themselves, and those beyond its limits.

A cheat is one field of an honest manifest, changed. Each is refused, and for each that privacy rests on a twin says what
the accountant would really have found behind the claim.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmini import floors, planning
from fedmini.config import FloorsSection
from fedmini.errors import ConfigError, ProtocolError
from fedmini.floors import COMPILED, Limits
from fedmini.privacy import accounting, consistency, encoding
from fedmini.types import LocalPlan, Manifest, ReleasePlan, UnitPlan
from tests import tiny_run

BASE = planning.Base("base", (("x.lora_B.weight", (64, 4)),))
NUM_HONEST = 20
BUDGET = 8.0
DELTA = 1e-5
TARGET = {"clip_norm": 1.0, "target_epsilon": BUDGET, "target_delta": DELTA}
ROUNDS = {"num_rounds": 4, "cohort_size": 24, "min_survivors": NUM_HONEST, "spare_attempts": 1}
MODES: dict[str, dict[str, Any]] = {
    "example-local": {"example": TARGET | {"noise": "local"}},
    "example-shared": {"example": TARGET | {"noise": "shared"}},
    "device-shared": {"device": TARGET | {"noise": "shared"}},
    "device-server": {"device": TARGET | {"noise": "server"}},
    "both": {"example": TARGET | {"noise": "local"}, "device": TARGET | {"noise": "shared"}},
}


@cache
def honest(mode: str, folder: Path) -> Manifest:
    """A manifest as planning makes it, calibrated to a budget of 8 over four rounds and a lost attempt."""
    config = tiny_run.config(folder, "none", {"privacy": MODES[mode], "rounds": ROUNDS})
    return planning.make_manifest(config, "run", BASE, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("floors")


def changed(manifest: Any, path: str, change: Callable[[Any], Any]) -> Any:
    """A manifest with one field, such as "release.device.z_eff", replaced by what `change` makes of it."""
    name, _, rest = path.partition(".")
    value = getattr(manifest, name)
    return replace(manifest, **{name: changed(value, rest, change) if rest else change(value)})


def the_unit(manifest: Manifest) -> UnitPlan:
    return manifest.release.units[-1]


# Honest manifests pass.


@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_calibrated_manifest_passes_the_limits_that_are_compiled_in(mode: str, folder: Path) -> None:
    manifest = honest(mode, folder)
    floors.check(manifest, COMPILED)
    for unit in manifest.release.units:
        assert 0.99 * BUDGET < floors.run_epsilon(unit, manifest) <= BUDGET


POSITIVE = st.floats(0.01, 100)


@settings(max_examples=150)
@given(data=st.data())
def test_every_manifest_that_planning_makes_is_consistent(data: st.DataObject, folder: Path) -> None:
    draw = data.draw
    mode = draw(st.sampled_from(sorted(tiny_run.PRIVACY)))
    privacy = {
        key: value if key == "none" else value | {"clip_norm": draw(POSITIVE), "noise_multiplier": draw(POSITIVE)}
        for key, value in tiny_run.PRIVACY[mode].items()
    }
    num_rounds, cohort_size = draw(st.integers(1, 50)), draw(st.integers(1, 150))
    rounds = {
        "num_rounds": num_rounds,
        "cohort_size": cohort_size,
        "min_survivors": draw(st.integers(1, cohort_size)),
        "over_selection": draw(st.floats(1, 3)),
        "assumed_corrupt_fraction": draw(st.floats(0, 0.9)),
        "max_participations": draw(st.none() | st.integers(1, num_rounds)),
        "min_separation": draw(st.integers(1, 60)),
        "spare_attempts": draw(st.integers(0, 5)),
    }
    local: dict[str, Any] = {"sampling_rate": draw(st.floats(0.001, 1)), "learning_rate": draw(POSITIVE)}
    local["expected_batch_size"] = draw(st.none() | POSITIVE)
    if mode != "example-shared":
        local |= {"num_steps": draw(st.integers(1, 20)), "optimizer": draw(st.sampled_from(["sgd", "adam"]))}
    base = planning.Base("base", (("x.lora_B.weight", (draw(st.sampled_from([1, 64, 3000])), 4)),))
    try:
        config = tiny_run.config(folder, mode, {"privacy": privacy, "rounds": rounds, "local": local})
        manifest = planning.make_manifest(config, "run", base, None)
    except ConfigError:
        assume(False)
    consistency.check_consistency(manifest)


@pytest.mark.parametrize("changes", [{"min_separation": 2}, {"max_participations": 2}, {"spare_attempts": 3}])
def test_a_budget_that_counts_what_a_device_can_be_in_is_consistent(changes: dict[str, Any], folder: Path) -> None:
    config = tiny_run.config(folder, "none", {"privacy": MODES["device-shared"], "rounds": ROUNDS | changes})
    consistency.check_consistency(planning.make_manifest(config, "run", BASE, None))


# Cheats are refused.


@dataclass(frozen=True)
class Cheat:
    mode: str
    field: str
    change: Callable[[Any], Any]
    complaint: str
    costs_privacy: bool = True  # else it costs memory or utility, or only the statement is wrong

    def __str__(self) -> str:
        return f"{self.mode}-{self.field}"

    def applied(self, folder: Path) -> Manifest:
        cheat: Manifest = changed(honest(self.mode, folder), self.field, self.change)
        return cheat


def times_100(value: Any) -> Any:
    return value * 100


def one_more(value: int) -> int:
    return value + 1


def one_less(value: int) -> int:
    return value - 1


def now(value: object) -> Callable[[object], object]:
    return lambda _: value


CHEATS = [
    # More sensitive than claimed: what is clipped and rounded gets longer, the noise stays.
    Cheat("device-shared", "release.device.clip_norm", times_100, "device.scale"),
    Cheat("device-shared", "release.device.scale", times_100, "device.scale"),
    Cheat("device-shared", "release.encoding_norm", times_100, "release.encoding_norm"),
    Cheat("device-shared", "release.encoding_norm", lambda norm: norm * 1.001, "release.encoding_norm"),
    Cheat("device-shared", "release.scale", times_100, "release.scale"),
    Cheat("device-shared", "release.scale", lambda scale: scale * 1.001, "release.scale"),
    Cheat("example-shared", "release.example.clip_norm", times_100, "example.scale"),
    Cheat("example-shared", "release.example.scale", times_100, "example.scale"),
    Cheat("example-local", "release.example.clip_norm", times_100, "example.scale"),
    # Less noise than claimed.
    Cheat("device-shared", "release.device.noise_variance", lambda variance: variance // 100, "device.z_eff"),
    Cheat("device-shared", "release.device.noise_variance", one_less, "device.z_eff"),
    Cheat("device-shared", "release.device.noise_variance", now(255), "device.noise_variance"),
    Cheat("device-shared", "release.device.noise_variance", now(0), "device.noise_variance"),
    Cheat("device-server", "release.device.noise_variance", one_less, "device.z_eff"),
    Cheat("example-local", "release.example.noise_variance", one_less, "example.z_eff"),
    Cheat("device-shared", "release.device.z_eff", times_100, "device.z_eff"),
    Cheat("device-shared", "release.device.z_eff", lambda z_eff: z_eff * 1.0001, "device.z_eff"),
    Cheat("example-local", "release.example.z_eff", times_100, "example.z_eff"),
    # Shares of more devices than are sure to be honest.
    Cheat("device-shared", "release.device.num_shares", times_100, "device.num_shares", costs_privacy=False),
    Cheat("device-shared", "release.device.num_shares", one_more, "device.num_shares", costs_privacy=False),
    Cheat("device-server", "release.device.num_shares", one_more, "device.num_shares", costs_privacy=False),
    Cheat("device-shared", "release.n_honest", one_more, "release.n_honest", costs_privacy=False),
    Cheat("example-shared", "release.n_honest", times_100, "release.n_honest", costs_privacy=False),
    Cheat("device-shared", "release.min_survivors", one_less, "release.n_honest", costs_privacy=False),
    Cheat("device-shared", "release.min_survivors", now(1), "release.n_honest", costs_privacy=False),
    # More releases than the budget is for, or a device's release taken for a sampled one.
    Cheat("device-shared", "release.max_releases", one_more, "target_epsilon"),
    Cheat("device-shared", "release.max_releases", times_100, "target_epsilon"),
    Cheat("example-local", "local.num_steps", one_more, "target_epsilon"),
    Cheat("example-local", "local.num_steps", times_100, "target_epsilon"),
    Cheat("example-shared", "local.num_steps", one_more, "local.num_steps"),
    Cheat("example-shared", "local.sampling_rate", times_100, "local.sampling_rate", costs_privacy=False),  # 5000 %
    Cheat("example-shared", "local.sampling_rate", lambda rate: rate + 0.01, "target_epsilon"),
    Cheat("device-shared", "release.device.unit", now("example"), "release.device.unit"),
    # Promises that are none.
    Cheat("device-shared", "release.device.target_delta", times_100, "device.target_delta"),
    Cheat("device-shared", "target_epsilon", now((("device", BUDGET / 100),)), "target_epsilon"),
    Cheat("device-shared", "target_epsilon", now((("device", BUDGET * 0.99),)), "target_epsilon"),
    Cheat("device-shared", "target_epsilon", now((("device", BUDGET * 100),)), "target_epsilon", costs_privacy=False),
    Cheat("device-shared", "target_epsilon", now((("example", BUDGET),)), "target_epsilon", costs_privacy=False),
    Cheat("device-shared", "target_epsilon", now((("device", BUDGET),) * 2), "target_epsilon", costs_privacy=False),
    Cheat("device-shared", "release.device.noise_multiplier", times_100, "noise_multiplier", costs_privacy=False),
    Cheat(
        "device-shared",
        "release.device.noise_multiplier",
        lambda multiplier: multiplier * 1.0001,
        "noise_multiplier",
        costs_privacy=False,
    ),
    Cheat("device-server", "release.device.noise", now("shared"), "device.num_shares", costs_privacy=False),
    Cheat("device-shared", "release.device.noise", now("server"), "device.num_shares", costs_privacy=False),
    Cheat("device-shared", "release.device.noise", now("local"), "device.noise", costs_privacy=False),
    Cheat("example-local", "release.example.noise", now("server"), "example.noise", costs_privacy=False),
    Cheat("both", "release.example.noise", now("shared"), "release.", costs_privacy=False),
    Cheat("device-shared", "release.device", now(None), "modulus_bits", costs_privacy=False),
    # What costs the sum, the memory or the sense of a round.
    Cheat("device-shared", "release.modulus_bits", now(16), "modulus_bits", costs_privacy=False),
    Cheat("device-shared", "release.modulus_bits", now(64), "modulus_bits", costs_privacy=False),
    Cheat("example-local", "release.modulus_bits", now(24), "modulus_bits", costs_privacy=False),
    Cheat("example-local", "release.scale", times_100, "release.scale", costs_privacy=False),
    Cheat("example-local", "release.encoding_norm", times_100, "release.scale", costs_privacy=False),
    Cheat("example-shared", "local.expected_batch_size", times_100, "modulus_bits", costs_privacy=False),
    Cheat("example-shared", "local.expected_batch_size", now(1e9), "modulus_bits", costs_privacy=False),
    Cheat("example-shared", "local.expected_batch_size", now(0.0), "expected_batch_size", costs_privacy=False),
    Cheat("example-shared", "local.optimizer", now("adam"), "local.optimizer", costs_privacy=False),
    Cheat("device-shared", "release.max_devices", times_100, "modulus_bits", costs_privacy=False),
    Cheat("device-shared", "release.max_devices", now(151), "max_devices", costs_privacy=False),
    Cheat("device-shared", "release.max_devices", now(23), "cohort_size", costs_privacy=False),
    Cheat("device-shared", "release.cohort_size", one_more, "cohort_size", costs_privacy=False),
    Cheat("device-shared", "release.cohort_size", now(19), "min_survivors", costs_privacy=False),
    Cheat("device-shared", "release.n_honest", now(0), "n_honest", costs_privacy=False),
    Cheat("device-shared", "release.max_participations", one_more, "max_participations", costs_privacy=False),
    Cheat("device-shared", "release.max_participations", now(0), "max_participations", costs_privacy=False),
    Cheat("device-shared", "release.max_releases", now(3), "max_releases", costs_privacy=False),
    Cheat("device-shared", "release.min_separation", now(0), "min_separation", costs_privacy=False),
    Cheat("device-shared", "num_rounds", one_less, "max_participations", costs_privacy=False),
    Cheat("device-shared", "num_rounds", now(10**9), "num_rounds", costs_privacy=False),
    Cheat("device-shared", "release.num_metrics", now(0), "num_metrics", costs_privacy=False),
    Cheat("example-local", "release.num_metrics", now(4), "num_metrics", costs_privacy=False),
    Cheat("device-shared", "template", now(()), "template", costs_privacy=False),
    Cheat("device-shared", "template", now((("x", (2**24, 2)),)), "template", costs_privacy=False),
    Cheat("device-shared", "template", now((("x", (2**24, 2**24, 2**24)),)), "template", costs_privacy=False),
    Cheat("device-shared", "template", now((("x", (0, 4)),)), "template", costs_privacy=False),
    Cheat("device-shared", "template", now((("x", (-64, -4)),)), "template", costs_privacy=False),
    Cheat("device-shared", "template", now((("x", (64,)), ("x", (64,)))), "template", costs_privacy=False),
    Cheat("device-shared", "template", now((("x", (640, 40)),)), "z_eff", costs_privacy=False),
]
COSTLY = [cheat for cheat in CHEATS if cheat.costs_privacy]


@pytest.mark.parametrize("cheat", CHEATS, ids=str)
def test_one_changed_field_is_refused_by_name(cheat: Cheat, folder: Path) -> None:
    with pytest.raises(ProtocolError) as caught:
        floors.check(cheat.applied(folder), COMPILED)
    message = str(caught.value)
    assert cheat.complaint in message.partition(":")[0]
    assert "expected" in message and "got" in message and "leave the run" in message and "\n" not in message


def claimed(manifest: Manifest) -> float:
    """What somebody who takes the manifest's word would say that it costs: its z_eff, its delta, its budget."""
    unit = the_unit(manifest)
    event = accounting.event_of(unit, manifest)
    by_z_eff = accounting.epsilon(event, manifest.release.max_releases, unit.target_delta)
    return min(by_z_eff, *(budget for _, budget in manifest.target_epsilon))


def really(manifest: Manifest) -> float:
    """What the accountant finds behind a manifest, from what a device would clip, round, draw and release.

    At delta = 1e-5, whatever the manifest says; with 20 honest shares, which is all that these runs can count on.
    """
    unit, release = the_unit(manifest), manifest.release
    travels = release.device is not None
    norm, scale = (release.encoding_norm, release.scale) if travels else (unit.clip_norm, unit.scale)
    bound = encoding.sensitivity(norm, scale, manifest.num_coordinates)
    shares = NUM_HONEST if unit.noise == "shared" else 1
    sampling_rate, steps = (1.0, 1) if travels else (manifest.local.sampling_rate, manifest.local.num_steps)
    if unit.noise_variance <= 9:
        return math.inf
    event = accounting.PrivacyEvent(
        "device" if travels else "example",
        unit.noise,
        math.sqrt(shares * (unit.noise_variance - 9)) / bound,
        sampling_rate,
        steps,
        norm,
    )
    return accounting.epsilon(event, release.max_releases, DELTA)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_behind_an_honest_manifest_is_what_it_claims(mode: str, folder: Path) -> None:
    manifest = honest(mode, folder)
    assert really(manifest) == claimed(manifest) == floors.run_epsilon(the_unit(manifest), manifest)


@pytest.mark.parametrize("cheat", COSTLY, ids=str)
def test_twin_taken_at_its_word_the_cheat_costs_more_than_it_claims(cheat: Cheat, folder: Path) -> None:
    manifest = cheat.applied(folder)
    if cheat.field == "release.device.clip_norm":  # the update is clipped to what travels, the same in an honest plan
        manifest = changed(manifest, "release.encoding_norm", cheat.change)
    if cheat.field == "release.device.scale":
        manifest = changed(manifest, "release.scale", cheat.change)
    assert really(manifest) > claimed(manifest)


def test_twin_shares_sized_for_more_devices_than_are_honest_leave_too_little_noise(folder: Path) -> None:
    """The cheat behind num_shares and n_honest, carried through: variance for 24 shares, of which 20 are there."""
    manifest = honest("device-shared", folder)
    unit = the_unit(manifest)
    smaller = replace(unit, num_shares=24, noise_variance=math.ceil(unit.noise_variance * NUM_HONEST / 24))
    release = replace(manifest.release, device=smaller, n_honest=24)
    cheat = replace(manifest, release=release)
    assert really(cheat) > claimed(cheat)
    with pytest.raises(ProtocolError, match="n_honest"):
        floors.check(cheat, COMPILED)


def test_twin_in_too_few_bits_the_sum_is_misread() -> None:
    """Ten updates at the clip norm add up to 81920 in one coordinate: in 16 bits that reads 16384."""
    total = np.array([10 * 2**13])
    assert encoding.unwrap(encoding.wrap(total, 24), 24) == total
    assert encoding.unwrap(encoding.wrap(total, 16), 16) == 16384


def test_a_share_so_small_that_a_hundredth_of_it_buys_nothing_is_refused(folder: Path) -> None:
    """At variance 300 the 9 that an integer share gives up are 3 %: consistent in every other respect."""
    manifest = honest("device-shared", folder)
    unit = the_unit(manifest)
    bound = encoding.sensitivity(unit.clip_norm, unit.scale, manifest.num_coordinates)
    z_eff = accounting.effective_multiplier(300, NUM_HONEST, bound)
    multiplier = math.sqrt(NUM_HONEST * 300) / (unit.clip_norm * unit.scale)
    small = replace(unit, noise_variance=300, z_eff=z_eff, noise_multiplier=multiplier)
    with pytest.raises(ProtocolError, match=r"device\.z_eff: expected at least"):
        floors.check(changed(manifest, "release.device", now(small)), COMPILED)


NOT_A_DEVICES_MATTER = {
    # What is computed, and on what: the device's own model is compared with it, or nothing depends on it.
    *("run_id", "base_fingerprint", "lora"),
    *("local.learning_rate", "local.max_length", "local.detach_prefix"),
}


@pytest.mark.parametrize("mode", ["example-shared", "device-shared"])
def test_shared_noise_that_counts_on_fewer_than_two_thirds_is_refused(mode: str, folder: Path) -> None:
    """More corrupt devices than a third could take the sum apart: epsilon would not hold under its own assumption."""
    manifest = honest(mode, folder)
    least = manifest.release.min_survivors
    too_few = changed(manifest, "release.n_honest", lambda _: -(-2 * least // 3) - 1)
    with pytest.raises(ProtocolError, match=r"release\.n_honest"):
        consistency.check_consistency(too_few)


def test_every_field_of_a_manifest_has_a_cheat_or_a_reason_to_have_none() -> None:
    every = {field.name for field in fields(Manifest)} - {
        "local",
        "release",
        "evaluation",
    }  # the last: test_device_evaluation.py
    every |= {f"local.{field.name}" for field in fields(LocalPlan)}
    every |= {f"release.{field.name}" for field in fields(ReleasePlan)} - {"release.example"}
    every |= {f"release.device.{field.name}" for field in fields(UnitPlan)}
    assert every - {cheat.field for cheat in CHEATS} == NOT_A_DEVICES_MATTER


def numbers_in(value: Any, path: str = "") -> list[str]:
    found = []
    for field in fields(value):
        inner, where = getattr(value, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(inner):
            found += numbers_in(inner, f"{where}.")
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            found.append(where)
    return found


STRANGE = [math.nan, math.inf, -math.inf, 0, -1, -0.5, 1e-320, 1e308, 10**400, 2**63, 2**24, 256, 1e-13, 0.999999]


@settings(max_examples=200)
@given(data=st.data())
def test_whatever_number_stands_in_any_fields_the_answer_is_one_of_ours(data: st.DataObject, folder: Path) -> None:
    manifest = honest(data.draw(st.sampled_from(sorted(MODES))), folder)
    for path in data.draw(st.lists(st.sampled_from(numbers_in(manifest)), min_size=1, max_size=2, unique=True)):
        manifest = changed(manifest, path, now(data.draw(st.sampled_from(STRANGE))))
    limits = data.draw(st.sampled_from([COMPILED, Limits(max_lone_epsilon=5.0, min_corrupt_fraction=0.5)]))
    try:
        floors.check(manifest, limits)
    except ProtocolError as error:
        assert len(str(error)) < 500


@pytest.mark.parametrize("num_steps", [10**4, 10**5])
def test_a_hopeless_manifest_is_found_out_without_composing_it(num_steps: int, folder: Path) -> None:
    """A hundred thousand steps at little noise would take the accountant gigabytes; the first few already say enough."""
    manifest = replace(honest("example-local", folder), target_epsilon=())
    manifest = changed(manifest, "local.num_steps", now(num_steps))
    with pytest.raises(ProtocolError, match="epsilon of the whole run: expected 0 to 10, got inf"):
        floors.check(manifest, COMPILED)


# A device's own limits.

LIMITED = [
    ("device-shared", Limits(max_epsilon=7.9), "target_epsilon"),
    ("device-shared", Limits(max_target_delta=9e-6), "device.target_delta"),
    ("device-shared", Limits(max_lone_epsilon=20.0), "epsilon of a lone honest device"),
    ("device-server", Limits(max_lone_epsilon=1e6), "epsilon of a lone honest device"),
    ("device-shared", Limits(max_participations=4), "max_releases"),
    ("device-shared", Limits(min_survivors=21), "min_survivors"),
    ("device-shared", Limits(max_devices=23), "max_devices"),
    ("device-shared", Limits(min_corrupt_fraction=0.05), "n_honest"),
    ("device-server", Limits(allow_server_noise=False), "device.noise"),
]


@pytest.mark.parametrize(("mode", "limits", "complaint"), LIMITED, ids=[complaint for *_, complaint in LIMITED])
def test_what_is_beyond_a_limit_is_refused_by_name(mode: str, limits: Limits, complaint: str, folder: Path) -> None:
    with pytest.raises(ProtocolError, match="beyond this device's limits") as caught:
        floors.check(honest(mode, folder), limits)
    assert complaint in str(caught.value).partition(":")[0]


def test_what_is_at_every_limit_passes(folder: Path) -> None:
    at_the_edge = Limits(
        max_epsilon=BUDGET,
        max_target_delta=DELTA,
        max_participations=5,
        min_survivors=NUM_HONEST,
        max_devices=24,
        min_corrupt_fraction=0.0,
    )
    floors.check(honest("device-shared", folder), at_the_edge)
    local = replace(at_the_edge, max_lone_epsilon=BUDGET, allow_server_noise=False, min_corrupt_fraction=0.9)
    floors.check(honest("example-local", folder), local)  # needs nobody else to be honest


def test_without_a_budget_the_devices_own_accountant_still_sets_the_limit(folder: Path) -> None:
    manifest = replace(honest("device-shared", folder), target_epsilon=())
    floors.check(manifest, Limits(max_epsilon=BUDGET))
    with pytest.raises(ProtocolError, match="epsilon of the whole run"):
        floors.check(manifest, Limits(max_epsilon=7.9))


def test_both_units_are_held_against_the_limit_each_by_itself(folder: Path) -> None:
    floors.check(honest("both", folder), Limits(max_epsilon=BUDGET))


def test_a_run_without_privacy_is_refused_unless_the_limits_allow_it(folder: Path) -> None:
    manifest = planning.make_manifest(tiny_run.config(folder, "none"), "run", BASE, None)
    with pytest.raises(ProtocolError, match="expected a protected unit"):
        floors.check(manifest, COMPILED)
    floors.check(manifest, replace(COMPILED, allow_no_privacy=True))


SECTIONS = st.builds(
    FloorsSection,
    max_epsilon=st.none() | st.floats(0.1, 100),
    max_target_delta=st.none() | st.floats(1e-11, 0.5),
    max_lone_epsilon=st.none() | st.floats(0.1, 100),
    max_participations=st.none() | st.integers(1, 1000),
    min_survivors=st.none() | st.integers(1, 1000),
    max_devices=st.none() | st.integers(1, 1000),
    min_corrupt_fraction=st.none() | st.floats(0, 0.9),
    allow_no_privacy=st.none() | st.booleans(),
    allow_server_noise=st.none() | st.booleans(),
)


def is_at_least_as_strict(limits: Limits, other: Limits) -> bool:
    """Written out field by field, as a reader would."""

    def above(limit: float | None) -> float:
        return math.inf if limit is None else limit

    return (
        limits.max_epsilon <= other.max_epsilon
        and limits.max_target_delta <= other.max_target_delta
        and above(limits.max_lone_epsilon) <= above(other.max_lone_epsilon)
        and above(limits.max_participations) <= above(other.max_participations)
        and limits.min_survivors >= other.min_survivors
        and limits.max_devices <= other.max_devices
        and limits.min_corrupt_fraction >= other.min_corrupt_fraction
        and limits.allow_no_privacy <= other.allow_no_privacy
        and limits.allow_server_noise <= other.allow_server_noise
    )


@given(SECTIONS, SECTIONS)
def test_no_file_makes_a_limit_looser_and_a_stricter_value_wins(first: FloorsSection, second: FloorsSection) -> None:
    once = floors.tighten(COMPILED, first)
    twice = floors.tighten(once, second)
    assert is_at_least_as_strict(once, COMPILED)
    assert is_at_least_as_strict(twice, once)
    assert floors.tighten(twice, first) == twice
    for name, wanted in first.model_dump(exclude_none=True).items():
        assert getattr(once, name) in (wanted, getattr(COMPILED, name))


def test_a_file_can_say_every_limit_and_nothing_else() -> None:
    assert set(FloorsSection.model_fields) == {field.name for field in fields(Limits)}
    stricter = FloorsSection(
        max_epsilon=1.0,
        max_target_delta=1e-6,
        max_lone_epsilon=20.0,
        max_participations=3,
        min_survivors=50,
        max_devices=100,
        min_corrupt_fraction=0.1,
        allow_no_privacy=False,
        allow_server_noise=False,
    )
    assert dataclasses.asdict(floors.tighten(COMPILED, stricter)) == stricter.model_dump()


def test_a_looser_value_in_a_file_changes_nothing() -> None:
    looser = FloorsSection(max_epsilon=99.0, min_survivors=1, max_devices=1000, allow_no_privacy=True)
    assert floors.tighten(COMPILED, looser) == COMPILED
