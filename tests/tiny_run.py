"""A whole run small enough for a test: the tiny Llama as a packed GGUF, people who write letters, every privacy mode."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmini.config import RunConfig, parse_run_config
from fedmini.simulation import Progress
from tests import tiny_llama

EXAMPLE = {"clip_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-3}
DEVICE = {"clip_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-3}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"none": True},
    "example-local": {"example": EXAMPLE | {"noise": "local"}},
    "example-shared": {"example": EXAMPLE | {"noise": "shared"}},
    "device-shared": {"device": DEVICE | {"noise": "shared"}},
    "device-server": {"device": DEVICE | {"noise": "server"}},
    "both": {"example": EXAMPLE | {"noise": "local"}, "device": DEVICE | {"noise": "shared"}},
}


def rows(num_people: int = 8, num_examples: int = 12) -> list[dict[str, str]]:
    """Made-up people with made-up words, the same at every call."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=3)) for _ in range(draw.randint(1, 3)))

    return [
        {"client": f"person-{person}", "prompt": words(), "response": words()}
        for person in range(num_people)
        for _ in range(num_examples)
    ]


def config(folder: Path, privacy: str = "example-shared", changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Five devices, three rounds, seeded, float32 on one thread; `changes` are merged section by section."""
    gguf = folder / "tiny.gguf"
    if not gguf.exists():
        tiny_llama.write_gguf(gguf)
    values: dict[str, Any] = {
        "run": {"name": "tiny", "seed": 7},
        "base": {"path": str(gguf), "compute_dtype": "float32"},
        "lora": {"lora_rank": 2, "lora_alpha": 4.0, "target_modules": ["v_proj", "o_proj"]},
        "data": {"source": "in memory", "min_examples": 4, "max_examples_per_device": 12, "held_out_devices": 2},
        "local": {"sampling_rate": 0.5, "learning_rate": 0.5, "max_length": 64},
        "rounds": {"num_rounds": 3, "cohort_size": 5, "min_survivors": 4},
        "privacy": PRIVACY[privacy],
        "simulation": {"num_threads": 1},
    }
    for section, change in (changes or {}).items():
        values[section] = change if section == "privacy" else values.get(section, {}) | change
    return parse_run_config(values)


class KilledError(Exception):
    """What `interrupt_after` ends a run with."""


def interrupt_after(num_devices: int) -> Callable[[Progress], None]:
    """Stop a run from inside, as a crash of one device's training would, after so many contributions."""
    seen = 0

    def on_progress(progress: Progress) -> None:
        nonlocal seen
        seen += progress.device_index > 0
        if seen == num_devices:
            raise KilledError

    return on_progress
