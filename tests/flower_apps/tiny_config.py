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
    config = tiny_run.config(folder, privacy, {"data": {"source": str(people)}, **(changes or {})})
    path = folder / "run.toml"
    path.write_text(configuration.dump_run_config(config))
    return path


def adapter(output: Path) -> bytes:
    """What a run has trained."""
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()
