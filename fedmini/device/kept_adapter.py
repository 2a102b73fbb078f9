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


@dataclass(frozen=True, slots=True)
class KeptAdapter:
    """Which adapter is kept: after `round_num` rounds of a run."""

    manifest_hash: str
    run_id: str
    round_num: int
    sha256: str


def keep(folder: Path, manifest: Manifest, round_num: int, content: bytes) -> KeptAdapter:
    """Keep an adapter as `vectors.to_bytes` wrote it, in the place of the one before.

    Raises UpdateError where it is not of the run's shape or not finite, StateError where the disk refuses.
    """
    vectors.check(vectors.from_bytes(content, manifest.template), manifest.template)
    kept = KeptAdapter(manifest.hash, manifest.run_id, round_num, hashlib.sha256(content).hexdigest())
    place = folder / FOLDER
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        files.replace_synced(place / f"{kept.sha256}.f32", content, 0o600)
        record = {
            "manifest_hash": kept.manifest_hash,
            "run_id": kept.run_id,
            "round": kept.round_num,
            "sha256": kept.sha256,
        }
        files.replace_synced(place / POINTER, json.dumps(record).encode(), 0o600)
        for old in place.glob("*.f32"):
            if old.stem != kept.sha256:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"can't keep an adapter in {place}: {error.strerror}; make room") from error
    return kept


def newest(folder: Path) -> KeptAdapter | None:
    """Which adapter is kept; None where there is none, or it is damaged: the next one replaces it."""
    try:
        record = json.loads((folder / FOLDER / POINTER).read_bytes())
        kept = KeptAdapter(record["manifest_hash"], record["run_id"], record["round"], record["sha256"])
        content = (folder / FOLDER / f"{kept.sha256}.f32").read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if hashlib.sha256(content).hexdigest() == kept.sha256 else None


def load(folder: Path, kept: KeptAdapter, manifest: Manifest) -> Adapter:
    """The adapter itself. Raises StateError."""
    path = folder / FOLDER / f"{kept.sha256}.f32"
    try:
        return vectors.from_bytes(path.read_bytes(), manifest.template)
    except (OSError, UpdateError) as error:
        raise StateError(f"{path} is missing or damaged: the next round brings another") from error


def forget(folder: Path) -> None:
    """Remove every adapter. Raises StateError."""
    try:
        if (folder / FOLDER).exists():
            shutil.rmtree(folder / FOLDER)
    except OSError as error:
        raise StateError(f"can't remove {folder / FOLDER}: {error.strerror}") from error
