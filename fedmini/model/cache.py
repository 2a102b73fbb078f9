"""The cache folder: what is made once, a repacked base or a compiled kernel; checked at every load, rebuilt when damaged.

    CACHE/sources.json                 path -> size, modification time and SHA-256 of GGUF files seen before
    CACHE/bases/<sha256 of the source>/  manifest.json (size and SHA-256 of each file), tensors.safetensors, tokenizer/
    CACHE/kernels/<sha256 of what it depends on>/  manifest.json, dequantise.so

A folder appears there whole or not at all: it is written beside its place, synced, and renamed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedmini import files
from fedmini.errors import ConfigError
from fedmini.model import digests

FORMAT = 1  # raised when what is written changes; older folders are rebuilt
_MANIFEST = "manifest.json"
_REMEDY = "make room there, or let XDG_CACHE_HOME name another folder"


@dataclass(frozen=True, slots=True)
class CachedFolder:
    """A verified folder of the cache, and what its builder wrote down about it."""

    folder: Path
    facts: Mapping[str, Any]


def source_digest(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a source file; remembered by path, size and modification time, so that it is hashed once."""
    try:
        resolved, stat = path.resolve(strict=True), path.stat()
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    index = cache_dir / "sources.json"
    seen = _read_json(index) or {}
    entry = {"size_bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
    known = seen.get(str(resolved))
    if isinstance(known, dict) and {key: known.get(key) for key in entry} == entry:
        return str(known["sha256"])
    digest = digests.file_digest(resolved)
    seen[str(resolved)] = entry | {"sha256": digest}
    _write_atomically(index, json.dumps(seen, indent=1))
    return digest


def remembered(cache_dir: Path, question: str, answer: Callable[[], str]) -> str:
    """The answer to a question whose answer never changes: computed once, then read from answers.json."""
    index = cache_dir / "answers.json"
    known = _read_json(index) or {}
    if isinstance(known.get(question), str):
        return str(known[question])
    known[question] = answer()
    _write_atomically(index, json.dumps(known, indent=1))
    return str(known[question])


def open_or_build(
    cache_dir: Path,
    key: str,
    build: Callable[[Path], Mapping[str, Any]],
    note: Callable[[str], None],
    kind: Literal["bases", "kernels"] = "bases",
) -> CachedFolder:
    """The cached folder of `key`; where there is none, or a damaged one, `build` fills an empty folder first.

    `build` returns facts worth keeping beside the files. Two processes may build at once; one of the two folders stays.
    """
    folder = cache_dir / kind / key
    if (cached := _verified(folder)) is not None:
        return cached
    if folder.exists():
        note(f"what is cached in {folder} is damaged or of an older format: building it again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"can't write the cache folder {cache_dir}: {error.strerror}; {_REMEDY}") from error
    try:
        _fill(partial, build(partial))
        _move_into_place(partial, folder)
    except OSError as error:
        raise ConfigError(f"can't write the cache folder {cache_dir}: {error.strerror or error}; {_REMEDY}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    cached = _verified(folder)
    if cached is None:
        raise ConfigError(f"what was just written to {folder} reads back differently: check the disk")
    return cached


def _fill(partial: Path, facts: Mapping[str, Any]) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    manifest = {
        "format": FORMAT,
        "facts": dict(facts),
        "files": {
            path.relative_to(partial).as_posix(): {
                "size_bytes": path.stat().st_size,
                "sha256": digests.file_digest(path),
            }
            for path in files
        },
    }
    _write_atomically(partial / _MANIFEST, json.dumps(manifest, indent=1))


def _verified(folder: Path) -> CachedFolder | None:
    manifest = _read_json(folder / _MANIFEST)
    if manifest is None or manifest.get("format") != FORMAT:
        return None
    files, facts = manifest.get("files"), manifest.get("facts")
    if not isinstance(files, dict) or not isinstance(facts, dict) or not files:
        return None
    for name, expected in files.items():
        path = folder / name
        try:
            if path.stat().st_size != expected["size_bytes"] or digests.file_digest(path) != expected["sha256"]:
                return None
        except (OSError, KeyError, TypeError):
            return None
    return CachedFolder(folder, facts)


def _move_into_place(partial: Path, folder: Path) -> None:
    if folder.exists() and _verified(folder) is None:
        damaged = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        folder.rename(damaged / "damaged")
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        partial.rename(folder)
    except OSError:
        if _verified(folder) is None:  # else another process was faster, with the same content
            raise
    files.sync_folder(folder.parent)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_atomically(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_synced(path, text.encode())
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}; {_REMEDY}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
