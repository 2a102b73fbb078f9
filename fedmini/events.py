"""What a server or a device logs: one line for each event, of a fixed name and plain fields.

No field ever holds what a person typed, an update or a secret (invariant 10): events are named and filled in by code,
never from a message's content.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal, Protocol, TextIO, TypeAlias

Field: TypeAlias = str | int | float | bool | None
Format: TypeAlias = Literal["text", "json"]

MAX_FIELD_CHARACTERS = 500


class Emit(Protocol):
    """Logs one event."""

    def __call__(self, event: str, /, **fields: Field) -> None: ...


def nowhere(event: str, /, **fields: Field) -> None:
    """Drops every event."""


def to_stream(stream: TextIO, log_format: Format, source: str, clock: Callable[[], float] = time.time) -> Emit:
    """Events as lines of a stream, each flushed: JSON objects, or text for people. Safe from several threads.

    A stream that nobody reads any more, or a full disk, loses events and stops nothing.
    """
    lock = threading.Lock()
    write = _json_line if log_format == "json" else _text_line

    def emit(event: str, /, **fields: Field) -> None:
        line = write(datetime.fromtimestamp(clock(), UTC), source, event, {k: _short(v) for k, v in fields.items()})
        with lock:
            try:
                stream.write(line + "\n")
                stream.flush()
            except (OSError, ValueError):  # ValueError: the stream is closed
                pass

    return emit


def relayed(line: str, log_format: Format, source: str) -> str:
    """A line that another process logged as JSON, in this format. Anything else that it said becomes an event."""
    try:
        record = json.loads(line)
        at = datetime.fromisoformat(record.pop("time"))
        origin, event = str(record.pop("source")), str(record.pop("event"))
    except (ValueError, KeyError, TypeError, AttributeError):
        at, origin, event, record = datetime.now(UTC), source, "process.said", {"line": line}
    write = _json_line if log_format == "json" else _text_line
    return write(at, origin, event, {str(name): _short(value) for name, value in record.items()})


def _json_line(at: datetime, source: str, event: str, fields: Mapping[str, Field]) -> str:
    return json.dumps({"time": at.isoformat(timespec="milliseconds"), "source": source, "event": event, **fields})


def _text_line(at: datetime, source: str, event: str, fields: Mapping[str, Field]) -> str:
    shown = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
    return f"{at.isoformat(timespec='seconds').replace('+00:00', 'Z')} {source}: {event} {shown}".rstrip()


def _shown(value: Field) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return json.dumps(text) if not text.isprintable() or " " in text or not text else text


def _short(value: Field) -> Field:
    too_long = isinstance(value, str) and len(value) > MAX_FIELD_CHARACTERS
    return f"{value[:MAX_FIELD_CHARACTERS]}..." if too_long and isinstance(value, str) else value
