"""What a run's directory says of it, read once and checked, for the page and the plots."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fedmini import rundir
from fedmini.config import RunConfig
from fedmini.errors import StateError
from fedmini.privacy import chain
from fedmini.rundir import RunDirectory
from fedmini.types import ADJACENCY

# What every metrics line must hold as a number; the rest may be null.
COUNTED = ("round", "num_sampled", "num_survivors", "upload_bytes_per_device", "download_bytes_per_device", "seconds")


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One unit's promise. What only privacy.json can say is None while that is not written."""

    unit: str
    adjacency: str
    epsilon: float
    delta: float
    budget: float | None
    clip_norm: float
    noise: str
    z_eff: float
    mechanism: str | None = None
    holds_against: str | None = None
    num_releases: int | None = None
    n_honest: int | None = None
    min_survivors: int | None = None
    epsilon_lone: float | None = None  # were every other device of each cohort the adversary's
    assumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    """The ledger as it stands: its verified lines, and the hash of its file."""

    lines: tuple[chain.Line, ...]
    sha256: str | None  # None: there is no file, as where nothing was ever debited

    @property
    def was_seeded(self) -> bool:
        """Whether any release was debited under a seed."""
        return any(line["seeded"] for line in self.lines)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Everything that a report tells of a run."""

    config: RunConfig
    config_text: str
    record: Mapping[str, Any]  # manifest.json: hash, environment, manifest
    history: tuple[Mapping[str, Any], ...]  # the lines of metrics.jsonl, round 0 first
    ledger: LedgerFacts
    is_stated: bool  # whether privacy.json is there, and as new as the ledger
    guarantees: tuple[Guarantee, ...]
    not_covered: tuple[str, ...]
    grounds: tuple[str, ...]  # where the sum was formed and how epsilon was computed, as privacy.json says

    @property
    def rounds(self) -> tuple[Mapping[str, Any], ...]:
        """The lines of rounds that trained something."""
        return tuple(line for line in self.history if line["round"] > 0)

    @property
    def num_rounds(self) -> int:
        """Rounds committed so far."""
        return max((int(line["round"]) for line in self.history), default=0)

    @property
    def num_rounds_planned(self) -> int:
        return int(self.record["manifest"]["num_rounds"])

    @property
    def is_private(self) -> bool:
        """Whether anything was protected at all."""
        return bool(self.guarantees)

    @property
    def is_seeded(self) -> bool:
        """Whether somebody who has the seed can take the noise away."""
        return self.config.run.seed is not None or self.ledger.was_seeded

    def series(self, key: str) -> tuple[tuple[int, float], ...]:
        """(round, value) of every line that has a finite number under this key."""
        return tuple((int(line["round"]), float(line[key])) for line in self.history if is_finite(line.get(key)))


def read_facts(directory: Path) -> RunFacts:
    """What the files of a finished or running run say.

    Raises StateError where the directory is no run, or where a file is damaged or another run's.
    """
    run = RunDirectory(directory)
    if not run.manifest.exists():
        raise StateError(f"{directory} is no run's directory: expected a manifest.json in it")
    record = rundir.stored_manifest(run)
    history = _history(run)
    ledger = _ledger(run, record["manifest"]["run_id"])
    stated = _statement(run, record, ledger)
    try:
        return RunFacts(
            config=rundir.stored_config(run),
            config_text=run.config.read_text(encoding="utf-8"),
            record=record,
            history=history,
            ledger=ledger,
            is_stated=stated is not None,
            guarantees=_stated(stated) if stated is not None else _provisional(record, history),
            not_covered=tuple(str(item) for item in stated["not_covered"]) if stated is not None else (),
            grounds=_grounds(stated) if stated is not None else (),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"{run.manifest} or {run.privacy} is damaged: restore them from a backup") from error


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value out of a JSON file is a number that can be plotted."""
    return isinstance(value, int | float) and math.isfinite(value)


def _history(run: RunDirectory) -> tuple[Mapping[str, Any], ...]:
    if not run.metrics.exists():  # a run writes its first line after its first evaluation
        return ()
    lines = rundir.read_metrics(run)
    for line_num, line in enumerate(lines, 1):
        if not (isinstance(line, dict) and isinstance(line.get("epsilon"), dict)):
            raise StateError(f"{run.metrics}, line {line_num} is damaged: expected one JSON object with an epsilon")
        wrong = [key for key in COUNTED if not is_finite(line.get(key))]
        if wrong:
            raise StateError(f"{run.metrics}, line {line_num} is damaged: expected a number as {', '.join(wrong)}")
    return tuple(lines)


def _ledger(run: RunDirectory, run_id: str) -> LedgerFacts:
    """Read and verified without the lock: a run that goes on may be writing."""
    if not run.ledger.exists():
        return LedgerFacts((), None)
    content = run.ledger.read_bytes()
    lines = chain.parse(content, run.ledger)
    if any(line["run_id"] != run_id for line in lines):
        raise StateError(f"{run.ledger} belongs to another run than {run.manifest}: restore it from a backup")
    return LedgerFacts(tuple(lines), hashlib.sha256(content).hexdigest())


def _statement(run: RunDirectory, record: Mapping[str, Any], ledger: LedgerFacts) -> dict[str, Any] | None:
    """privacy.json; None where there is none, or where the ledger has gone on since it was written."""
    if not run.privacy.exists():
        return None
    try:
        stated: dict[str, Any] = json.loads(run.privacy.read_bytes())
        manifest_hash, num_lines, last_hash = (
            stated["manifest_hash"],
            int(stated["ledger_lines"]),
            stated["ledger_hash"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{run.privacy} is damaged: restore it from a backup") from error
    if manifest_hash != record["hash"]:
        raise StateError(f"{run.privacy} belongs to another run than {run.manifest}: restore it from a backup")
    if num_lines > len(ledger.lines) or chain.position(ledger.lines, num_lines).hash != last_hash:
        raise StateError(f"{run.ledger} is not the one that {run.privacy} was written from: restore both from a backup")
    return stated if num_lines == len(ledger.lines) else None


def _grounds(statement: Mapping[str, Any]) -> tuple[str, ...]:
    known = (("simulated", "this is a simulation: "), ("accountant", "epsilon was computed with "))
    found = [f"{opening}{statement[key]}" for key, opening in known if key in statement]
    secure = statement.get("secure_aggregation")
    if isinstance(secure, Mapping):
        found.append(f"the sums were formed by secure aggregation, which holds against {secure.get('holds_against')}")
    return tuple(found)


def _stated(statement: Mapping[str, Any]) -> tuple[Guarantee, ...]:
    return tuple(
        Guarantee(
            unit=str(found["unit"]),
            adjacency=str(found["adjacency"]),
            epsilon=float(found["epsilon"]),
            delta=float(found["delta"]),
            budget=found["budget"],
            clip_norm=float(found["clip_norm"]),
            noise=str(found["noise"]),
            z_eff=float(found["z_eff"]),
            mechanism=str(found["mechanism"]),
            holds_against=str(found["holds_against"]),
            num_releases=int(found["num_releases"]),
            n_honest=found.get("n_honest"),
            min_survivors=found.get("min_survivors"),
            epsilon_lone=found.get("epsilon_of_a_lone_honest_device"),
            assumes=tuple(str(item) for item in found["assumes"]),
        )
        for found in statement["guarantees"]
    )


def _provisional(record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> tuple[Guarantee, ...]:
    """What can be said of a run that has not written its statement: its plan, and what its last round had spent."""
    release = record["manifest"]["release"]
    budgets = dict(record["manifest"]["target_epsilon"])
    spent: Mapping[str, float] = history[-1].get("epsilon", {}) if history else {}
    return tuple(
        Guarantee(
            unit=unit,
            adjacency=adjacency,
            epsilon=float(spent.get(unit, 0.0)),
            delta=float(release[unit]["target_delta"]),
            budget=budgets.get(unit),
            clip_norm=float(release[unit]["clip_norm"]),
            noise=str(release[unit]["noise"]),
            z_eff=float(release[unit]["z_eff"]),
        )
        for unit, adjacency in ADJACENCY.items()
        if release[unit] is not None
    )
