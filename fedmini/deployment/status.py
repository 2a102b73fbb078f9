"""What a running server says of itself, in a file that other commands read."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmini import files
from fedmini.types import Manifest

STATUS, LINK = "status.json", "link.json"


class StatusFile:
    """DIR/state/status.json: the last thing that the coordinator said; and the run of Flower's that it began."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def write(self, status: Mapping[str, Any]) -> None:
        """Say how things stand. A disk that refuses costs the status, and nothing else."""
        self._put(STATUS, {"time": time.time(), **status})

    def write_standing(
        self, manifest: Manifest, round_num: int, line: Mapping[str, Any], phase: str, **others: Any
    ) -> None:
        """Say where a run stands after a round, whose line in the metrics this is; nobody was asked but for what `others` say."""
        standing: dict[str, Any] = {
            "run": manifest.run_id,
            "phase": phase,
            "round": round_num,
            "num_rounds": manifest.num_rounds,
            "attempt": None,
            "ready": [],
            "waiting_for": {},
            "epsilon": line.get("epsilon", {}),
            "eval_loss": line.get("eval_loss"),
            "late_replies": 0,
        }
        self.write(standing | others)

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

    def last(self) -> dict[str, Any] | None:
        """What was said last; None where nothing ever was."""
        try:
            return dict(json.loads((self._state / STATUS).read_bytes()))
        except (OSError, ValueError):
            return None

    def _put(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            files.replace_synced(self._state / name, json.dumps(record).encode(), 0o600)
        except OSError:
            return
