"""Small pieces of what commands print."""

import shlex
from pathlib import Path


def counted(number: int, noun: str) -> str:
    """A number of things, "1 round" or "2 rounds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
