"""The database file: made whole or not at all, private, one transaction at a time; its failures say what to do."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from fedmini.errors import StateError

DATABASE = "examples.db"
FORMAT = 1  # raised when the schema changes
_APPLICATION = 0x66656465  # in the file's header: it is one of ours
_BUSY_S = 30
_MAX_IDLE_WAL_BYTES = 4 * 2**20  # what a large transaction leaves beside the file
_SCHEMA = f"""
CREATE TABLE store (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    key_id TEXT NOT NULL, key_place TEXT NOT NULL, key_check BLOB NOT NULL,
    erasing INTEGER NOT NULL DEFAULT 0,    -- 1: the examples are gone, and the key is to be replaced before anything else
    next_row INTEGER NOT NULL DEFAULT 1    -- never used twice: a row's number is part of what its seal binds
) STRICT;
CREATE TABLE examples (
    row INTEGER PRIMARY KEY, added_minute INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes = length(sealed)),
    evicted INTEGER NOT NULL DEFAULT 0,    -- 1: over a cap, and still here for a frozen set
    sealed BLOB NOT NULL
) STRICT;
CREATE INDEX examples_kept ON examples (evicted, row, size_bytes);
CREATE INDEX examples_by_age ON examples (added_minute);
CREATE TABLE frozen_runs (run_id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE frozen_rows (run_id TEXT NOT NULL, row INTEGER NOT NULL, PRIMARY KEY (run_id, row)) STRICT, WITHOUT ROWID;
CREATE INDEX frozen_by_row ON frozen_rows (row);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {FORMAT};
"""


class Database:
    """One connection, for one thread at a time, in the process that opened it.

    Every transaction takes the write lock at once, so that all of them, of all processes, come one after another.
    Committed means on the disk (WAL, synchronous=FULL): kill -9 and a power cut lose nothing of it.
    """

    __slots__ = ("_lock", "_process", "connection", "path")

    def __init__(self, path: Path) -> None:
        """Open a file that is there. Raises StateError where it is damaged, cut short, newer or can be read by others."""
        self.path = path
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.connection: sqlite3.Connection | None = None
        _check_file(path)
        with self._told():
            self.connection = _connect(path)
            try:
                self._check_content(self.connection)
            except BaseException:
                self.close()
                raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside is committed at the end, or, where anything is raised, none of it.

        Raises StateError where the disk is full or fails, where the file is damaged, or another process holds it too long.
        """
        with self._lock, self._told():
            connection = self._usable()
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def without_overwriting(self) -> Iterator[None]:
        """Inside, what is deleted is not overwritten: for what nobody can read once its key is gone.

        Overwriting writes as much again as is deleted, which a full disk has no room for.
        """
        with self._lock, self._told():
            self._usable().execute("PRAGMA secure_delete = OFF")
        try:
            yield
        finally:
            with self._lock, self._told():
                self._usable().execute("PRAGMA secure_delete = ON")

    def shrink(self) -> None:
        """Give back the room of what was deleted, if no other process is in the way; nothing depends on it."""
        with self._lock, suppress(sqlite3.Error):
            self._usable().execute("VACUUM")
            self._usable().execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock:
            if self.connection is not None and self._process == os.getpid():
                self.connection.close()
            self.connection = None

    def _usable(self) -> sqlite3.Connection:
        if self.connection is None:
            raise StateError(f"the store {self.path.parent} is closed: open it again")
        if self._process != os.getpid():  # SQLite's locks don't survive a fork
            raise StateError(f"the store {self.path.parent} was opened before a fork: open it in this process")
        return self.connection

    def _check_content(self, connection: sqlite3.Connection) -> None:
        application, version = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if application != _APPLICATION:
            raise StateError(f"{self.path} is not an example store: {remedy(self.path)}")
        if version != FORMAT:
            raise StateError(
                f"{self.path} has format {version}, and this fedmini reads format {FORMAT}: use the fedmini that wrote it "
                "(update this one if it is newer); nothing was changed"
            )
        checked = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if checked != "ok" or connection.execute("SELECT COUNT(*) FROM store").fetchone() != (1,):
            raise StateError(f"{self.path} is damaged: {remedy(self.path)}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # Of SQLite's words only the code is passed on. It never quotes a bound value; this doesn't rely on that.
            raise StateError(_explain(self.path, error)) from None
        except UnicodeDecodeError:  # what SQLite says of a damaged schema quotes it
            raise StateError(f"{self.path} is damaged: {remedy(self.path)}") from None


def fill(path: Path, key_id: str, key_place: str, key_check: bytes) -> None:
    """Make an empty file a database without examples. Raises StateError."""
    try:
        with closing(_connect(path)) as connection:
            connection.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
            connection.execute(
                "INSERT INTO store (only_row, key_id, key_place, key_check) VALUES (1, ?, ?, ?)",
                (key_id, key_place, key_check),
            )
            connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.Error as error:
        raise StateError(_explain(path, error)) from None


def partial_path(path: Path) -> Path:
    """Where a database is made before it is whole."""
    return path.with_name(f"{path.name}.partial")


def _connect(path: Path) -> sqlite3.Connection:
    # mode=rw: never make an empty file where one was lost. -wal and -shm take the mode of the file.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {_MAX_IDLE_WAL_BYTES}")
    return connection


def _check_file(path: Path) -> None:
    # Before SQLite sees it: to SQLite an empty file is a new database, and the -wal beside it goes.
    try:
        mode = path.stat().st_mode
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise StateError(f"can't read {path}: {error.strerror}; {remedy(path)}") from error
    if mode & 0o077:
        raise StateError(f"{path} can be read by others on this machine: make it 0600, then try again")
    if start != b"SQLite format 3\0":
        raise StateError(f"{path} is damaged or was cut short: {remedy(path)}")


def _explain(path: Path, error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return f"no room is left on the disk for {path}: nothing was changed; make room, then try again"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another process has held {path} for {_BUSY_S} s: nothing was changed; stop it or wait, then try again"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"{path} is damaged: {remedy(path)}"
    name = getattr(error, "sqlite_errorname", "no code")
    return (
        f"{path} can't be read or written ({name}): nothing was changed; see to the disk and the permissions, then try "
        f"again; where that does not help, {remedy(path)}"
    )


def remedy(path: Path) -> str:
    """What to do about a store that can't be read."""
    return f"bring {path.parent} back from a backup; to begin again without examples, delete that folder"
