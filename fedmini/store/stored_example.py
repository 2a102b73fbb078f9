"""One stored example, the check that it passes before it is stored, and its bytes."""

import re
import struct
from dataclasses import dataclass

from fedmini.errors import ConfigError

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_PROMPT_LENGTH = struct.Struct(">q")  # bytes; -1: no prompt


@dataclass(frozen=True, slots=True, repr=False)
class StoredExample:
    """What a person wrote, and what it answered. Its repr never shows text."""

    response: str
    prompt: str | None = None  # None: text that answers nothing

    def __repr__(self) -> str:
        return f"StoredExample(response=<hidden>, prompt={'None' if self.prompt is None else '<hidden>'})"


def to_bytes(example: StoredExample) -> bytes:
    """An example's bytes. Raises ConfigError, which never holds what it says, where it is empty or not text."""
    response = _encode(example.response, "response")
    if example.prompt is None:
        return _PROMPT_LENGTH.pack(-1) + response
    prompt = _encode(example.prompt, "prompt")
    return _PROMPT_LENGTH.pack(len(prompt)) + prompt + response


def from_bytes(content: bytes) -> StoredExample:
    """The example of `to_bytes`: only for bytes that were authenticated."""
    (prompt_length,) = _PROMPT_LENGTH.unpack_from(content)
    texts = content[_PROMPT_LENGTH.size :]
    if prompt_length < 0:
        return StoredExample(texts.decode())
    return StoredExample(texts[prompt_length:].decode(), texts[:prompt_length].decode())


def _encode(text: object, name: str) -> bytes:
    if not isinstance(text, str):
        raise ConfigError(f"{name}: expected a non-empty string, got {type(text).__name__}")
    if not text.strip():
        raise ConfigError(f"{name}: expected a non-empty string, got an empty one")
    # Looked for, not left to encode(): its error carries the whole text.
    if _HALF_PAIR.search(text):
        raise ConfigError(f"{name}: it holds half of a surrogate pair, which is not text: give whole characters")
    return text.encode()
