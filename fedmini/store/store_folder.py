"""The folder of a store: private, and with a whole store in it, which is made where there is none."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedmini import files
from fedmini.errors import ConfigError, StateError
from fedmini.store import database, key_places, sealing
from fedmini.store.key_places import FindKeyring
from fedmini.store.sealing import Sealer

RESERVE = "room-to-erase"
_RESERVE_BYTES = 2**19  # an erasure writes about 1/1000 of what it erases, and some pages


def prepare(folder: Path, find_keyring: FindKeyring) -> Path:
    """The database of a folder, made (with the folder, 0700) where there is none.

    Raises ConfigError where it can't be made; StateError where others can read the folder, or a part of a store is missing.
    """
    path = folder / database.DATABASE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            raise StateError(f"{folder} can be read by others on this machine: make it 0700, then try again")
        with _alone_in(folder):
            if not path.exists():
                _create(path, find_keyring)
            _reserve(folder)
    except OSError as error:
        raise ConfigError(
            f"can't make a store in {folder}: {error.strerror}; make room or choose another folder"
        ) from error
    return path


@contextmanager
def room_to_erase(folder: Path) -> Iterator[None]:
    """Inside, the reserve is given up, so that a full disk can't keep a person from erasing."""
    with suppress(OSError):
        (folder / RESERVE).unlink()
    yield
    _reserve(folder)


def _reserve(folder: Path) -> None:
    """Keep some room, if there is any: a full disk is no reason not to open a store."""
    path = folder / RESERVE
    with suppress(OSError):
        if not path.exists():
            # Random, as a file system may keep zeros in no room at all.
            files.replace_synced(path, os.urandom(_RESERVE_BYTES), 0o600)


def _create(path: Path, find_keyring: FindKeyring) -> None:
    """An empty store. Begun before and cut short, it is begun again; what is left of a whole one is never overwritten."""
    partial = database.partial_path(path)
    if not partial.exists():
        _check_empty(path)
    # From here until the last rename it lies there, and says that the key beside it is this beginning's.
    os.close(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600))
    for leftover in path.parent.glob(f"{partial.name}-*"):
        leftover.unlink()
    key_id, key = sealing.draw_key()
    place = key_places.keep_first_key(path.parent, find_keyring, key_id, key)
    database.fill(partial, key_id, place.name, Sealer(key_id, key).key_check())
    partial.rename(path)
    files.sync_folder(path.parent)


def _check_empty(path: Path) -> None:
    for name in (key_places.KEY_FILE, f"{path.name}-wal", f"{path.name}-shm"):
        if (path.parent / name).exists():
            raise StateError(f"{path} is missing, and {name} is still there: {database.remedy(path)}")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
