"""privacy.json: what a run promises, to whom, on what grounds, and what it does not; for a reader who checks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedmini.privacy import accounting
from fedmini.privacy.ledger import Ledger, epsilon_over
from fedmini.secagg import checks
from fedmini.secagg.messages import VERSION
from fedmini.types import ADJACENCY, EvaluationManifest, Manifest, UnitPlan

NOT_COVERED = (
    "that a device took part at all, and joining or leaving",
    "whether a device has more or fewer examples than the minimum",
    "the time a reply takes; the seconds and memory of a round, which a simulation writes down as they are",
    "an example that was typed more than once counts as several examples",
    "a person who uses several devices, or installs again, counts as several people",
    "several runs over the same data: their epsilons add up, and only a device's own ledger sees that",
    "the search for good settings, where it was made on the same people",
    "the public base model and what it was trained on",
    "the text that the loss is measured on: that one number is published without noise",
    "the run's own folder beyond the adapter, the report, the metrics and this file: manifest.json holds a digest of all "
    "encoded examples, with which a guess at all of them can be checked",
    "floating-point arithmetic: an example's gradient differs in its last digits with who else is in its batch "
    "(in float32 far below the rounding to integers, in bfloat16 up to some percent of the clip norm)",
)

NO_PRIVACY = "This run was made WITHOUT privacy: the adapter may reveal what any one example says."
SIMULATED = "all devices and the server were one process: whoever ran it saw every example and every contribution"
NOT_SECURE = "none: the contributions were added up directly; in a deployment the sum is formed by secure aggregation"
SEEDED = (
    "This run drew its noise from a seed that is written beside it: whoever has the seed can take the noise away. "
    "It is for reproducing, and protects nobody."
)


def privacy_statement(
    manifest: Manifest,
    ledger: Ledger,
    evaluation_ledger: Ledger | None = None,
    *,
    is_secure: bool,
    is_simulated: bool = True,
) -> dict[str, Any]:
    """The statement of a run as it stands, every epsilon computed from its ledger, and that of its evaluations on devices.

    `is_secure`: whether the sums were formed by secure aggregation. `is_simulated`: whether all of it was one process.
    """
    units = manifest.release.units
    ledgers = (ledger,) if evaluation_ledger is None else (ledger, evaluation_ledger)
    is_seeded = any(one.was_seeded for one in ledgers)
    return {
        "run_id": manifest.run_id,
        "manifest_hash": manifest.hash,
        "is_private": bool(units) and not is_seeded and all(math.isfinite(_spent(unit, ledgers)) for unit in units),
        "summary": _summary(manifest, ledgers),
        "guarantees": [_guarantee(unit, manifest, ledgers) for unit in units],
        "evaluation_on_devices": _evaluation(manifest, evaluation_ledger),
        "ledger_lines": ledger.position.seq,
        "ledger_hash": ledger.position.hash,
        "noise_was_seeded": is_seeded,
        "simulated": SIMULATED if is_simulated else None,
        "secure_aggregation": _secure_aggregation(manifest) if is_secure else NOT_SECURE,
        "accountant": "dp-accounting, privacy loss distributions, grid 1e-4; the argument is docs/accounting.md",
        "not_covered": list(NOT_COVERED),
    }


def _evaluation(manifest: Manifest, ledger: Ledger | None) -> dict[str, Any] | None:
    """What the devices' evaluations cost by themselves; None where there are none."""
    evaluated, plan = manifest.for_evaluation, manifest.evaluation
    if evaluated is None or plan is None or ledger is None:
        return None
    return {
        "measures": f"the mean loss on the {plan.fraction:.0%} of each device's examples that are never trained on",
        "guarantees": [_guarantee(unit, evaluated, (ledger,)) for unit in evaluated.release.units],
        "ledger_lines": ledger.position.seq,
        "ledger_hash": ledger.position.hash,
        "composed": "the epsilon of each guarantee above holds for training and evaluations together, as if every unit had been "
        "in both; an example is in one of the two only",
    }


def _summary(manifest: Manifest, ledgers: Sequence[Ledger]) -> str:
    units = manifest.release.units
    if not units:
        return NO_PRIVACY
    parts = [
        f"epsilon = {accounting.rounded_up(_spent(unit, ledgers))} at delta = {unit.target_delta:g} for {ADJACENCY[unit.unit]}"
        for unit in units
    ]
    text = "; and, as a separate guarantee, ".join(parts) + "."
    return f"{SEEDED} Nominally: {text}" if any(one.was_seeded for one in ledgers) else text


def _spent(unit: UnitPlan, ledgers: Sequence[Ledger]) -> float:
    return epsilon_over(ledgers, unit.unit, unit.target_delta)


def _guarantee(unit: UnitPlan, manifest: Manifest, ledgers: Sequence[Ledger]) -> dict[str, Any]:
    """One unit's, in everything that these ledgers hold; the mechanism is that of the first's releases."""
    ledger = ledgers[0]
    event = accounting.event_of(unit, manifest)
    release = manifest.release
    found: dict[str, Any] = {
        "unit": unit.unit,
        "adjacency": ADJACENCY[unit.unit],
        "epsilon": _spent(unit, ledgers),
        "delta": unit.target_delta,
        "budget": dict(manifest.target_epsilon).get(unit.unit),
        "mechanism": _mechanism(unit, isinstance(manifest, EvaluationManifest)),
        "noise": unit.noise,
        "noise_multiplier": unit.noise_multiplier,
        "z_eff": unit.z_eff,
        "clip_norm": unit.clip_norm,
        "sampling_rate": event.sampling_rate,
        "steps_per_release": event.num_steps,
        "num_releases": ledger.max_participation(unit.unit),
        "holds_against": holds_against(unit),
        "assumes": _assumes(unit, manifest),
    }
    if unit.noise == "shared":
        found["epsilon_of_a_lone_honest_device"] = _lone(unit, ledgers)
        found["n_honest"] = unit.num_shares
        found["min_survivors"] = release.min_survivors
    return found


def _lone(unit: UnitPlan, ledgers: Sequence[Ledger]) -> float:
    """What the releases in these ledgers cost where each holds one honest share: z_eff falls with the root of their number."""
    parts = [
        (replace(event, z_eff=event.z_eff / math.sqrt(unit.num_shares)), count)
        for ledger in ledgers
        for event, count in ledger.composition(unit.unit)
    ]
    return accounting.compose(parts, unit.target_delta)


def _secure_aggregation(manifest: Manifest) -> dict[str, Any]:
    """What the protocol promises of one contribution, and on what grounds."""
    least, most = manifest.release.min_survivors, manifest.release.max_devices
    return {
        "protocol": f"fedmini secure aggregation, version {VERSION}; docs/secure-aggregation.md",
        "hides": "each contribution from everyone, the server included: only the sum over the survivors is opened",
        "holds_against": f"a server that lies, together with up to {_most_corrupt(least, most)} of its devices, "
        f"whichever {least} to {most} it invites",
        "assumes": [
            "the operator enrols devices of real people only: it could enrol any number of its own",
            "the operator's signing key is not the server's",
            f"{least} or more devices are in every sum, and more than two thirds of those that began stay to its end: the "
            "devices give up a round otherwise",
        ],
        "does_not_hide": "the sum itself (which the noise is for), and who took part",
    }


def _most_corrupt(least_devices: int, most_devices: int) -> int:
    """How many devices may work for the server, in a cohort of whatever size between the two that it chooses.

    With n devices and a threshold t, 2 t > n + corrupt keeps both kinds of one device's shares apart, and two outcomes.
    """
    return min(2 * checks.lowest_threshold(size) - size - 1 for size in range(least_devices, most_devices + 1))


def _mechanism(unit: UnitPlan, is_evaluation: bool) -> str:
    subject = "each example's gradient" if unit.unit == "example" else "each device's whole update"
    if is_evaluation:
        subject = f"each {unit.unit}'s loss, bounded, with a count of one beside it,"
    source = {
        "local": "the device adds the whole noise to the sum in every local step",
        "shared": f"every device adds a share of the noise, sized so that {unit.num_shares} shares are enough",
        "server": "the server adds the noise to the sum",
    }[unit.noise]
    return f"{subject} is clipped to L2 norm {unit.clip_norm:g} and rounded to integers; {source}; discrete Gaussian"


def holds_against(unit: UnitPlan) -> str:
    """Against whom a unit's guarantee holds, as it follows \"holds against\"."""
    return {
        "local": "everyone, the server included, whatever other devices do",
        "shared": f"everyone, the server included, while at least {unit.num_shares} devices of every round are honest "
        "and the sum alone is seen",
        "server": "whoever sees the model or its history; not the server, which must be trusted to add the noise",
    }[unit.noise]


def _assumes(unit: UnitPlan, manifest: Manifest) -> list[str]:
    found = ["each device draws its randomness from its operating system's cryptographic generator"]
    if unit.unit == "example":
        found.append("the training set of a device is frozen when it joins the run")
        found.append("nobody but the device sees which examples it drew")
    if unit.noise == "shared":
        found.append(
            f"at least {unit.num_shares} honest devices add their share in every round (of at least "
            f"{manifest.release.min_survivors} survivors): at most {manifest.release.min_survivors - unit.num_shares} of all "
            "devices work against the others, as a server that lies chooses whom it invites and who drops"
        )
        found.append("the server sees the sum and no single contribution (secure aggregation)")
    if unit.noise == "server":
        found.append("the server adds the noise, and shows nobody the sum before it has")
    return found
