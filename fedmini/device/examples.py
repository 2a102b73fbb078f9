"""A device's examples, also where their store can't be opened: its owner must be able to erase them all the same."""

import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedmini.config import StoreSection
from fedmini.errors import ConfigError, StateError
from fedmini.store import ExampleStore, StoredExample
from fedmini.store.key_places import FindKeyring
from fedmini.store.sealing import Sealer

CHUNK_BYTES = 2**20


class Examples:
    """The store of a device. Where it can't be opened, every use raises StateError, or ConfigError where it can't be made.

    It says why; the next use tries again. Safe from several threads.
    """

    def __init__(self, folder: Path, limits: StoreSection, find_keyring: FindKeyring) -> None:
        self._folder, self._limits, self._find_keyring = folder, limits, find_keyring
        self._store: ExampleStore | None = None
        self._is_closed = False
        self._opening = threading.Lock()
        self.problem: str | None = None  # why it can't be opened
        with suppress(StateError, ConfigError):
            self._opened()

    def __repr__(self) -> str:
        return f"Examples({str(self._folder)!r})"

    def add_many(self, examples: Iterable[StoredExample]) -> int:
        """As the store does."""
        return self._opened().add_many(examples)

    def newest(self, most: int) -> list[StoredExample]:
        """The newest examples, the oldest of them first."""
        return self._opened().examples()[-most:]

    def freeze(self, run_id: str, most: int) -> list[StoredExample]:
        """As the store does."""
        return self._opened().freeze(run_id, most)

    def thaw(self, run_id: str) -> None:
        """As the store does."""
        self._opened().thaw(run_id)

    def sealer(self) -> Sealer:
        """As the store does."""
        return self._opened().sealer()

    def standing(self) -> tuple[int, str]:
        """How many there are, and where their key is; of a store that can't be opened, none, and why."""
        store = self._store
        try:
            if store is not None:
                return store.num_examples, store.key_kept_in
        except StateError as error:
            self.problem = str(error)
        return 0, f"unknown: {self.problem}"

    def erase(self) -> None:
        """Erase all of it and begin anew, where it can't be read too. Raises StateError where the disk refuses."""
        try:
            return self._opened().erase()
        except (StateError, ConfigError):
            self._let_go()
        try:
            if self._folder.exists():
                _overwrite(self._folder)
                shutil.rmtree(self._folder)
        except OSError as error:
            raise StateError(f"can't erase {self._folder}: {error.strerror}; delete that folder") from error
        self._opened()

    def close(self) -> None:
        """Close the store, for good. Closing twice is fine."""
        self._is_closed = True
        self._let_go()

    def _let_go(self) -> None:
        with self._opening:
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def _opened(self) -> ExampleStore:
        with self._opening:
            if self._is_closed:
                raise StateError(f"the store {self._folder} is closed: open the device again")
            if self._store is None:
                try:
                    self._store = ExampleStore.open(self._folder, self._limits, find_keyring=self._find_keyring)
                    self.problem = None
                except (StateError, ConfigError) as error:
                    self.problem = str(error)
                    raise
            return self._store


def _overwrite(folder: Path) -> None:
    """Zeros over every file: its key may be in a keyring that is locked now, and would open what a disk still holds."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            continue
        with path.open("r+b") as file:
            left = path.stat().st_size
            while left > 0:
                left -= file.write(bytes(min(left, CHUNK_BYTES)))
            file.flush()
            os.fsync(file.fileno())
