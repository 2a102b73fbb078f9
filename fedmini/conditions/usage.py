"""How long a device has trained today and how often it has contributed: on the disk, and never less than it was."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedmini import files
from fedmini.errors import StateError

STEP_S = 10.0

Problem: TypeAlias = Literal["damaged", "unwritable", "set back"]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one day has seen. With a problem it may have been more: whoever limits it takes it as used up."""

    day: date
    seconds: float = 0.0  # of training
    contributions: int = 0
    problem: Problem | None = None  # of the file twice, and of the clock


def day_that_counts(latest: date, shown: date) -> date:
    """The day that is debited: the latest on which anything was, so that setting the clock back gives nothing."""
    return max(latest, shown)


class DailyUsage:
    """Today's usage, in one small JSON file that is replaced atomically. Safe from several threads of one process.

    Guarantee: whoever trains only while `today` has no problem and is under a limit stays under it for each date that
    the clock shows, whatever the clock does and however the process ends, as far as the file can know.
    - A kill, or a power cut, counts up to STEP_S too much, never too little: a step is on the disk before it begins.
    - While the clock shows an earlier day than the last that was debited, there is a problem, until that day comes.
      Who knows that the clock was far ahead then deletes the file.
    - A damaged file is a problem until its day is over: the day on which it was found, and it is replaced.
    - Who deletes the file begins the day anew.
    """

    def __init__(
        self,
        path: Path,
        now: Callable[[], datetime] = datetime.now,
        elapsed: Callable[[], float] = time.monotonic,
        step_s: float = STEP_S,
    ) -> None:
        """`now` is local time, `elapsed` never goes back. Raises StateError where there is a file that can't be read."""
        self.path = path
        self._now = now
        self._elapsed = elapsed
        self._step_s = step_s
        self._lock = threading.Lock()
        self._counted_at: float | None = None  # while training: `elapsed` when it was last added up
        today = now().date()
        self._usage = _read(path, today) or Usage(today)  # of the last day that was debited
        self._on_disk = self._usage
        if self._usage.problem == "damaged":
            self._save(ahead_s=0.0)  # or it would be damaged tomorrow too

    def today(self) -> Usage:
        """Usage until now, the training under way included."""
        with self._lock:
            if self._counted_at is not None:
                self._count()
            elif self._usage.problem == "unwritable":
                self._save(ahead_s=0.0)
            usage = self._current()
            is_set_back = self._now().date() < usage.day
            return replace(usage, problem="set back") if is_set_back and usage.problem is None else usage

    @contextmanager
    def training(self) -> Iterator[None]:
        """Counts the time that passes inside; a device's sleep doesn't (CLOCK_MONOTONIC).

        Raises StateError where the disk refuses, before anything has begun, or where training is counted already. Where
        the disk refuses later, `today` has a problem until it takes it.
        """
        with self._lock:
            self._begin()
        over = threading.Event()
        thread = threading.Thread(target=self._count_until, args=(over,), name="fedmini-usage", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with self._lock:
                self._count()
                self._counted_at = None
                self._save(ahead_s=0.0)

    def contributed(self) -> None:
        """Count one contribution, before it leaves. Raises StateError where the disk refuses: then don't send it."""
        with self._lock:
            before = self._current()
            self._usage = replace(before, contributions=before.contributions + 1)
            self._save(ahead_s=0.0 if self._counted_at is None else self._step_s)
            if self._usage.problem == "unwritable":
                self._usage = replace(before, problem="unwritable")
                raise StateError(f"can't write {self.path}: make room on its disk; the contribution was not counted")

    def _begin(self) -> None:
        if self._counted_at is not None:
            raise StateError("this device's training is being counted already: one round at a time")
        self._usage = self._current()
        self._save(ahead_s=self._step_s)
        if self._usage.problem == "unwritable":
            raise StateError(f"can't write {self.path}: make room on its disk; nothing was trained")
        self._counted_at = self._elapsed()

    def _count_until(self, over: threading.Event) -> None:
        while not over.wait(self._step_s / 2):
            with self._lock:
                self._count()

    def _count(self) -> None:
        """Add what has passed of the training, and keep the disk ahead of it."""
        if self._counted_at is None:
            return
        now = self._elapsed()
        passed_s, self._counted_at = max(0.0, now - self._counted_at), now
        usage = self._current()
        self._usage = replace(usage, seconds=usage.seconds + passed_s)
        is_ahead = self._on_disk.seconds >= self._usage.seconds + self._step_s / 2
        if not is_ahead or self._on_disk.day != self._usage.day:
            self._save(ahead_s=self._step_s)

    def _current(self) -> Usage:
        """The usage of the day that counts. A new day begins without a debit: showing a date alone costs nothing."""
        day = day_that_counts(self._usage.day, self._now().date())
        return self._usage if day == self._usage.day else Usage(day)

    def _save(self, ahead_s: float) -> None:
        """Put the usage on the disk, with `ahead_s` seconds that are still to come; a refusal becomes its problem."""
        is_damaged = self._on_disk.problem == "damaged" and self._on_disk.day == self._usage.day
        self._usage = replace(self._usage, problem="damaged" if is_damaged else None)
        ahead = replace(self._usage, seconds=self._usage.seconds + ahead_s)
        try:
            files.replace_synced(self.path, _encode(ahead), mode=0o600)
        except OSError:
            self._usage = replace(self._usage, problem="unwritable")
            return
        self._on_disk = ahead


def _encode(usage: Usage) -> bytes:
    return (json.dumps({**asdict(usage), "day": usage.day.isoformat()}) + "\n").encode()


def _read(path: Path, today: date) -> Usage | None:
    """What the file says; None where there is none; today with a problem where it is damaged. Raises StateError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(
            f"can't read {path}: {error.strerror}; let the user who runs this own the folder and its files"
        ) from error
    try:
        found = _decode(json.loads(content))
    except (ValueError, RecursionError):
        found = None
    return found or Usage(today, problem="damaged")


def _decode(fields: Any) -> Usage | None:
    """A usage from what JSON made of it; None, or a ValueError, where it can't be one."""
    if not isinstance(fields, dict) or set(fields) != {"day", "seconds", "contributions", "problem"}:
        return None
    day, seconds, contributions = fields["day"], fields["seconds"], fields["contributions"]
    if type(day) is not str or type(seconds) not in (int, float) or type(contributions) is not int:
        return None
    if not 0 <= seconds < math.inf or contributions < 0 or fields["problem"] not in (None, "damaged"):
        return None
    return Usage(date.fromisoformat(day), seconds, contributions, fields["problem"])
