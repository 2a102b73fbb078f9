"""What ends a round of training early: the device's conditions, its time, its memory."""

import threading
import time
from collections.abc import Callable

import psutil

from fedmini.config import TrainingSection
from fedmini.errors import ConditionsError

LOOK_SECONDS = 0.2  # between two looks at the process's memory


class Interruption:
    """Asked again and again while a device trains: `check` raises where it has to stop.

    `stop` may be called from any thread. A look costs microseconds; the memory is looked at a few times a second.
    """

    def __init__(self, limits: TrainingSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._stopped = threading.Event()
        self._why = ""
        self._until = 0.0
        self._next_look = 0.0
        self._process = psutil.Process()

    def begin(self) -> None:
        """A round begins: its time starts to run."""
        self._until = self._clock() + self._limits.max_seconds
        self._next_look = 0.0

    def stop(self, why: str) -> None:
        """Stop what goes on, and all that begins, until `allow`."""
        self._why = why
        self._stopped.set()

    def allow(self) -> None:
        """Training may go on."""
        self._stopped.clear()

    @property
    def is_stopped(self) -> bool:
        """Whether nothing may go on, until `allow`."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise ConditionsError where training has to stop now."""
        if self._stopped.is_set():
            raise ConditionsError(f"this device stopped training: {self._why}")
        now = self._clock()
        if now > self._until:
            raise ConditionsError(
                f"this device stopped training: a round may take {self._limits.max_seconds:g} seconds here; raise "
                "training.max_seconds, or lower training.max_examples"
            )
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            held = self._process.memory_info().rss
            if held > self._limits.max_memory_bytes:
                raise ConditionsError(
                    f"this device stopped training: its process holds {held >> 20} MiB, and may hold "
                    f"{self._limits.max_memory_bytes >> 20} here; raise training.max_memory_bytes, or lower "
                    "training.physical_batch_size"
                )
