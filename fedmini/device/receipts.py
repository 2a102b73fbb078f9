"""What left a device: a line for each contribution, on its disk before the contribution is on its way."""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmini.errors import StateError


@dataclass(frozen=True, slots=True)
class DeviceReceipt:
    """One contribution, as its owner may see it. It was masked: it says nothing but in the sum with the others'."""

    time: float  # seconds since 1970, by the device's clock
    run_id: str
    round_num: int
    attempt: int
    manifest_hash: str
    size_bytes: int  # of the masked vector's message
    sha256: str  # over those bytes
    epsilon: Mapping[str, float]  # of each protected unit, over all runs so far, this contribution included


class Receipts:
    """The file of receipts: append-only. The ledger beside it is what counts; this is what its owner is shown."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def append(self, receipt: DeviceReceipt) -> None:
        """Write one down: it is on the disk when this returns. Raises StateError: nothing may leave then."""
        line = json.dumps(asdict(receipt)).encode() + b"\n"
        try:
            with self._lock:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                try:
                    _end_line(descriptor, self._path)
                    if os.write(descriptor, line) != len(line):
                        raise StateError(f"can't write {self._path}: the disk is full; nothing left this device")
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise StateError(f"can't write {self._path}: {error.strerror}; nothing left this device") from error

    def read(self) -> tuple[DeviceReceipt, ...]:
        """All receipts, the oldest first. A line that a crash cut short stands for nothing that left, and is left out."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise StateError(f"can't read {self._path}: {error.strerror}") from error
        found = (_parse(line) for line in content.split(b"\n") if line)
        return tuple(receipt for receipt in found if receipt is not None)


def _end_line(descriptor: int, path: Path) -> None:
    """A line that a crash cut short gets its end, so that the next one is a line of its own."""
    size = os.fstat(descriptor).st_size
    if size:
        with path.open("rb") as file:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                os.write(descriptor, b"\n")


def _parse(line: bytes) -> DeviceReceipt | None:
    try:
        fields: dict[str, Any] = json.loads(line)
        return DeviceReceipt(**fields)
    except (ValueError, TypeError):
        return None
