"""What a running server says of itself, in a file that other commands read."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmini import files
from fedmini.errors import StateError

STATUS, LINK = "status.json", "link.json"


class StatusFile:
    """DIR/state/status.json: the last thing that the coordinator said; and the run of Flower's that it began."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def write(self, status: Mapping[str, Any]) -> None:
        """Say how things stand. A disk that refuses costs the status, and nothing else."""
        self._put(STATUS, {"time": time.time(), **status})

    def remember_link(self, run: int) -> None:
        """Remember the run of Flower's that was begun, so that a later process can end it."""
        self._put(LINK, {"run": run})

    def previous_link(self) -> int | None:
        """The run of Flower's that an earlier process began; None where there was none."""
        try:
            run = json.loads((self._state / LINK).read_bytes())["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return run if isinstance(run, int) else None

    def read(self) -> dict[str, Any]:
        """What was said last. Raises StateError where nothing ever was."""
        try:
            found = json.loads((self._state / STATUS).read_bytes())
        except (OSError, ValueError) as error:
            raise StateError(f"no server has ever run in {self._state.parent}") from error
        return dict(found)

    def _put(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            files.replace_synced(self._state / name, json.dumps(record).encode(), 0o600)
        except OSError:
            return
