"""One example, and the check that every row from outside passes before it becomes one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from fedmini.errors import ConfigError

_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, repr=False)
class Example:
    """What one person wrote, and what it answered. Its repr never shows text."""

    prompt: str | None  # None: text that answers nothing
    response: str

    def __repr__(self) -> str:
        return f"Example(prompt={'None' if self.prompt is None else '<hidden>'}, response=<hidden>)"


@dataclass(frozen=True, slots=True)
class Record:
    """An example and the device (or, before a Dirichlet split, the topic) that it belongs to."""

    client: str | None
    example: Example


def parse_record(row: object, where: str, needs_client: bool) -> Record:
    """A Record from `{"client", "prompt", "response"}` or `{"client", "text"}`; other keys are ignored.

    `client` is a string or an integer (1 and "1" are the same device); absent, it is None unless it is needed.
    Raises ConfigError that begins with `where` and never holds what the row says.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(
            f'{where}: expected an object such as {{"client": ..., "prompt": ..., "response": ...}}, '
            f"got {type(row).__name__}"
        )
    return Record(_client(row, where, needs_client), _example(row, where))


def _client(row: Mapping[Any, Any], where: str, needs_client: bool) -> str | None:
    if "client" not in row:
        if needs_client:
            raise ConfigError(f'{where}: "client" is missing: say whose example it is, or set data.split = "dirichlet"')
        return None
    client = row["client"]
    if isinstance(client, Integral) and not isinstance(client, bool) and -(2**63) <= int(client) < 2**64:
        return str(int(client))
    return _checked_text(client, f'{where}: "client"', "a non-empty string or a 64-bit integer")


def _example(row: Mapping[Any, Any], where: str) -> Example:
    if "text" in row:
        if "prompt" in row or "response" in row:
            raise ConfigError(f'{where}: "text" stands beside "prompt" or "response": give one form or the other')
        return Example(None, _checked_text(row["text"], f'{where}: "text"', "a non-empty string"))
    for key in ("prompt", "response"):
        if key not in row:
            raise ConfigError(f'{where}: "{key}" is missing: give "prompt" and "response", or "text" alone')
    prompt = _checked_text(row["prompt"], f'{where}: "prompt"', 'a non-empty string (without a prompt, give "text")')
    return Example(prompt, _checked_text(row["response"], f'{where}: "response"', "a non-empty string"))


def _checked_text(value: object, where: str, expected: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected {expected}, got {type(value).__name__}")
    if not value.strip():
        raise ConfigError(f"{where}: expected {expected}, got an empty one")
    # A lone surrogate survives JSON's escapes, can't be encoded, and would fail later in a message that quotes it.
    if _HALF_PAIR.search(value):
        raise ConfigError(f"{where}: it holds half of a surrogate pair, which is not text: write it as UTF-8")
    return value
