"""Room on the disk for what a round writes down: it is taken before the round costs anything, and given up when needed."""

import os
from contextlib import suppress
from pathlib import Path

from fedmini import files
from fedmini.errors import StateError

ROOM = "room-to-write"
ROOM_BYTES = 2**16  # a debit, a day's usage and a receipt take some blocks of 4096


def take(folder: Path) -> None:
    """Hold some room in a device's folder. Raises StateError, and holds none, where the disk refuses."""
    try:
        # Random, as a file system may keep zeros in no room at all.
        files.write_synced(folder / ROOM, os.urandom(ROOM_BYTES))
    except OSError as error:
        give_up(folder)
        raise StateError(
            f"can't write in {folder}: {error.strerror}; make room on its disk: until then it takes part in no round"
        ) from error


def give_up(folder: Path) -> None:
    """Let others have it: whoever writes next. None held is fine."""
    with suppress(OSError):
        (folder / ROOM).unlink()
