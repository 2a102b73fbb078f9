"""A server's folder in one file, also while the server runs, and back.

The weights are copied before the ledgers: what a restored server has trained, its ledger says. A ledger may say more, as
after a round that was lost. A database is copied by SQLite itself. The last entry, CONTENTS.json, has the hash of every
other: an archive that was cut or changed is refused. It holds secrets: 0600, and not encrypted.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO
from urllib.parse import quote

from fedmini import files
from fedmini.errors import ConfigError, StateError
from fedmini.server_folder import layout
from fedmini.server_folder.folder import ServerFolder

CONTENTS = "CONTENTS.json"
FORMAT = "fedmini/server-backup/v1"
SQLITE = b"SQLite format 3\0"
BESIDE_SQLITE = ("-wal", "-shm", "-journal")  # already in what SQLite copies
NEWEST, CHECKPOINTS, LEDGERS = "LATEST", "checkpoints", ("ledger.jsonl", "evaluation-ledger.jsonl")
MAX_FILES, MAX_CONTENTS_BYTES, MAX_DEPTH = 100_000, 2**26, 16
CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Packed:
    """What was put in an archive."""

    num_files: int
    size_bytes: int


def back_up(path: Path, archive: Path) -> Packed:
    """Write a server's folder to a new tar file (0600), whole or not at all. Raises ConfigError, StateError.

    To be called in another process than one that has the server's database open: it would lose its locks on it.
    """
    if archive.exists() or archive.is_symlink():
        raise ConfigError(f"{archive} is there already: choose another name; nothing is overwritten")
    try:
        with (
            layout.locked(path),
            tempfile.TemporaryDirectory(prefix=f".{archive.name}-", dir=archive.parent) as scratch,
        ):
            partial = Path(scratch) / "archive"
            with partial.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                with tarfile.open(fileobj=file, mode="w:") as tar:
                    hashes = _pack(path, tar, Path(scratch) / "database")
                file.flush()
                os.fsync(file.fileno())
            packed = Packed(len(hashes), partial.stat().st_size)
            partial.rename(archive)
            files.sync_folder(archive.parent)
            return packed
    except (OSError, sqlite3.Error, tarfile.TarError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StateError(
            f"can't back {path} up in {archive}: {why}; mend that, then give the same command again"
        ) from error


def _pack(folder: Path, tar: tarfile.TarFile, scratch: Path) -> dict[str, str]:
    """Put all files in an archive; the hash of each, by its name."""
    hashes: dict[str, str] = {}
    # Which weights are the newest is looked up before anything else: two more rounds have to end before those go.
    newest = {one.parent: one.read_bytes() for one in (folder / layout.RUNS).glob(f"*/{CHECKPOINTS}/{NEWEST}")}
    for parent, content in sorted(newest.items()):
        name = (parent / NEWEST).relative_to(folder).as_posix()
        hashes[name] = _add(tar, name, BytesIO(content), len(content))
    for name in sorted(_walk(folder), key=_turn):
        path = folder / name
        if name in hashes or name.endswith(BESIDE_SQLITE):
            continue
        try:
            hashes[name] = _add_file(tar, name, path, scratch)
        except FileNotFoundError:
            is_older = path.parent.parent in newest and path.parent.name.encode() not in newest[path.parent.parent]
            if not is_older:
                raise
            # Else weights that the running server has forgotten meanwhile.
    contents = json.dumps({"format": FORMAT, "sha256": hashes}, sort_keys=True).encode()
    _add(tar, CONTENTS, BytesIO(contents), len(contents))
    return hashes


def _turn(name: str) -> tuple[int, str]:
    """Which files are copied first: weights, then what else there is, then what was spent."""
    parts = name.split("/")
    return 0 if CHECKPOINTS in parts else 2 if parts[-1] in LEDGERS else 1, name


def _walk(folder: Path) -> Iterator[str]:
    """Every file of the folder that is in its place. Raises ConfigError for a link, which no backup holds."""
    waiting = [folder / name for name in layout.EVERYTHING]
    while waiting:
        path = waiting.pop()
        if path.is_symlink():
            raise ConfigError(f"{path} is a link, and a backup holds none: put the file itself there")
        if path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                waiting += [one for one in path.iterdir() if not one.name.startswith(".")]
        elif path.is_file():
            yield path.relative_to(folder).as_posix()


def _add_file(tar: tarfile.TarFile, name: str, path: Path, scratch: Path) -> str:
    with path.open("rb") as file:
        if file.read(len(SQLITE)) != SQLITE:
            file.seek(0)
            return _add(tar, name, file, os.fstat(file.fileno()).st_size)
    _copy_database(path, scratch)
    with scratch.open("rb") as file:
        return _add(tar, name, file, scratch.stat().st_size)


def _copy_database(source: Path, destination: Path) -> None:
    """A copy of a database as of one moment, though somebody writes to it meanwhile."""
    destination.unlink(missing_ok=True)
    reading = sqlite3.connect(f"file:{quote(str(source.absolute()))}?mode=rw", uri=True)
    writing = sqlite3.connect(destination)
    try:
        reading.backup(writing)
    finally:
        writing.close()
        reading.close()


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> str:
    """Put so many bytes in an archive; their hash."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, layout.mode_of(name)
    hashing = _Hashing(content)
    tar.addfile(member, hashing)  # type: ignore[arg-type]
    return hashing.digest.hexdigest()


@dataclass
class _Hashing:
    """A file whose bytes are hashed as they are read."""

    file: IO[bytes]
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.digest.update(content)
        return content


def restore(archive: Path, path: Path) -> ServerFolder:
    """A new server's folder from an archive of `back_up`, whole or not at all, all of it checked.

    Raises ConfigError where something is there already; StateError where the archive was cut, changed, or is another one.
    """
    try:
        with archive.open("rb") as file, layout.new_folder(path) as partial:
            _unpack(file, partial)
            for folder in (layout.DEVICES, layout.RUNS, layout.STATE):
                (partial / folder).mkdir(mode=0o700, exist_ok=True)
            _check(partial)
    except OSError as error:
        raise ConfigError(f"can't read {archive}: {error.strerror}") from error
    except (StateError, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        why = str(error) if isinstance(error, StateError) else "it is no tar file, or was cut"
        raise StateError(f"{archive} is no whole backup of a server's folder: {why}; take another one") from error
    return ServerFolder(path)


def _unpack(file: IO[bytes], folder: Path) -> None:
    """Write what is in an archive to an empty folder, and nowhere else. Raises StateError."""
    left, hashes = os.fstat(file.fileno()).st_size, dict[str, str]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None
            if content is None or member.issparse():
                raise StateError("it holds something else than files")
            left -= member.size
            if member.size < 0 or left < 0 or len(hashes) >= MAX_FILES:
                raise StateError("it says that it holds more than it can")
            if member.name == CONTENTS:
                if member.size > MAX_CONTENTS_BYTES or not _lists(content.read(), hashes):
                    raise StateError("its files are not those that its list of contents has")
                return
            _check_place(member.name, hashes)
            hashes[member.name] = _write(content, folder, member.name)
    raise StateError("its end is missing")


def _check_place(name: str, taken: dict[str, str]) -> None:
    """Raise StateError unless a name is that of a file inside the folder, where such a file may be, and a new one."""
    parts = name.split("/")
    is_ours = parts[0] in layout.EVERYTHING and len(parts) <= MAX_DEPTH and name.isprintable()
    if not is_ours or name in taken or any(not part or part.startswith(".") or "\\" in part for part in parts):
        raise StateError("a file in it would lie where none may")


def _write(content: IO[bytes], folder: Path, name: str) -> str:
    """Write a file for its owner only, or for all to read; the hash of its bytes."""
    path, hashing = folder / name, _Hashing(content)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, layout.mode_of(name))
    except (FileExistsError, NotADirectoryError):
        raise StateError("a file in it would lie where none may") from None
    with open(handle, "wb") as file:
        while chunk := hashing.read(CHUNK_BYTES):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return hashing.digest.hexdigest()


def _lists(content: bytes, hashes: dict[str, str]) -> bool:
    """Whether a list of contents is that of these files."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return bool(found == {"format": FORMAT, "sha256": hashes})


def _check(folder: Path) -> None:
    """Raise StateError where a folder that was restored can't be opened."""
    try:
        opened = ServerFolder(folder)
        opened.token  # noqa: B018
        if (folder / layout.OPERATOR).exists():
            opened.roll()
    except ConfigError as error:
        raise StateError(str(error)) from error
