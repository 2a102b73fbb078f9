"""A run small enough for a test, as a file, with its people in another."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmini import config as configuration
from tests import tiny_run


def write(folder: Path, privacy: str = "example-shared", changes: Mapping[str, Any] | None = None) -> Path:
    """The file of a seeded run of six devices, five in a round."""
    people = folder / "people.jsonl"
    people.write_text("".join(json.dumps(row) + "\n" for row in tiny_run.rows()))
    # One device after the other, as Flower hands them out: a simulation has the same bits then.
    ours = {"data": {"source": str(people)}, "simulation": {"devices_per_batch": 1}}
    config = tiny_run.config(folder, privacy, {**ours, **(changes or {})})
    path = folder / "run.toml"
    path.write_text(configuration.dump_run_config(config))
    return path


def adapter(output: Path) -> bytes:
    """What a run has trained."""
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()
