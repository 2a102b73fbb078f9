"""ServerState to disk and back, atomically: after a crash there is the old state or the new one, never half of one.

RUN/checkpoints/round-0007/state.json + tensors.safetensors       written whole, synced, then renamed into place
RUN/checkpoints/LATEST                                            which one is newest, and its hash; written last
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedmini import files
from fedmini.errors import StateError
from fedmini.types import LedgerPosition, Participation, ServerState

FORMAT_VERSION = 2
NUM_KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved state, the run it belongs to, and the metrics lines up to it."""

    manifest_hash: str
    state: ServerState
    history: tuple[dict[str, Any], ...]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that it is on the disk when this returns, then forget all but the newest few.

    Raises StateError where it can't be written; what was saved before is untouched.
    """
    name = f"round-{checkpoint.state.round_num:04d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        tensors = save_tensors(_tensors(checkpoint.state))
        record = json.dumps(_record(checkpoint, tensors), sort_keys=True).encode()
        files.write_synced(partial / "tensors.safetensors", tensors)
        files.write_synced(partial / "state.json", record)
        shutil.rmtree(folder / name, ignore_errors=True)
        partial.rename(folder / name)
        files.sync_folder(folder)
        pointer = {"name": name, "sha256": hashlib.sha256(record).hexdigest()}
        files.replace_synced(folder / "LATEST", json.dumps(pointer).encode())
    except OSError as error:
        raise StateError(
            f"can't save a checkpoint in {folder}: {error.strerror}; make room or mend the folder, then run with --resume"
        ) from error
    for old in _names(folder)[:-NUM_KEPT]:
        shutil.rmtree(folder / old, ignore_errors=True)


def load(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there has never been one.

    A damaged newest one is passed over for the one before it. Raises StateError where all are damaged.
    """
    names = _names(folder)
    if not names:
        return None
    problems = []
    for name in reversed(names):
        try:
            return _read(folder / name)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            problems.append(f"{name}: {type(error).__name__}")
    raise StateError(
        f"every checkpoint in {folder} is damaged ({', '.join(problems)}): restore the folder from a backup"
    )


def _names(folder: Path) -> list[str]:
    """Complete checkpoints, oldest first: a rename put each in place, so a name alone says that it was synced."""
    found = [path.name for path in folder.glob("round-*") if path.is_dir() and path.name[6:].isdecimal()]
    return sorted(found, key=lambda name: int(name[6:]))  # round-10000 comes after round-9999


def _tensors(state: ServerState) -> dict[str, np.ndarray[Any, Any]]:
    tensors: dict[str, np.ndarray[Any, Any]] = {f"adapter/{name}": value for name, value in state.adapter.items()}
    if state.momentum is not None:
        tensors["momentum"] = state.momentum
    if state.second_moment is not None:
        tensors["second_moment"] = state.second_moment
    return tensors


def _record(checkpoint: Checkpoint, tensors: bytes) -> dict[str, Any]:
    state = checkpoint.state
    record = {
        "format": FORMAT_VERSION,
        "manifest_hash": checkpoint.manifest_hash,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "round_num": state.round_num,
        "num_updates": state.num_updates,
        "participations": {device: asdict(past) for device, past in state.participations.items()},
        "ledger": asdict(state.ledger),
        "history": list(checkpoint.history),
    }
    return {**record, "check": _check(record)}


def _check(record: dict[str, Any]) -> str:
    """SHA-256 over everything else in a record: LATEST only knows that of the newest."""
    content = json.dumps({key: value for key, value in record.items() if key != "check"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _read(folder: Path) -> Checkpoint:
    raw = (folder / "state.json").read_bytes()
    pointer = folder.parent / "LATEST"
    if pointer.exists():
        latest = json.loads(pointer.read_bytes())
        if latest["name"] == folder.name and latest["sha256"] != hashlib.sha256(raw).hexdigest():
            raise ValueError("state.json is not what was saved")
    record = json.loads(raw)
    if record["format"] != FORMAT_VERSION:
        raise ValueError(f"format {record['format']}")
    if record["check"] != _check(record):
        raise ValueError("state.json is not what was saved")
    tensors_raw = (folder / "tensors.safetensors").read_bytes()
    if hashlib.sha256(tensors_raw).hexdigest() != record["tensors_sha256"]:
        raise ValueError("tensors.safetensors is not what was saved")
    tensors = load_tensors(tensors_raw)
    prefix = "adapter/"
    state = ServerState(
        round_num=record["round_num"],
        adapter={name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)},
        num_updates=record["num_updates"],
        momentum=tensors.get("momentum"),
        second_moment=tensors.get("second_moment"),
        participations={device: Participation(**past) for device, past in record["participations"].items()},
        ledger=LedgerPosition(**record["ledger"]),
    )
    return Checkpoint(record["manifest_hash"], state, tuple(_lines(record["history"])))


def _lines(history: Sequence[Any]) -> list[dict[str, Any]]:
    if not all(isinstance(line, dict) for line in history):
        raise ValueError("history is not a list of records")
    return list(history)
