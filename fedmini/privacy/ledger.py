"""What has been released, on disk before it happens: an append-only, hash-chained file of JSON lines.

A changed byte anywhere is refused, a last line that a crash cut short counts as spent (RECOVERED), and lines that are
missing at the end are found by comparing with what a checkpoint remembers (`Ledger.verify`).

Epsilon is recomputed from the lines alone. An event counts as often as the largest `participation` on its lines, plus
once for each RECOVERED line; where a unit's lines hold different events, all lines are composed, as if one device had
been in every release.
"""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Self

from fedmini.errors import StateError
from fedmini.privacy import accounting, chain
from fedmini.privacy.chain import Line
from fedmini.privacy.chain_file import ChainFile
from fedmini.types import LedgerPosition, PrivacyEvent, Roster, Unit


class Ledger:
    """An open ledger, locked against every other process: debit first, release after.

    Guarantee: when `debit` has returned, its lines are on the disk. When it raised StateError, nothing was spent and
    nothing before is lost.
    """

    def __init__(self, file: ChainFile, run_id: str) -> None:
        self._file = file
        self._run_id = run_id

    @classmethod
    def open(cls, path: Path, run_id: str) -> Self:
        """The ledger of a run, created where there is none, else verified from its first line to its last.

        Raises StateError where another process has it open, it belongs to another run, or it was damaged; a cut last
        line is replaced by RECOVERED lines, atomically.
        """

        def check_run(lines: Sequence[Line]) -> None:
            for line in lines:
                if line["run_id"] != run_id:
                    raise StateError(
                        f"{path} is the ledger of run {line['run_id']!r}, expected {run_id!r}: use its own folder"
                    )

        return cls(ChainFile.open(path, chain.RUN_LINES, check_run), run_id)

    def debit(self, roster: Roster, events: Sequence[PrivacyEvent], participation: int, seeded: bool) -> None:
        """Write down a release, one line for each event, before any contribution to it is asked for.

        `participation` is the largest number of debited releases, this one included, that any one device of the roster
        can have been part of. A seeded attempt that is debited already, with the same roster and events, is a replay of
        the same bits and costs nothing; an attempt debited in any other way raises StateError, as does a full disk.
        """
        if roster.run_id != self._run_id:
            raise StateError(f"expected a debit for run {self._run_id!r}, got one for {roster.run_id!r}")
        entries = [_entry(roster, event, participation, seeded) for event in events]
        known = [
            line for line in self._debits() if (line["round"], line["attempt"]) == (roster.round_num, roster.attempt)
        ]
        if known and not (seeded and _same_release(known, entries)):
            raise StateError(
                f"round {roster.round_num}, attempt {roster.attempt} is debited already and can't be released again: "
                "start a new attempt"
            )
        # A crash can leave the first lines of an attempt without its last ones, which were never acknowledged.
        missing = entries[len(known) :]
        counted = max([participation, *(line["participation"] for line in known)])
        if missing and counted < 1:
            raise StateError(f"a debit's participation counts the release itself: expected 1 or more, got {counted}")
        if missing:
            self._file.append([{**entry, "participation": counted} for entry in missing])

    @property
    def position(self) -> LedgerPosition:
        """Where the ledger stands: to be saved with the weights that its debits paid for."""
        return self._file.position

    def verify(self, position: LedgerPosition) -> None:
        """Raise StateError where the ledger doesn't contain what a checkpoint has seen of it."""
        self._file.verify(position)

    @property
    def num_debits(self) -> int:
        """Releases that were debited: distinct pairs of round and attempt."""
        return len({(line["round"], line["attempt"]) for line in self._debits()})

    def num_debits_until(self, round_num: int, attempt: int) -> int:
        """Releases that were debited up to this attempt at this round, in the order of rounds and attempts."""
        debited = {(line["round"], line["attempt"]) for line in self._debits()}
        return sum(pair <= (round_num, attempt) for pair in debited)

    def last_attempt(self, round_num: int) -> int | None:
        """The largest attempt at a round that was debited."""
        return max((line["attempt"] for line in self._debits() if line["round"] == round_num), default=None)

    def is_debited(self, round_num: int, attempt: int) -> bool:
        """Whether an attempt at a round was debited."""
        return any((line["round"], line["attempt"]) == (round_num, attempt) for line in self._debits())

    @property
    def was_seeded(self) -> bool:
        """Whether any release drew its randomness from a seed, and so protected nobody."""
        return any(line["seeded"] for line in self._file.lines)

    def max_participation(self, unit: Unit) -> int:
        """How many of the unit's releases one device can have been part of, as `epsilon` counts them."""
        return sum(count for _, count in self.composition(unit))

    def epsilon(self, unit: Unit, target_delta: float) -> float:
        """What the unit's releases have cost the worst device so far."""
        return accounting.compose(self.composition(unit), target_delta)

    def composition(self, unit: Unit) -> list[tuple[PrivacyEvent, int]]:
        """The unit's distinct events, and how often the worst device can have been in each."""
        return _composition(self._file.lines, unit)

    def epsilon_after(self, event: PrivacyEvent, participation: int, target_delta: float) -> float:
        """What `epsilon` of the event's unit would be after one more debit."""
        entry = {**chain.entry_of(event), "state": "DEBITED", "participation": participation}
        return accounting.compose(_composition([*self._file.lines, entry], event.unit), target_delta)

    def _debits(self) -> list[Line]:
        return [line for line in self._file.lines if line["state"] == "DEBITED"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. Closing twice is fine."""
        self._file.close()


def epsilon_over(ledgers: Sequence[Ledger], unit: Unit, target_delta: float) -> float:
    """What releases in several ledgers over the same data have cost together, as if one device had been in each most often."""
    return accounting.compose([part for ledger in ledgers for part in ledger.composition(unit)], target_delta)


def read_ledger(path: Path) -> list[Line]:
    """The lines of a ledger, verified, without its lock: for reports. A cut end is shown as it would be recovered."""
    try:
        return chain.parse(path.read_bytes(), path)
    except OSError as error:
        raise StateError(f"can't read the ledger {path}: {error.strerror}") from error


def _entry(roster: Roster, event: PrivacyEvent, participation: int, seeded: bool) -> Line:
    return {
        "run_id": roster.run_id,
        "round": roster.round_num,
        "attempt": roster.attempt,
        "state": "DEBITED",
        "roster_hash": roster.hash,
        **chain.entry_of(event),
        "participation": participation,
        "seeded": seeded,
    }


def _same_release(known: Sequence[Line], entries: Sequence[Line]) -> bool:
    same = [key for key in chain.RUN_LINES.content if key != "participation"]
    pairs = zip(known, entries, strict=False)
    return len(known) <= len(entries) and all(line[key] == entry[key] for line, entry in pairs for key in same)


_event_fields = itemgetter(*chain.EVENT)


def _composition(lines: Sequence[Line], unit: Unit) -> list[tuple[PrivacyEvent, int]]:
    """The unit's distinct events, and how often the worst device can have been in each."""
    by_event: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        if line["unit"] == unit:
            by_event.setdefault(_event_fields(line), []).append(line)
    return [(chain.event_of(group[0]), _count(group, alone=len(by_event) == 1)) for group in by_event.values()]


def _count(lines: Sequence[Line], *, alone: bool) -> int:
    num_recovered = sum(line["state"] == "RECOVERED" for line in lines)
    most: int = max((line["participation"] for line in lines if line["state"] == "DEBITED"), default=0) + num_recovered
    return most if alone else max(most, len(lines))
