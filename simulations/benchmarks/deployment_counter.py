"""How many requests this process makes, and what another one takes: read from outside, not from what is measured."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from fedmini.flower.calls import Calls


class Counted:
    """Counts every call to a SuperLink that this process makes, while it is entered."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._lock = threading.Lock()
        self._plain = Calls.call

    def __enter__(self) -> "Counted":
        plain = self._plain

        def counting(calls: Calls, *arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.num_requests += 1
            return plain(calls, *arguments, **named)

        Calls.call = counting  # type: ignore[assignment, method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Calls.call = self._plain  # type: ignore[method-assign]


def cpu_seconds(pid: int) -> float:
    """What a process has taken so far, user and system, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """The memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
