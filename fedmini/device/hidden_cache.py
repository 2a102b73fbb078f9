"""What frozen layers say of a device's examples, on its disk: encrypted under the key of its store, within a size limit.

DIR/hidden/<name, blinded>    one example's state. All of it can be computed again: what is damaged or missing is.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fedmini.errors import StateError
from fedmini.store.sealing import OVERHEAD_BYTES, Sealer

_PARTIAL = "partial-"


class HiddenCache:
    """Up to `max_bytes` of states, each in a file that is mapped while it is opened. What came first stays.

    `sealer` gives what encrypts, and is asked at each `keep_only`: once the store is erased, nothing of before can be opened.
    A disk that is full or fails costs time, never a round. One process writes here, in one thread at a time: the lock of the
    device's folder sees to it. So the folder is looked through once, and what it holds is counted from then on.
    """

    def __init__(self, folder: Path, max_bytes: int, sealer: Callable[[], Sealer]) -> None:
        self._folder, self._max_bytes, self._sealer = folder, max_bytes, sealer
        self._current: Sealer | None = None
        self._total_bytes: int | None = None  # None: to be looked up

    def __repr__(self) -> str:
        return f"HiddenCache({str(self._folder)!r})"

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def read(self, name: bytes) -> bytes | None:
        """What was kept under this name; None where nothing is, or what is there can't be opened."""
        sealer = self._held_sealer()
        try:
            with (self._folder / sealer.blinded(name)).open("rb") as file, _mapped(file.fileno()) as content:
                return sealer.open_derived(content, name)
        except (OSError, ValueError):  # not there; an empty file can't be mapped
            return None

    def keep(self, name: bytes, content: bytes) -> None:
        """Keep it where there is room for it."""
        sealer = self._held_sealer()
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            place = self._folder / sealer.blinded(name)
            total = self._size_bytes() + len(content) + OVERHEAD_BYTES - _size_bytes(place)
            if total > self._max_bytes:
                return
            descriptor, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=self._folder)  # 0600
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(sealer.seal_derived(content, name))
                os.replace(partial, place)
            except OSError:
                os.unlink(partial)
                raise
            self._total_bytes = total

    def keep_only(self, names: set[bytes]) -> None:
        """Let go of every other example's: it was erased, has expired, or is another run's."""
        sealer = self._current = self._sealer()
        kept = {sealer.blinded(name) for name in names}
        with contextlib.suppress(OSError):
            for path in list(self._folder.iterdir()):
                if path.name not in kept:
                    path.unlink(missing_ok=True)
        self._total_bytes = None

    def erase(self) -> None:
        """Delete all of it. Raises StateError where the disk refuses."""
        self._current = self._total_bytes = None
        try:
            if self._folder.exists():
                for path in list(self._folder.iterdir()):
                    path.unlink()
        except OSError as error:
            raise StateError(f"can't erase {self._folder}: {error.strerror}; delete that folder") from error

    def _held_sealer(self) -> Sealer:
        if self._current is None:
            self._current = self._sealer()
        return self._current

    def _size_bytes(self) -> int:
        if self._total_bytes is not None:
            return self._total_bytes
        with os.scandir(self._folder) as entries:
            return sum(entry.stat().st_size for entry in entries)


def _size_bytes(place: Path) -> int:
    """Of what stands there; 0 where nothing does."""
    with contextlib.suppress(FileNotFoundError):
        return place.stat().st_size
    return 0


@contextlib.contextmanager
def _mapped(descriptor: int) -> Iterator[memoryview]:
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
        yield content
