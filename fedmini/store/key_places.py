"""Where the store's key lies: in the OS keyring, or in a file that only its owner can read."""

import binascii
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

from fedmini import files
from fedmini.errors import StateError
from fedmini.store import os_keyring
from fedmini.store.os_keyring import Keyring
from fedmini.store.sealing import KEY_BYTES

KEY_FILE = "store.key"
SERVICE = "fedmini example store"  # what a keyring's own window shows

PlaceName: TypeAlias = Literal["keyring", "file"]
FindKeyring: TypeAlias = Callable[[], Keyring | None]
Answer = TypeVar("Answer")


class KeyPlace(Protocol):
    """A place that holds one key of a store, by name."""

    @property
    def name(self) -> PlaceName: ...

    @property
    def in_words(self) -> str: ...

    def read(self, key_id: str) -> bytes:
        """The key of this name. Raises StateError, which says nothing of the key, where it isn't there."""

    def replace(self, old_id: str | None, key_id: str, key: bytes) -> None:
        """Keep this key, and the old one no longer. Raises StateError: then either, both or none is there."""


class KeyFile:
    """The key in FOLDER/store.key, mode 0600, written whole or not at all."""

    name: PlaceName = "file"

    def __init__(self, folder: Path) -> None:
        self._path = folder / KEY_FILE

    @property
    def in_words(self) -> str:
        return f"{self._path}, 0600"

    def read(self, key_id: str) -> bytes:
        remedy = (
            f"bring {self._path.parent} back from a backup; without its key nobody can read the store: to begin again "
            "without examples, delete that folder"
        )
        try:
            mode, content = self._path.stat().st_mode, self._path.read_bytes()
        except OSError as error:
            raise StateError(f"can't read the store's key {self._path}: {error.strerror}; {remedy}") from error
        if mode & 0o077:
            raise StateError(
                f"{self._path} can be read by others on this machine: make it 0600 if nobody did, or else erase the store"
            )
        kept_id, key = _parse(content)
        if len(key) != KEY_BYTES:
            raise StateError(f"{self._path} is damaged; {remedy}")
        if kept_id != key_id:
            raise StateError(f"{self._path} is not the key of the examples.db beside it; {remedy}")
        return key

    def replace(self, old_id: str | None, key_id: str, key: bytes) -> None:
        content = json.dumps({"key_id": key_id, "key": key.hex()}).encode()
        try:
            old = os.open(self._path, os.O_WRONLY) if self._path.exists() else None
            try:
                files.replace_synced(self._path, content, 0o600)
                if old is not None:
                    # Its name is gone, its blocks are not. A flash disk may keep them all the same.
                    os.pwrite(old, bytes(os.fstat(old).st_size), 0)
                    os.fsync(old)
            finally:
                if old is not None:
                    os.close(old)
        except OSError as error:
            raise StateError(
                f"can't write the store's key {self._path}: {error.strerror}; make room or give write permission, then try again"
            ) from error


class KeyInKeyring:
    """The key in the OS keyring, under SERVICE and its own name."""

    name: PlaceName = "keyring"
    in_words = "the OS keyring"

    def __init__(self, keyring: Keyring, timeout_s: float = os_keyring.TIMEOUT_S) -> None:
        self._keyring = keyring
        self._timeout_s = timeout_s

    def read(self, key_id: str) -> bytes:
        key = self._kept(key_id)
        if key is None:
            raise StateError(
                "the OS keyring does not hold this store's key: log in as the user who made the store, or bring the keyring "
                "back from a backup; without its key nobody can read the store: to begin again, delete the store's folder"
            )
        return key

    def replace(self, old_id: str | None, key_id: str, key: bytes) -> None:
        self._ask(lambda: self._keyring.set_password(SERVICE, key_id, key.hex()))
        if self._kept(key_id) != key:
            raise StateError("the OS keyring does not give back what it was given: mend or unlock it, then try again")
        if old_id is not None and self._kept(old_id) is not None:
            self._ask(lambda: self._keyring.delete_password(SERVICE, old_id))

    def _kept(self, key_id: str) -> bytes | None:
        answer = self._ask(lambda: self._keyring.get_password(SERVICE, key_id))
        try:
            key = bytes.fromhex(answer or "")
        except ValueError:
            return None
        return key if len(key) == KEY_BYTES else None

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return os_keyring.answer_in_time(question, self._timeout_s)
        except StateError:
            raise
        except Exception as error:  # each backend has its own; none of their texts is ours to pass on
            raise StateError(
                f"the OS keyring refused ({type(error).__name__}): unlock it or log in again, then try again"
            ) from None


def place(name: str, folder: Path, find_keyring: FindKeyring) -> KeyPlace:
    """The place that a store's key was put in. Raises StateError where that is a keyring which isn't there now."""
    if name == KeyFile.name:
        return KeyFile(folder)
    keyring = find_keyring()
    if keyring is None:
        raise StateError(
            f"the key of the store {folder} is in the OS keyring, which is missing or locked now: log in to the desktop "
            "session that it was made in, or unlock the keyring, then try again; nothing was changed"
        )
    return KeyInKeyring(keyring)


def keep_first_key(folder: Path, find_keyring: FindKeyring, key_id: str, key: bytes) -> KeyPlace:
    """Keep a new store's key in the OS keyring, or, where there is none that works, in the file; say which."""
    keyring = find_keyring()
    if keyring is not None:
        in_keyring = KeyInKeyring(keyring)
        try:
            in_keyring.replace(None, key_id, key)
            return in_keyring
        except StateError:
            pass  # it is there and does not work: the file does
    in_file = KeyFile(folder)
    in_file.replace(None, key_id, key)
    return in_file


def _parse(content: bytes) -> tuple[str, bytes]:
    """The name and the key in a key file; empty where it is damaged."""
    try:
        fields = json.loads(content)
        return str(fields["key_id"]), bytes.fromhex(fields["key"])
    except (ValueError, KeyError, TypeError, binascii.Error):
        return "", b""
