"""A round's sum on disk, from when it is there until its round is committed: nothing of it is computed twice.

RUN/aggregate/round-0007.safetensors       the integers, and in the header whose they are; whole or not there
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmini import files
from fedmini.errors import StateError
from fedmini.types import Aggregate, Roster


class AggregateFolder:
    """Where a server keeps the sum of the round that goes on. What it keeps is already noised as it will be released."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, aggregate: Aggregate) -> None:
        """Keep a sum: on the disk when this returns. Raises StateError where the disk refuses; then nothing is kept."""
        integers = np.ascontiguousarray(aggregate.integers, np.int64)
        about = {"roster": asdict(aggregate.roster), "num_devices": aggregate.num_devices}
        digest = hashlib.sha256(integers.tobytes() + _canonical(about)).hexdigest()
        content = save({"integers": integers}, {"about": _canonical(about).decode(), "sha256": digest})
        path = self._path(aggregate.roster.round_num)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files.replace_synced(path, content, 0o600)
        except OSError as error:
            raise StateError(
                f"can't keep the sum of a round in {path}: {error.strerror}; make room, then start again: "
                "the round is paid for once more"
            ) from error

    def load(self, run_id: str, round_num: int) -> Aggregate | None:
        """The sum that was kept for a round of a run; None where none was. Raises StateError where it was damaged."""
        path = self._path(round_num)
        if not path.exists():
            return None
        try:
            with safe_open(path, "np") as file:
                integers = file.get_tensor("integers")
                header = file.metadata()
            about = json.loads(header["about"])
            if hashlib.sha256(integers.tobytes() + _canonical(about)).hexdigest() != header["sha256"]:
                raise ValueError("the digest is another")
            roster = Roster(**{**about["roster"], "devices": tuple(about["roster"]["devices"])})
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StateError(
                f"{path} is damaged ({type(error).__name__}): bring it back from a backup, or remove it: the round is paid for "
                "once more then"
            ) from error
        if (roster.run_id, roster.round_num) != (run_id, round_num):
            raise StateError(f"{path} holds the sum of another run, {roster.run_id!r}: bring the run's own back")
        return Aggregate(roster, about["num_devices"], integers)

    def forget(self, up_to_round: int) -> None:
        """Remove the sums of rounds that are committed. What can't be removed stays, and does no harm."""
        for path in self._folder.glob("round-*.safetensors"):
            number = path.stem.removeprefix("round-")
            if number.isdecimal() and int(number) <= up_to_round:
                path.unlink(missing_ok=True)

    def _path(self, round_num: int) -> Path:
        return self._folder / f"round-{round_num:04d}.safetensors"


def _canonical(about: object) -> bytes:
    return json.dumps(about, sort_keys=True).encode()
