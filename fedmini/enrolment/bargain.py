"""What a run may cost a device, in lines for its owner, who agrees to it or does not."""

import math
from collections.abc import Iterator

from fedmini import floors, statement, sums
from fedmini.enrolment.enrolled import Enrolment
from fedmini.phrases import counted
from fedmini.privacy import accounting
from fedmini.types import ADJACENCY, Manifest, UnitPlan

# About what a device sends in a round beside its vector, for each device of it: two shares, sealed, what it commits to
# them with, and one share in the end.
SHARES_BYTES = 256


def describe(manifest: Manifest, own: Enrolment) -> Iterator[str]:
    """What a run may cost this device, every number by its own accountant."""
    release = manifest.release
    upload = sums.upload_bytes(manifest) + SHARES_BYTES * release.max_devices
    yield f"run            {manifest.run_id}, manifest {manifest.hash}"
    yield (
        f"takes part     at most {counted(release.max_releases, 'time')}, lost attempts counted, in "
        f"{counted(manifest.num_rounds, 'round')} of "
        f"about {release.cohort_size} devices"
    )
    yield f"sends          about {upload:,} bytes each time, {upload * release.max_releases:,} in all"
    if manifest.evaluation is not None:
        plan = manifest.evaluation
        yield (
            f"evaluates      at most {counted(plan.num_evaluations, 'time')} on {plan.fraction:.0%} of its examples, which are "
            "never trained on; what that costs is in the numbers below"
        )
    for unit in release.units:
        yield from _describe_unit(unit, manifest, own)


def _describe_unit(unit: UnitPlan, manifest: Manifest, own: Enrolment) -> Iterator[str]:
    shown = accounting.rounded_up
    limit, delta = own.lifetime.lifetime_epsilon, own.lifetime.lifetime_delta
    with own.ledger() as ledger:
        spent = ledger.epsilon(unit.unit, delta)
    after = own.epsilon_after(manifest, unit)
    cost = _shown(floors.run_epsilon(unit, manifest))
    lone = "infinity" if unit.noise == "server" else _shown(floors.lone_epsilon(unit, manifest))
    yield f"may cost       {unit.unit} epsilon {cost} at delta {unit.target_delta:g}, for {ADJACENCY[unit.unit]}"
    yield f"  noise        {unit.noise}, {unit.z_eff:.4f} times the clip norm {unit.clip_norm:g}"
    yield f"  against      {statement.holds_against(unit)}"
    yield f"  lone         epsilon {lone}, were nobody else honest, nor the server"
    yield (
        f"  lifetime     epsilon {shown(spent)} of {limit:g} is spent at delta {delta:g}, {_left(limit, spent)} is left; "
        f"{shown(after)} after the whole run"
    )
    if after > limit:
        yield "               that is above the limit: this device stops before"


def _shown(epsilon: float) -> str:
    """An epsilon of floors.py, rounded up. It is infinite there where it was cut off, not where it is."""
    if math.isinf(epsilon):
        return f"above {accounting.HOPELESS_EPSILON:g}, or of too little noise to be counted"
    return accounting.rounded_up(epsilon)


def _left(limit: float, spent: float) -> str:
    """What is left of a limit, rounded down."""
    return f"{math.floor(max(0.0, limit - spent) * 1000 + 1e-6) / 1000:.3f}"
