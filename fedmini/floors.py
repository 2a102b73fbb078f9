"""What a device refuses, whatever anybody signs: manifests that contradict themselves, and those beyond its limits.

A signature says who made a manifest, not that it is true. So a device computes every number that privacy rests on
again, from the integers it will really draw (`noise_variance`, `num_shares`, the norm bound), and holds the epsilon of
its own accountant against limits that are compiled in. Its owner can make them stricter, nobody can make them looser.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from fedmini.config import FloorsSection
from fedmini.privacy import consistency
from fedmini.privacy.consistency import require, within
from fedmini.types import Manifest, UnitPlan

BEYOND = "that is beyond this device's limits: leave the run, or have its operator sign a stricter manifest"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device takes part in: `max_` bounds from above, `min_` from below, `allow_` permits. None: no limit."""

    max_epsilon: float = 10.0  # of each unit for the whole run, by the device's own accountant; of each budget too
    max_target_delta: float = 1e-4
    max_lone_epsilon: float | None = None  # were all others against it, the server too: infinite for server noise
    max_participations: int | None = None  # in one run, attempts that are lost included: the manifest's max_releases
    min_survivors: int = 2
    max_devices: int = 150  # in one round
    min_corrupt_fraction: float = 0.0  # of the survivors; where noise is shared
    allow_no_privacy: bool = False
    allow_server_noise: bool = True


COMPILED = Limits()


def tighten(limits: Limits, config: FloorsSection) -> Limits:
    """The limits, with a device's own values where those are stricter. Guarantee: never looser, whatever they are."""
    wanted = {name: getattr(config, name) for name in FloorsSection.model_fields}
    given = {name: value for name, value in wanted.items() if value is not None}
    return replace(limits, **{name: _stricter(name, getattr(limits, name), value) for name, value in given.items()})


def _stricter(name: str, limit: Any, wanted: Any) -> Any:
    if limit is None:
        return wanted
    return max(limit, wanted) if name.startswith("min_") else min(limit, wanted)  # False is less than True


def check(manifest: Manifest, limits: Limits) -> None:
    """Raise ProtocolError, naming the field, unless a manifest is consistent and within the limits."""
    consistency.check_consistency(manifest)
    for one in manifest.parts:
        _check_plan(one, limits)
    if limits.max_participations is not None:
        num_releases = sum(one.release.max_releases for one in manifest.parts)
        within("release.max_releases, evaluations included", num_releases, 1, limits.max_participations, BEYOND)
    for unit in manifest.release.units:
        _check_epsilon(unit, manifest, limits)


def _check_plan(manifest: Manifest, limits: Limits) -> None:
    release = manifest.release
    require(bool(release.units) or limits.allow_no_privacy, "release", "a protected unit", "none", BEYOND)
    within("release.min_survivors", release.min_survivors, limits.min_survivors, math.inf, BEYOND)
    within("release.max_devices", release.max_devices, 1, limits.max_devices, BEYOND)
    for _, budget in manifest.target_epsilon:
        within("target_epsilon", budget, 0, limits.max_epsilon, BEYOND)
    for unit in release.units:
        _check_unit(unit, manifest, limits)


def _check_unit(unit: UnitPlan, manifest: Manifest, limits: Limits) -> None:
    name, release = f"release.{unit.unit}", manifest.release
    within(f"{name}.target_delta", unit.target_delta, 0, limits.max_target_delta, BEYOND)
    if unit.noise == "server":
        require(limits.allow_server_noise, f"{name}.noise", "local or shared", unit.noise, BEYOND)
    if unit.noise == "shared":
        most = math.floor(release.min_survivors * (1 - limits.min_corrupt_fraction) + 1e-9)
        within("release.n_honest", release.n_honest, 1, most, BEYOND)


def _check_epsilon(unit: UnitPlan, manifest: Manifest, limits: Limits) -> None:
    name = f"release.{unit.unit}"
    within(f"{name}, epsilon of the whole run", run_epsilon(unit, manifest), 0, limits.max_epsilon, BEYOND)
    if limits.max_lone_epsilon is not None:
        lone = lone_epsilon(unit, manifest)
        within(f"{name}, epsilon of a lone honest device", lone, 0, limits.max_lone_epsilon, BEYOND)


def run_epsilon(unit: UnitPlan, manifest: Manifest) -> float:
    """What a whole run can cost one unit: all releases that a device may be in, lost attempts and evaluations included.

    At the unit's own target_delta, from a consistent manifest's noise variance: no multiplier in it is relied on.
    Infinite above 100, and where the noise is below a fifth of the sensitivity.
    """
    return consistency.whole_run_epsilon(unit.unit, manifest, is_alone=False)


def lone_epsilon(unit: UnitPlan, manifest: Manifest) -> float:
    """`run_epsilon` with no noise but the device's own: what is left if nobody else is honest, nor the server."""
    if unit.noise == "server":
        return math.inf
    return consistency.whole_run_epsilon(unit.unit, manifest, is_alone=True)
