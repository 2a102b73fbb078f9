"""The small files in which Linux says how it is: read leniently, for any of them may be missing or spoilt."""

from pathlib import Path


def text(path: Path) -> str | None:
    """A file's text without the space around it; None where it can't be read (a sensor may refuse while it sleeps)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def integer(path: Path) -> int | None:
    """A file's whole number; None where it can't be read or is none."""
    found = text(path)
    try:
        return None if found is None else int(found)
    except ValueError:
        return None


def entries(folder: Path, pattern: str) -> tuple[Path, ...]:
    """What a folder holds by a pattern, sorted; nothing where there is no such folder."""
    try:
        return tuple(sorted(folder.glob(pattern)))
    except OSError:
        return ()
