"""A ledger's lines as bytes: hash-chained JSON, where a changed byte anywhere is refused.

A line's `prev` is the SHA-256 of the line before (64 zeros for the first), its `check` that of its own other fields.
What a chain can't show is that its end is missing: `ChainFile.verify` compares it with what a checkpoint remembers.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmini.errors import StateError
from fedmini.types import ADJACENCY, LedgerPosition, PrivacyEvent

Line = dict[str, Any]

GENESIS = "0" * 64
LINK = ("seq", "prev")
STATES = ("DEBITED", "RECOVERED")
EVENT = ("unit", "noise", "adjacency", "z_eff", "sampling_rate", "num_steps", "clip_norm")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


# A chain has no key: who can write the file can chain anything. What can't be true is refused here, and by our own error.
POSSIBLE: Mapping[str, Callable[[Any], bool]] = {
    "run_id": _is_text,
    "round": _is_count,
    "attempt": _is_count,
    "state": lambda value: _is_text(value) and value in STATES,
    "roster_hash": _is_text,
    "manifest_hash": _is_text,
    "unit": lambda value: _is_text(value) and value in ADJACENCY,
    "noise": lambda value: _is_text(value) and value in ("local", "shared", "server"),
    "adjacency": _is_text,
    "z_eff": _is_positive,
    "sampling_rate": lambda value: _is_positive(value) and value <= 1,
    "num_steps": lambda value: _is_count(value) and value >= 1,
    "clip_norm": _is_positive,
    "participation": lambda value: _is_count(value) and value >= 1,
    "seeded": lambda value: type(value) is bool,
}


@dataclass(frozen=True, slots=True)
class LineFormat:
    """What the lines of one kind of ledger hold, beside what links them: a state and an event are always there."""

    content: tuple[str, ...]  # in their order in the file
    remedy: str  # what to do where so little is left that nobody knows what was spent


RUN_LINES = LineFormat(
    ("run_id", "round", "attempt", "state", "roster_hash", *EVENT, "participation", "seeded"),
    "start a new run",
)


def parse(content: bytes, path: Path, line_format: LineFormat = RUN_LINES) -> list[Line]:
    """The verified lines of a ledger; those of a cut end come back as RECOVERED.

    An end without a newline that isn't a whole line counts as spent: each unit's last event once more. Where no whole
    line is before it, or any other byte is not as it was written, raises StateError with the number of the line.
    """
    *whole, tail = content.split(b"\n")
    if b"}" in tail:  # a whole line that lacks only its newline; anything else with a "}" was not cut but changed
        whole.append(tail)
        tail = b""
    lines: list[Line] = []
    for raw in whole:
        lines.append(_decode(raw, position(lines, len(lines)), path, line_format))
    if tail and not lines:
        raise StateError(
            f"{path}: line 1 is cut and no line is before it: what was spent is unknown, {line_format.remedy}"
        )
    if tail:
        lines += link(lines, lost_entries(lines, line_format))
    return lines


def lost_entries(lines: Sequence[Line], line_format: LineFormat) -> list[Line]:
    """What a cut end is taken for: the last event of each unit once more, marked RECOVERED."""
    last_by_unit = {line["unit"]: line for line in lines}
    return [{**{key: line[key] for key in line_format.content}, "state": "RECOVERED"} for line in last_by_unit.values()]


def entry_of(event: PrivacyEvent) -> Line:
    """An event's part of an entry, in the order of EVENT."""
    return {
        "unit": event.unit,
        "noise": event.noise,
        "adjacency": ADJACENCY[event.unit],
        "z_eff": event.z_eff,
        "sampling_rate": event.sampling_rate,
        "num_steps": event.num_steps,
        "clip_norm": event.clip_norm,
    }


def event_of(line: Line) -> PrivacyEvent:
    """The event that a line wrote down."""
    return PrivacyEvent(
        line["unit"], line["noise"], line["z_eff"], line["sampling_rate"], line["num_steps"], line["clip_norm"]
    )


def link(lines: Sequence[Line], entries: Sequence[Line]) -> list[Line]:
    """The entries as the lines that follow `lines`: numbered, chained and checked."""
    linked: list[Line] = []
    last = position(lines, len(lines))
    for entry in entries:
        line = {"seq": last.seq + 1, "prev": last.hash, **entry}
        linked.append({**line, "check": _check(line)})
        last = LedgerPosition(last.seq + 1, hashlib.sha256(_encode_line(linked[-1])).hexdigest())
    return linked


def encode(lines: Sequence[Line]) -> bytes:
    """The bytes of these lines in the file."""
    return b"".join(_encode_line(line) + b"\n" for line in lines)


def position(lines: Sequence[Line], seq: int) -> LedgerPosition:
    """Where the ledger stood after its first `seq` lines."""
    return LedgerPosition(seq, hashlib.sha256(_encode_line(lines[seq - 1])).hexdigest() if seq > 0 else GENESIS)


def _decode(raw: bytes, before: LedgerPosition, path: Path, line_format: LineFormat) -> Line:
    try:
        line = json.loads(raw)
        intact = (
            tuple(line) == (*LINK, *line_format.content, "check")
            and line["check"] == _check(line)
            and _encode_line(line) == raw
            and (line["seq"], line["prev"]) == (before.seq + 1, before.hash)
            and all(POSSIBLE[key](line[key]) for key in line_format.content if key in POSSIBLE)
            and ("adjacency" not in line or line["adjacency"] == ADJACENCY[line["unit"]])
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise StateError(
            f"{path}: line {before.seq + 1} was changed or doesn't follow the one before: bring an intact copy back"
        )
    return dict(line)


def _encode_line(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode()


def _check(line: Line) -> str:
    return hashlib.sha256(_encode_line({key: value for key, value in line.items() if key != "check"})).hexdigest()
