"""Where things lie in a server's folder, how they are written, and who may change them: one command at a time."""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedmini import files
from fedmini.errors import ConfigError, StateError

CONFIG, TOKEN = "server.toml", "loopback.token"
OPERATOR, ROTATIONS, REVOCATIONS, DEVICES = "operator.pub", "rotations.json", "revocations.json", "devices"
TLS, RUNS, STATE = "tls", "runs", "state"
SPENT = f"{STATE}/spent-logins"  # the SHA-256 of login keys that the SuperLink lets in no more, a line each
EVERYTHING = (CONFIG, TOKEN, OPERATOR, ROTATIONS, REVOCATIONS, DEVICES, TLS, RUNS, STATE)
SECRETS = (".key", ".token")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a device or a run: it is a file's name too
MAX_FILE_BYTES = 2**22


def check_name(name: str, what: str) -> None:
    """Raise ConfigError where a name can't be that of a file."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} can't name {what}: expected 1 to 64 of A-Z a-z 0-9 . _ -, no sign first")


def check_folder(path: Path) -> None:
    """Raise ConfigError where a folder is no server's."""
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path} is no server's folder: make one with `fedmini server init {path} --host NAME`")


def read_file(path: Path) -> bytes:
    """At most 4 MiB of a file: none of ours is larger. Raises StateError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise StateError(f"can't read {path}: {error.strerror}; bring it back from a backup") from error


def read_digests(path: Path) -> tuple[str, ...]:
    """The lines of a file of digests; none where there is no such file. Raises StateError."""
    return tuple(read_file(path).decode("ascii", "replace").split()) if path.exists() else ()


def write_file(path: Path, content: bytes) -> None:
    """Put a file in place atomically; a secret for its owner only. Raises StateError."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        files.replace_synced(path, content, mode_of(path.name))
    except OSError as error:
        raise StateError(
            f"can't write {path}: {error.strerror}; mend that, then give the same command again"
        ) from error


def remove_file(path: Path) -> None:
    """Remove a file, for good after a power cut too. Raises StateError."""
    try:
        path.unlink(missing_ok=True)
        files.sync_folder(path.parent)
    except OSError as error:
        raise StateError(
            f"can't remove {path}: {error.strerror}; mend that, then give the same command again"
        ) from error


def mode_of(name: str) -> int:
    """Who may read a file of this name."""
    return 0o600 if name.endswith(SECRETS) else 0o644


def fingerprint(path: Path) -> str:
    """A hash that changes when any file changes that a running server has read: all but runs/ and state/.

    It looks at no file's content, so it is cheap: one call of the file system for each device.
    """
    digest = hashlib.sha256()
    try:
        for folder in (path, path / TLS, path / DEVICES):
            if folder.is_dir():
                with os.scandir(folder) as entries:
                    for entry in sorted(entries, key=lambda one: one.name):
                        digest.update(_look(entry))
    except OSError as error:
        raise StateError(f"can't read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _look(entry: os.DirEntry[str]) -> bytes:
    """What is seen of a file from outside; nothing of one that is not in its place yet, or no more, or of a folder."""
    try:
        if entry.name.startswith(".") or not entry.is_file():
            return b""
        seen = entry.stat()
    except FileNotFoundError:
        return b""
    return f"{entry.path}\0{seen.st_ino} {seen.st_size} {seen.st_mtime_ns} {seen.st_mode}\0".encode(errors="replace")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder (0700) to be filled, that comes to its place whole when this ends well. Raises ConfigError."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} is there already: choose another folder; nothing is overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))  # 0700
        try:
            yield partial
            for folder, _, _ in os.walk(partial):
                files.sync_folder(Path(folder))
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial)
            raise
        files.sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"can't make {path}: {error.strerror}; choose another folder") from error


def fill(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files by their names in a folder, with the folders between (0700). Raises OSError."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.replace_synced(folder / name, content, mode_of(name))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other command works in the folder meanwhile; a running server does, and may. Raises ConfigError, StateError."""
    check_folder(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"another command works in {path}: wait until it has ended") from error
        _clear(path)
        yield
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    """Remove what a command that was killed had not put in its place yet."""
    litter = [*(path / TLS).glob(".*"), *(path / DEVICES).glob(".*")]
    for name in (OPERATOR, ROTATIONS, REVOCATIONS):
        litter += path.glob(f".{name}-*")
    for one in litter:
        one.unlink(missing_ok=True)
