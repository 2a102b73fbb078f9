"""A ledger's file: append-only, locked, on the disk before anything else happens.

What both ledgers do to their files: the run's (`ledger.py`) and a device's own (`device_ledger.py`). A changed byte
anywhere is refused, a last line that a crash cut short comes back as RECOVERED, and lines that are missing at the end
are found by comparing with a position that somebody else remembers (`verify`).
"""

import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from fedmini import files
from fedmini.errors import StateError
from fedmini.privacy import chain
from fedmini.privacy.chain import Line, LineFormat
from fedmini.types import LedgerPosition


class ChainFile:
    """An open file of chained lines, locked against every other process.

    Guarantee: when `append` has returned, its lines are on the disk. When it raised StateError, none of them is, and
    nothing before is lost.
    """

    def __init__(self, path: Path, descriptor: int, lines: Sequence[Line]) -> None:
        self.path = path
        self._descriptor = descriptor
        self._lines = list(lines)
        self._size_bytes = len(chain.encode(lines))

    @classmethod
    def open(
        cls, path: Path, line_format: LineFormat, check: Callable[[Sequence[Line]], None] = lambda _: None
    ) -> Self:
        """A file, created where there is none, else verified from its first line to its last.

        `check` may refuse the lines, before anything in the file is touched. Raises StateError where another process
        has it open or it was damaged; a cut last line is replaced by RECOVERED lines, atomically.
        """
        try:
            descriptor = _open_locked(path)
        except OSError as error:
            raise StateError(f"can't open the ledger {path}: {error.strerror}") from error
        try:
            content = path.read_bytes()
            lines = chain.parse(content, path, line_format)
            check(lines)
            if chain.encode(lines) != content:
                descriptor = _replace(path, chain.encode(lines), descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, lines)

    @property
    def lines(self) -> Sequence[Line]:
        """All lines, the oldest first. Not to be changed."""
        return self._lines

    @property
    def position(self) -> LedgerPosition:
        """Where the file stands: what `verify` is given later."""
        return chain.position(self._lines, len(self._lines))

    def append(self, entries: Sequence[Line]) -> list[Line]:
        """Add entries as lines, and wait until the disk has them; the lines as they were written.

        Raises StateError where the file is closed, or the disk refuses: then nothing was added.
        """
        if self._descriptor < 0:
            raise StateError(f"the ledger {self.path} is closed, or could not be kept whole: open it again")
        lines = chain.link(self._lines, entries)
        data = chain.encode(lines)
        try:
            written = os.write(self._descriptor, data)
            os.fsync(self._descriptor)
        except OSError as error:
            self._undo()
            raise StateError(
                f"can't write the ledger {self.path}: {error.strerror}; make room, nothing was released"
            ) from error
        if written != len(data):
            self._undo()
            raise StateError(f"can't write the ledger {self.path}: the disk is full; make room, nothing was released")
        self._lines += lines
        self._size_bytes += written
        return lines

    def _undo(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._size_bytes)
            os.fsync(self._descriptor)
        except OSError:
            self.close()  # what is on the disk is unknown: only a verification from the start may go on

    def verify(self, position: LedgerPosition) -> None:
        """Raise StateError where the file doesn't contain what a checkpoint has seen of it."""
        if position.seq > len(self._lines) or chain.position(self._lines, position.seq) != position:
            raise StateError(
                f"{self.path} has {len(self._lines)} lines and doesn't contain line {position.seq} as the checkpoint "
                "knows it; restored from a backup? Bring the newest ledger back, releases are missing in this one"
            )

    def close(self) -> None:
        """Release the lock. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open_locked(path: Path) -> int:
    """A descriptor of the file with its lock, for appending; its entry in the folder is on the disk already."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        files.sync_folder(path.parent)
        _lock(descriptor, path)
        if os.fstat(descriptor).st_ino != os.stat(path).st_ino:  # repaired by its owner between our two steps
            raise StateError(f"the ledger {path} is in use by another process: stop that one first")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StateError(f"the ledger {path} is in use by another process: stop that one first") from error


def _replace(path: Path, content: bytes, old_descriptor: int) -> int:
    """Exchange the file's content atomically; its new descriptor, locked before anyone else can see the file."""
    temporary = path.with_name(path.name + ".repair")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            _lock(descriptor, path)
            if os.write(descriptor, content) != len(content):
                raise StateError(f"can't repair the ledger {path}: the disk is full; make room and start again")
            os.fsync(descriptor)
            os.replace(temporary, path)
            files.sync_folder(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise StateError(f"can't repair the ledger {path}: {error.strerror}; make room and start again") from error
    os.close(old_descriptor)
    return descriptor
