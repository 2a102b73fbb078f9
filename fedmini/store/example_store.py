"""The store of a device's examples: what apps add to, what a run trains on, what a person erases."""

import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fedmini.config.device_sections import StoreSection
from fedmini.errors import ConfigError, StateError
from fedmini.store import key_places, os_keyring, rows, sealing, store_folder, stored_example
from fedmini.store.database import Database
from fedmini.store.key_places import FindKeyring, KeyPlace
from fedmini.store.rows import SealedRow
from fedmini.store.sealing import Sealer
from fedmini.store.stored_example import StoredExample

Clock = Callable[[], float]  # seconds since 1970


class ExampleStore:
    """A device's examples, encrypted, within the caps of its owner. Made by `open`; a context manager closes it.

    Guarantees: threads and processes may use one folder at once. What a method has returned from survives kill -9 and
    a power cut; what it was killed in happened whole or not at all. Nothing of what examples say is in an error or a repr.
    Every method raises StateError, and changes nothing, where the disk is full, the store is damaged or its key is gone.
    """

    __slots__ = ("_clock", "_database", "_limits", "_place", "_sealer")

    def __init__(self, opened: Database, limits: StoreSection, clock: Clock, place: KeyPlace) -> None:
        self._database = opened
        self._limits = limits
        self._clock = clock
        self._place = place
        self._sealer: Sealer | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        limits: StoreSection,
        clock: Clock = time.time,
        find_keyring: FindKeyring = os_keyring.find,
    ) -> Self:
        """Open the store of a folder, made (0700) where there is none; then the caps hold, also if they were lowered.

        The key of a new store goes to the keyring that `find_keyring` finds; where it finds none, or one that does not work,
        to FOLDER/store.key. Afterwards it stays there. An erasure that was cut short is finished.
        Raises StateError where the folder can be read by others, or the store is damaged, of a newer format or without
        its key: nothing is changed then, and never is a new key made in silence. ConfigError where the folder can't be made.
        """
        opened = Database(store_folder.prepare(folder, find_keyring))
        try:
            with opened.transaction() as connection:
                (place_name,) = connection.execute("SELECT key_place FROM store").fetchone()
            store = cls(opened, limits, clock, key_places.place(place_name, folder, find_keyring))
            with store._transaction() as connection:
                rows.evict(connection, limits.max_examples, limits.max_bytes)
        except BaseException:
            opened.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ExampleStore({str(self._database.path.parent)!r})"

    @property
    def key_kept_in(self) -> str:
        """Where the key is, in words: `the OS keyring`, or `/path/store.key, 0600`."""
        return self._place.in_words

    @property
    def num_examples(self) -> int:
        """How many examples are kept; those that only a frozen set holds are not counted."""
        with self._transaction() as connection:
            return rows.totals(connection)[0]

    @property
    def size_bytes(self) -> int:
        """What the kept examples take, as encrypted, which max_bytes limits. A frozen set can hold as much again."""
        with self._transaction() as connection:
            return rows.totals(connection)[1]

    def add(self, response: str, prompt: str | None = None) -> None:
        """Keep one more example; the oldest go until the caps hold. The same one twice is two.

        Raises ConfigError where it is empty, not text, or by itself larger than max_bytes.
        """
        self.add_many((StoredExample(response, prompt),))

    def add_many(self, examples: Iterable[StoredExample]) -> int:
        """Keep more examples in this order, all or none; how many were given. Caps and errors as in `add`.

        Where there are more than the caps have room for, the first of them are gone at once.
        """
        contents = [self._checked(example) for example in examples]
        with self._transaction() as connection:
            sealer, minute = self._current_sealer(), self._minute()
            numbered = enumerate(contents, start=rows.reserve(connection, len(contents)))
            rows.insert(
                connection, ((row, minute, sealer.seal_example(content, row, minute)) for row, content in numbered)
            )
            rows.evict(connection, self._limits.max_examples, self._limits.max_bytes)
        return len(contents)

    def examples(self) -> list[StoredExample]:
        """Every kept example, oldest first; an expired one never.

        An example expires up to a minute early, as the time it came is kept in whole minutes.
        """
        with self._transaction() as connection:
            return self._opened(rows.kept(connection))

    def freeze(self, run_id: str, max_examples: int) -> list[StoredExample]:
        """A run's frozen training set, oldest first: the newest `max_examples` at the first call, the same ever after.

        It survives a restart, and whatever is added or evicted later; a later `max_examples` changes nothing. Its members
        still leave it by age and by `erase`. That is what the guarantee for examples needs: neighbours are frozen sets
        that differ in one example, and whether one expires depends on no other. Whether one is evicted does: adding
        one example would push out another, and two would differ. A set that began empty therefore stays empty.
        Raises ConfigError where max_examples is below 1.
        """
        if max_examples < 1:
            raise ConfigError(f"max_examples: expected at least 1, got {max_examples}")
        with self._transaction() as connection:
            rows.freeze(connection, run_id, max_examples)
            return self._opened(rows.frozen(connection, run_id))

    def sealer(self) -> Sealer:
        """What encrypts, under the store's key of now, what is computed from examples: after `erase` nobody can open it."""
        with self._transaction():
            return self._current_sealer()

    def thaw(self, run_id: str) -> None:
        """Let a run's frozen set go: the run is over or was left. A run that has none is fine."""
        with self._transaction() as connection:
            rows.thaw(connection, run_id)

    def erase(self) -> None:
        """Erase every example and every frozen set, and replace the key, so that nobody can read what is left of them.

        Left may be free pages, the -wal file, copies of examples.db: without the old key they are noise. A copy of
        the key itself (a backup of store.key or of the keyring) is beyond this. Killed in the middle, either nothing
        has happened, or all examples are gone and the next use, by whoever, finishes it. Raises StateError where the
        key can't be replaced: the examples are gone all the same, and the next use tries again.
        """
        with store_folder.room_to_erase(self._database.path.parent):
            with self._database.without_overwriting(), self._database.transaction() as connection:
                rows.delete_all(connection)
            with self._transaction():
                pass  # it begins with what is left to do
            self._database.shrink()

    def close(self) -> None:
        """Close the file. A second time does nothing; any other method raises StateError afterwards."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction in which no erasure is left unfinished, the key is the current one, and nothing is expired."""
        with self._database.transaction() as connection:
            key_id, key_check, erasing = connection.execute("SELECT key_id, key_check, erasing FROM store").fetchone()
            if erasing:
                self._replace_key(connection, key_id)
            elif self._sealer is None or self._sealer.key_id != key_id:  # first, or another process has erased
                self._sealer = self._read_key(key_id, key_check)
            if self._limits.max_age_days is not None:
                rows.expire(connection, math.floor((self._clock() - self._limits.max_age_days * 86400) / 60))
            yield connection

    def _replace_key(self, connection: sqlite3.Connection, old_id: str) -> None:
        """Put a fresh key in the old one's place. Killed before the commit, it is done again: nothing is sealed with either."""
        key_id, key = sealing.draw_key()
        self._place.replace(old_id, key_id, key)
        self._sealer = Sealer(key_id, key)
        connection.execute(
            "UPDATE store SET key_id = ?, key_check = ?, erasing = 0", (key_id, self._sealer.key_check())
        )

    def _read_key(self, key_id: str, key_check: bytes) -> Sealer:
        sealer = Sealer(key_id, self._place.read(key_id))
        if not sealer.right_for(key_check):
            raise StateError(
                f"the key in {self._place.in_words} is not that of {self._database.path}: bring both back from one backup; "
                "to begin again without examples, delete the store's folder"
            )
        return sealer

    def _current_sealer(self) -> Sealer:
        assert self._sealer is not None  # every transaction begins by reading it
        return self._sealer

    def _minute(self) -> int:
        return math.floor(self._clock() / 60)

    def _checked(self, example: StoredExample) -> bytes:
        content = stored_example.to_bytes(example)
        size_bytes = len(content) + sealing.OVERHEAD_BYTES
        if size_bytes > self._limits.max_bytes:
            raise ConfigError(
                f"the example takes {size_bytes} bytes, and store.max_bytes is {self._limits.max_bytes}: shorten it or raise that"
            )
        return content

    def _opened(self, sealed_rows: list[SealedRow]) -> list[StoredExample]:
        """The examples of some rows. Raises StateError where one was altered: then none is returned."""
        sealer = self._current_sealer()
        examples = []
        for row, added_minute, sealed in sealed_rows:
            content = sealer.open_example(sealed, row, added_minute)
            if content is None:
                raise StateError(
                    f"{self._database.path}: example {row} was altered or damaged, and can't be read: bring the folder back "
                    "from a backup, or erase the store; nothing was changed"
                )
            examples.append(stored_example.from_bytes(content))
        return examples
