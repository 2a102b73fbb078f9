"""The newest adapter that a device was given, on its disk: what it talks with.

DIR/adapters/NEWEST.json + HASH.f32     which run and round it is of, and the flat vector; replaced as one
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedmini import files, vectors
from fedmini.errors import StateError, UpdateError
from fedmini.types import Adapter, Manifest

FOLDER, POINTER = "adapters", "NEWEST.json"
TRIES = 3  # of a reader, whose file another thread may have replaced


@dataclass(frozen=True, slots=True)
class KeptAdapter:
    """Which adapter is kept: after `round_num` rounds of a run."""

    manifest_hash: str
    run_id: str
    round_num: int
    sha256: str


def keep(folder: Path, manifest: Manifest, round_num: int, content: bytes) -> None:
    """Keep an adapter as `vectors.to_bytes` wrote it, in the place of the one before; an older one of the run is not kept.

    A kill at any point leaves the old one or the new. Raises UpdateError where it is not of the run's shape or not
    finite, StateError where the disk refuses.
    """
    vectors.check(vectors.from_bytes(content, manifest.template), manifest.template)
    before = newest(folder)
    if before is not None and before.manifest_hash == manifest.hash and before.round_num > round_num:
        return
    sha256 = hashlib.sha256(content).hexdigest()
    record = {"manifest_hash": manifest.hash, "run_id": manifest.run_id, "round": round_num, "sha256": sha256}
    place = folder / FOLDER
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        files.replace_synced(place / f"{sha256}.f32", content, 0o600)
        files.replace_synced(place / POINTER, json.dumps(record).encode(), 0o600)
        for old in place.iterdir():  # the one before, and what a kill has left half written
            if old.name not in (POINTER, f"{sha256}.f32"):
                old.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"can't keep an adapter in {place}: {error.strerror}; make room") from error


def newest(folder: Path) -> KeptAdapter | None:
    """Which adapter is kept; None where there is none, or it is damaged: the next one replaces it."""
    found = _read(folder)
    return found[0] if found is not None else None


def load(folder: Path, manifest: Manifest) -> Adapter | None:
    """The adapter that is kept, where it is of this run."""
    found = _read(folder)
    if found is None or found[0].manifest_hash != manifest.hash:
        return None
    try:
        return vectors.from_bytes(found[1], manifest.template)
    except UpdateError:
        return None


def forget(folder: Path) -> None:
    """Remove every adapter. Raises StateError."""
    try:
        if (folder / FOLDER).exists():
            shutil.rmtree(folder / FOLDER)
    except OSError as error:
        raise StateError(f"can't remove {folder / FOLDER}: {error.strerror}") from error


def _read(folder: Path) -> tuple[KeptAdapter, bytes] | None:
    for _ in range(TRIES):
        try:
            record = json.loads((folder / FOLDER / POINTER).read_bytes())
            kept = KeptAdapter(
                str(record["manifest_hash"]), str(record["run_id"]), int(record["round"]), str(record["sha256"])
            )
            content = (folder / FOLDER / f"{kept.sha256}.f32").read_bytes()
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return (kept, content) if hashlib.sha256(content).hexdigest() == kept.sha256 else None
    return None
