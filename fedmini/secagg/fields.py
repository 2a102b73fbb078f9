"""The fields of a message: how each is written as plain values, and read from bytes within its range.

Reading goes along the message's own structure, one value at a time. A library's reading of the whole would make room
for whatever lists in lists a few bytes announce, before anybody could look at them.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from fedmini.errors import UpdateError
from fedmini.secagg.messages import MAX_DEVICES
from fedmini.secagg.trust import MAX_DEVICE_ID_BYTES, is_device_id

CONTAINERS = frozenset((*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF))  # first bytes of MessagePack's arrays and maps
NONE = b"\xc0"


class Reader:
    """The values in some bytes, in their order. Memory: a copy of the bytes, and one value at a time."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._unpacker = msgpack.Unpacker(
            raw=False, max_buffer_size=max(len(content), 1), max_str_len=MAX_DEVICE_ID_BYTES, max_ext_len=0
        )
        self._unpacker.feed(content)

    def value(self, name: str) -> Any:
        """The next value. Raises UpdateError for a list or a map, one that is cut, and text that is too long."""
        place = self._unpacker.tell()
        if place < len(self._content) and self._content[place] in CONTAINERS:
            raise UpdateError(f"{name}: expected a single value, got a list")
        return self._read(self._unpacker.unpack, name)

    def length(self, name: str) -> int:
        """How many values follow as one list. Raises UpdateError where no list follows."""
        length: int = self._read(self._unpacker.read_array_header, name)
        return length

    def skips_none(self) -> bool:
        """Whether the next value is None; the one after it is next then."""
        place = self._unpacker.tell()
        is_none: bool = self._content[place : place + 1] == NONE
        if is_none:
            self._unpacker.skip()
        return is_none

    def end(self) -> None:
        """Raise UpdateError where anything is left."""
        if self._unpacker.tell() != len(self._content):
            raise UpdateError("something stands behind the end of a message")

    def _read(self, read: Callable[[], Any], name: str) -> Any:
        try:
            return read()
        except (ValueError, msgpack.UnpackException):
            pass
        # Outside the handler: what the library says holds parts of the message.
        raise UpdateError(f"{name}: expected another kind of value, or a shorter one: the message was cut or changed")


@dataclass(frozen=True, slots=True)
class Field:
    """How a field is written as plain values, and read back: `read` raises UpdateError where it is out of range."""

    write: Callable[[Any], Any]
    read: Callable[[Reader, str], Any]


def same(value: Any) -> Any:
    """The value itself."""
    return value


def blob(least: int, most: int | None = None) -> Field:
    """So many bytes; with `most`, from the one to the other."""
    most = least if most is None else most

    def read(reader: Reader, name: str) -> bytes:
        value = reader.value(name)
        if not isinstance(value, bytes) or not least <= len(value) <= most:
            raise UpdateError(f"{name}: expected {least if least == most else f'{least} to {most}'} bytes")
        return value

    return Field(same, read)


def number(least: int, most: int) -> Field:
    """An integer in a range."""

    def read(reader: Reader, name: str) -> int:
        value = reader.value(name)
        if type(value) is not int or not least <= value <= most:
            raise UpdateError(f"{name}: expected a number from {least} to {most}")
        return value

    return Field(same, read)


def _read_id(reader: Reader, name: str) -> str:
    value = reader.value(name)
    if not is_device_id(value):
        raise UpdateError(f"{name}: expected printable text of 1 to {MAX_DEVICE_ID_BYTES} bytes")
    return str(value)


DEVICE_ID = Field(same, _read_id)


def record(kind: Callable[..., Any], names: dict[str, Field]) -> Field:
    """A dataclass as a list of its fields; `kind` may be `row`, for a plain tuple."""

    def write(value: Any) -> list[Any]:
        found = value if isinstance(value, tuple) else [getattr(value, name) for name in names]
        return [field.write(item) for field, item in zip(names.values(), found, strict=True)]

    def read(reader: Reader, name: str) -> Any:
        if reader.length(name) != len(names):
            raise UpdateError(f"{name}: expected {len(names)} fields")
        return kind(*[field.read(reader, f"{name}.{key}") for key, field in names.items()])

    return Field(write, read)


def row(*values: Any) -> tuple[Any, ...]:
    """The values as a tuple."""
    return values


def sorted_list(item: Field, key: Callable[[Any], Any], most: int = MAX_DEVICES) -> Field:
    """A tuple whose items' keys strictly increase, so that none comes twice."""

    def read(reader: Reader, name: str) -> tuple[Any, ...]:
        length = reader.length(name)
        if length > most:
            raise UpdateError(f"{name}: expected a list of at most {most}")
        found = tuple([item.read(reader, name) for _ in range(length)])
        if any(left >= right for left, right in itertools.pairwise([key(one) for one in found])):
            raise UpdateError(f"{name}: expected a sorted list that names nobody twice")
        return found

    return Field(lambda value: [item.write(one) for one in value], read)


def optional(item: Field) -> Field:
    """What the field reads, or None."""

    def read(reader: Reader, name: str) -> Any:
        return None if reader.skips_none() else item.read(reader, name)

    return Field(lambda value: None if value is None else item.write(value), read)


def first(row: tuple[Any, ...]) -> Any:
    """The first value of a tuple."""
    return row[0]
