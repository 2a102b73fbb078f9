"""An envelope as a Flower message's content, and back: typed fields and one payload of bytes, in pieces.

A piece is an object of its own for Flower, below the size that the public port lets through. Nothing in an envelope is
trusted: who sent it and what is in it is checked by who reads it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedmini.errors import UpdateError

VERSION = 1
PIECE_BYTES = 4 * 2**20
MAX_HEAD_BYTES = 64 * 2**10
HEAD = "fedmini"
EVALUATION = "evaluation"  # the field `release` of a request that is about a run's evaluations, not about its training

Value = str | int | None


@dataclass(frozen=True, slots=True, repr=False)
class Envelope:
    """One message: what it is, a few plain fields, and a payload. Its repr shows no payload."""

    kind: str
    fields: Mapping[str, Value] = field(default_factory=dict)
    payload: bytes = b""

    def __repr__(self) -> str:
        return f"Envelope({self.kind!r}, {len(self.payload)} bytes)"

    def text(self, name: str) -> str:
        """A field that has to be text. Raises UpdateError."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise UpdateError(f"a message of kind {self.kind!r}: expected text as {name!r}")
        return value


def pack(envelope: Envelope) -> RecordDict:
    """The content of a Flower message that carries an envelope."""
    size = len(envelope.payload)
    head = json.dumps({"version": VERSION, "kind": envelope.kind, "fields": dict(envelope.fields), "bytes": size})
    pieces = [envelope.payload[start : start + PIECE_BYTES] for start in range(0, size, PIECE_BYTES)] or [b""]
    records: dict[str, Any] = {HEAD: ConfigRecord({"head": head, "bytes": pieces[0]})}  # each object is a request more
    for name, piece in zip(_names(size), pieces[1:], strict=True):
        records[name] = ConfigRecord({"bytes": piece})
    return RecordDict(records)


def unpack(content: RecordDict) -> Envelope:
    """The envelope in a Flower message's content. Raises UpdateError for anything that `pack` did not make."""
    try:
        head = content[HEAD]["head"]
        assert isinstance(head, str) and len(head) <= MAX_HEAD_BYTES
        found = json.loads(head)
        kind, fields, size = found["kind"], found["fields"], found["bytes"]
        assert found["version"] == VERSION and isinstance(kind, str) and type(size) is int
        assert isinstance(fields, dict) and all(type(value) in (str, int, type(None)) for value in fields.values())
        assert 0 <= size <= len(content) * PIECE_BYTES  # before as many names are made
        names = [HEAD, *_names(size)]
        assert set(content) == set(names)
        pieces = [content[name]["bytes"] for name in names]
        assert all(isinstance(piece, bytes) for piece in pieces)
        payload = b"".join(pieces)  # type: ignore[arg-type]
        assert len(payload) == size
    except (AssertionError, KeyError, TypeError, ValueError, RecursionError):
        raise UpdateError(
            f"expected a message of fedmini's, version {VERSION}: is the other side up to date?"
        ) from None
    return Envelope(kind, fields, payload)


def _names(size: int) -> list[str]:
    """The records of all pieces but the first."""
    return [f"piece-{index:04d}" for index in range(1, -(-size // PIECE_BYTES))]


def num_objects(payload_bytes: int) -> int:
    """How many of Flower's objects a message with such a payload is made of, at most."""
    return 3 + -(-payload_bytes // PIECE_BYTES)  # the message, the dictionary of records, the head
