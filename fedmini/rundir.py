"""A run's directory: what lies where, and that it is this run's and nobody else's.

RUN/config.toml       RUN/manifest.json     RUN/metrics.jsonl     RUN/ledger.jsonl     RUN/privacy.json
RUN/report.html       RUN/checkpoints/round-0007/...              RUN/adapter/...      (plain PEFT)
RUN/devices/...       (with secure aggregation: each device's own ledger)
RUN/evaluation-ledger.jsonl      (where devices evaluate: what that cost)
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmini.config import RunConfig, dump_run_config, load_run_config
from fedmini.errors import ConfigError, StateError
from fedmini.files import replace_synced
from fedmini.types import Manifest


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The files of one run, by name."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def evaluation_ledger(self) -> Path:
        return self.path / "evaluation-ledger.jsonl"

    @property
    def privacy(self) -> Path:
        return self.path / "privacy.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def devices(self) -> Path:
        return self.path / "devices"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"


def create(path: Path) -> RunDirectory:
    """A new, empty run directory that can be written to.

    Raises StateError where the folder holds a run already, or anything else; ConfigError where it can't be written.
    """
    run = RunDirectory(path)
    if run.manifest.exists():
        raise StateError(f"{path} holds a run already: add --resume to go on with it, or choose another --output")
    if path.is_file() or (path.is_dir() and _foreign_files(path)):
        raise StateError(f"{path} is there already and is no run: choose another --output")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"can't write to {path}: {error.strerror}; choose another --output") from error
    return run


def open_existing(path: Path) -> RunDirectory:
    """The directory of a run that has begun. Raises StateError where there is none."""
    run = RunDirectory(path)
    if not run.manifest.exists():
        raise StateError(f"{path} holds no run to resume: leave --resume away to begin one there")
    return run


def begin(run: RunDirectory, config: RunConfig, manifest: Manifest, environment: Mapping[str, Any]) -> None:
    """Write down what this run is; from here on the directory is taken."""
    replace(run.config, dump_run_config(config).encode(), "run the same command again")
    record = {"hash": manifest.hash, "environment": dict(environment), "manifest": json.loads(manifest.canonical)}
    content = json.dumps(record, indent=1, sort_keys=True).encode()
    replace(run.manifest, content, "run the same command again")


def stored_config(run: RunDirectory) -> RunConfig:
    """The configuration this run began with, everything that was "auto" resolved."""
    return load_run_config(run.config)


def stored_manifest(run: RunDirectory) -> dict[str, Any]:
    """What `begin` wrote beside the configuration: manifest, its hash, and the environment. Raises StateError."""
    try:
        record: dict[str, Any] = json.loads(run.manifest.read_bytes())
        record["hash"], record["manifest"]["run_id"], record["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{run.manifest} is missing or damaged: restore it from a backup") from error
    return record


def write_metrics(run: RunDirectory, history: Sequence[Mapping[str, Any]]) -> None:
    """All metrics lines so far, replaced atomically: a reader never sees half a line."""
    replace(run.metrics, b"".join(json.dumps(line).encode() + b"\n" for line in history))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """One JSON file, replaced atomically."""
    replace(path, json.dumps(record, indent=1).encode() + b"\n")


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """The metrics lines of a finished or running run. Raises StateError where there are none to read."""
    try:
        return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise StateError(f"{run.metrics} is missing or damaged: is {run.path} a run's directory?") from error


def replace(path: Path, content: bytes, then: str = "run with --resume") -> None:
    """Put one of a run's files in place atomically. Raises StateError."""
    try:
        replace_synced(path, content)
    except OSError as error:
        raise StateError(f"can't write {path}: {error.strerror}; make room or mend the folder, then {then}") from error


def _foreign_files(path: Path) -> list[str]:
    """What a run that was killed before it began does not leave behind."""
    ours = {"config.toml", "ledger.jsonl", "evaluation-ledger.jsonl"}
    return [name for name in os.listdir(path) if name not in ours and not name.startswith(".")]
