"""What has left one device, over all runs it ever joins: its own record, on disk before anything leaves.

A server's ledger is one run's; a device composes over its runs here, against a lifetime limit for each unit, never both
added up. The file is a chain like the run's: a changed byte is refused, and a cut last line counts each unit's last
event once more (RECOVERED), a reserve: what was cut was never acknowledged, so nothing of it can have left.
"""

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedmini.errors import PrivacyBudgetError, ProtocolError, ReplayError
from fedmini.privacy import accounting, chain
from fedmini.privacy.chain import Line, LineFormat
from fedmini.privacy.chain_file import ChainFile
from fedmini.types import PrivacyEvent, Unit

TURN_SECONDS = 30.0  # how long a thread waits for another of its process to be done with a ledger

DEVICE_LINES = LineFormat(
    ("run_id", "round", "attempt", "state", "manifest_hash", *chain.EVENT, "seeded"),
    "bring an intact copy back, or remove the file if this device has never taken part in a run",
)


@dataclass(frozen=True, slots=True)
class LifetimeLimits:
    """What all runs together may cost one device, for each kind of unit by itself."""

    lifetime_epsilon: float
    lifetime_delta: float


@dataclass(frozen=True, slots=True)
class DeviceRelease:
    """One contribution that is about to leave a device, and what its run's manifest says about the next ones."""

    run_id: str
    round_num: int
    attempt: int
    manifest_hash: str
    events: tuple[PrivacyEvent, ...]  # one for each protected unit
    max_participations: int  # in the run, lost attempts included: the manifest's max_releases
    min_separation: int  # rounds between two participations
    is_seeded: bool


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the owner of a device may be shown of one contribution."""

    run_id: str
    round_num: int
    attempt: int
    manifest_hash: str
    events: tuple[PrivacyEvent, ...]
    is_seeded: bool
    is_recovered: bool  # stands for a line that was cut: counted, though it may never have left


class DeviceLedger:
    """A device's open ledger, locked against every other process: debit first, contribute after.

    Guarantee: when `debit` has returned, its lines are on the disk. When it raised, nothing was spent and nothing lost.
    Threads of one process take turns: one that shows its owner what was spent must not cost another one its round.
    """

    def __init__(self, file: ChainFile) -> None:
        self._file = file
        self._is_open = True

    @classmethod
    def open(cls, path: Path) -> Self:
        """A device's ledger, created where there is none, else verified from its first line to its last.

        Raises StateError where another process, or this thread, has it open, or it was damaged; a cut last line is
        replaced by RECOVERED lines, atomically.
        """
        is_new = _TURNS.take(path)
        try:
            return cls(ChainFile.open(path, DEVICE_LINES))
        except BaseException:
            if is_new:
                _TURNS.give_back(path)
            raise

    def check_new(self, run_id: str, round_num: int, attempt: int) -> None:
        """Raise ReplayError unless this attempt is later than every one this device was ever part of in the run.

        So a server that was restored from a backup, or opens a second session under the same number, is refused.
        """
        latest = max(_attempts(self._file.lines, run_id), default=None)
        if latest is not None and (round_num, attempt) <= latest:
            raise ReplayError(
                f"expected something later than round {latest[0]}, attempt {latest[1]}, which this device has taken "
                f"part in, got round {round_num}, attempt {attempt}: was the server restored from a backup? "
                "Start a later attempt"
            )

    def is_replay(self, release: DeviceRelease) -> bool:
        """Whether this very release was debited before and is seeded: the same bits again, which cost nothing.

        In a deployment nothing is seeded, and so nothing is ever a replay.
        """
        known = self._lines_of(release)
        return release.is_seeded and bool(known) and known == _entries(release)[: len(known)]

    def check(self, release: DeviceRelease, limits: LifetimeLimits) -> None:
        """Raise what `debit` would refuse it with, and write nothing.

        ProtocolError where the release isn't new, comes more often or sooner than the manifest allows, or protects
        nothing; PrivacyBudgetError where a unit's epsilon over all runs would pass its lifetime limit. A replay is fine.
        """
        units = [event.unit for event in release.events]
        if not units or len(set(units)) < len(units):
            raise ProtocolError(
                f"expected one event for each protected unit, got {units}: what can't be accounted for doesn't leave"
            )
        if self.is_replay(release):
            return
        self.check_new(release.run_id, release.round_num, release.attempt)
        num_done = self.num_participations(release.run_id)
        check_participations(release, num_done)
        check_separation(release, max(_attempts(self._file.lines, release.run_id), default=None))
        num_left = release.max_participations - num_done
        for event in release.events:
            check_lifetime(_composition(self._file.lines, event.unit), event, num_left, limits)

    def debit(self, release: DeviceRelease, limits: LifetimeLimits) -> None:
        """Write a release down, one line for each event, before anything of it leaves the device.

        Raises, before anything is written, what `check` does, and StateError where the disk refuses. A replay costs
        nothing.
        """
        self.check(release, limits)
        # A crash can leave the first lines of an attempt without its last ones, which were never acknowledged.
        num_known = len(self._lines_of(release)) if self.is_replay(release) else 0
        entries = _entries(release)[num_known:]
        if entries:
            self._file.append(entries)

    def epsilon(self, unit: Unit, target_delta: float) -> float:
        """What all contributions of this device, in all its runs, have cost one unit so far."""
        return accounting.compose(_composition(self._file.lines, unit), target_delta)

    def num_participations(self, run_id: str) -> int:
        """How many contributions to a run were debited; a cut line counts as one."""
        lines = [line for line in self._file.lines if line["run_id"] == run_id]
        recovered = [line["unit"] for line in lines if line["state"] == "RECOVERED"]
        return len(_attempts(lines, run_id)) + max((recovered.count(unit) for unit in set(recovered)), default=0)

    def releases(self) -> tuple[Receipt, ...]:
        """All that was debited, the oldest first, one receipt for each contribution and each recovered line."""
        groups: dict[tuple[object, ...], list[Line]] = {}
        for line in self._file.lines:
            is_own = line["state"] == "RECOVERED"
            key = (line["run_id"], line["round"], line["attempt"], line["seq"] if is_own else None)
            groups.setdefault(key, []).append(line)
        return tuple(_receipt(lines) for lines in groups.values())

    def _lines_of(self, release: DeviceRelease) -> list[Line]:
        """The entries that were debited under this run, round and attempt."""
        key = (release.run_id, release.round_num, release.attempt)
        return [
            {name: line[name] for name in DEVICE_LINES.content}
            for line in self._file.lines
            if line["state"] == "DEBITED" and (line["run_id"], line["round"], line["attempt"]) == key
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Closing twice is fine."""
        self._file.close()
        if self._is_open:
            self._is_open = False
            _TURNS.give_back(self._file.path)


class _Turns:
    """Which thread of this process has which ledger open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: dict[Path, int] = {}

    def take(self, path: Path) -> bool:
        """Wait until no other thread has it open, for a while; whether it is this thread's turn from now on only."""
        own = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._threads.get(path.absolute(), own) == own, TURN_SECONDS)
            if path.absolute() in self._threads:  # by this thread, or for too long: the file's own lock refuses
                return False
            self._threads[path.absolute()] = own
            return True

    def give_back(self, path: Path) -> None:
        """Let the next thread have it."""
        with self._changed:
            self._threads.pop(path.absolute(), None)
            self._changed.notify_all()


_TURNS = _Turns()


def check_participations(release: DeviceRelease, num_done: int) -> None:
    """Raise ProtocolError where a device has been in a run as often as its manifest allows."""
    if not num_done < release.max_participations:
        raise ProtocolError(
            f"expected at most {release.max_participations} contributions to run {release.run_id!r}, got a request for "
            f"one more after {num_done}: this device is done with the run"
        )


def check_separation(release: DeviceRelease, latest: tuple[int, int] | None) -> None:
    """Raise ProtocolError where a round comes too soon after the last one. Another attempt at the same round may."""
    if latest is not None and 0 < release.round_num - latest[0] < release.min_separation:
        raise ProtocolError(
            f"expected {release.min_separation} rounds or more since round {latest[0]}, got round {release.round_num}: "
            "ask this device again later"
        )


def check_lifetime(
    past: Sequence[tuple[PrivacyEvent, int]], event: PrivacyEvent, num_left: int, limits: LifetimeLimits
) -> None:
    """Raise PrivacyBudgetError where one more `event` would bring its unit's epsilon above the lifetime limit.

    The accountant takes tenths of a second and remembers. So numbers are tried first that are the same for many debits,
    and cost more than one release: all `num_left` that the run may still ask for, then one that is rounded up.
    """
    if limits.lifetime_epsilon == math.inf:
        return
    used = sum(count for known, count in past if known == event)
    step = 1 << max(0, (used + 1).bit_length() - 3)
    rounded = (used // step + 1) * step - used
    after = 0.0
    for num_more in sorted({min(num_left, rounded), num_left, 1}, reverse=True):
        after = accounting.compose([*past, (event, num_more)], limits.lifetime_delta)
        if after <= limits.lifetime_epsilon * (1 + 1e-9):
            return
    raise PrivacyBudgetError(
        f"expected a lifetime {event.unit} epsilon of at most {limits.lifetime_epsilon:g} on this device, it would be "
        f"{accounting.rounded_up(after)} after this contribution: leave the run, or raise lifetime_epsilon"
    )


def _entries(release: DeviceRelease) -> list[Line]:
    return [
        {
            "run_id": release.run_id,
            "round": release.round_num,
            "attempt": release.attempt,
            "state": "DEBITED",
            "manifest_hash": release.manifest_hash,
            **chain.entry_of(event),
            "seeded": release.is_seeded,
        }
        for event in release.events
    ]


def _attempts(lines: Iterable[Line], run_id: str) -> set[tuple[int, int]]:
    """The rounds and attempts of a run that were debited."""
    return {
        (line["round"], line["attempt"]) for line in lines if line["run_id"] == run_id and line["state"] == "DEBITED"
    }


def _composition(lines: Iterable[Line], unit: Unit) -> list[tuple[PrivacyEvent, int]]:
    """The unit's distinct events over all runs, and how often each was released."""
    counts: dict[PrivacyEvent, int] = {}
    for line in lines:
        if line["unit"] == unit:
            event = chain.event_of(line)
            counts[event] = counts.get(event, 0) + 1
    return list(counts.items())


def _receipt(lines: Sequence[Line]) -> Receipt:
    first = lines[0]
    return Receipt(
        run_id=first["run_id"],
        round_num=first["round"],
        attempt=first["attempt"],
        manifest_hash=first["manifest_hash"],
        events=tuple(chain.event_of(line) for line in lines),
        is_seeded=first["seeded"],
        is_recovered=first["state"] == "RECOVERED",
    )
