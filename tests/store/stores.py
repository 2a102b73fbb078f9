"""Stores in a folder, a clock that is set by hand, and keyrings that keep what they are given in memory or in a folder."""

import os
from collections.abc import Callable
from pathlib import Path

from keyring.backend import KeyringBackend
from keyring.errors import PasswordDeleteError, PasswordSetError

from fedmini.config.device_sections import StoreSection
from fedmini.store import ExampleStore, Keyring

MARKER = "xylophone-quartz-meridian"  # stands for what a person typed
# For tests that open many stores: a process that is killed leaves what it wrote there too, only a power cut would not.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
FindKeyring = Callable[[], Keyring | None]


def no_keyring() -> None:
    return None


def open_store(
    folder: Path,
    limits: StoreSection | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    find_keyring: FindKeyring = no_keyring,
) -> ExampleStore:
    return ExampleStore.open(folder, limits or StoreSection(), clock, find_keyring)


def responses(store: ExampleStore) -> list[str]:
    return [example.response for example in store.examples()]


class MemoryKeyring(KeyringBackend):
    """A backend of the keyring package that keeps its passwords in a dictionary."""

    priority = 1

    def __init__(self) -> None:
        super().__init__()
        self.passwords: dict[str, str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.passwords.get(username)

    def set_password(self, service: str, username: str, password: str) -> None:
        self.passwords[username] = password

    def delete_password(self, service: str, username: str) -> None:
        if self.passwords.pop(username, None) is None:
            raise PasswordDeleteError("no such password")


class RefusingKeyring(MemoryKeyring):
    """A backend that is there, and stores nothing."""

    def set_password(self, service: str, username: str, password: str) -> None:
        raise PasswordSetError(f"can't keep {password}")


class ForgetfulKeyring(MemoryKeyring):
    """A backend like keyring.backends.null: it takes everything and keeps nothing."""

    def set_password(self, service: str, username: str, password: str) -> None:
        pass


class FolderKeyring(KeyringBackend):
    """A backend that outlives a process: one file for each password."""

    priority = 1

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def get_password(self, service: str, username: str) -> str | None:
        path = self._folder / username
        return path.read_text() if path.exists() else None

    def set_password(self, service: str, username: str, password: str) -> None:
        (self._folder / username).write_text(password)

    def delete_password(self, service: str, username: str) -> None:
        (self._folder / username).unlink()
