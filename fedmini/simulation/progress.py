"""What a simulation says while it runs, and what it gives in the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmini.types import Adapter, Manifest


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a simulation is, for whoever shows it."""

    stage: str  # "base", "data", "evaluation", "round", "done", or a note to show once
    note: str = ""
    round_num: int = 0
    num_rounds: int = 0
    device_index: int = 0  # devices of this round that have answered
    num_devices: int = 0
    loss: float | None = None  # the last evaluation
    loss_round: int | None = None  # the round that it was measured after; 0 is before any training
    epsilon: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """A finished run: where it lies, and what happened."""

    path: Path
    manifest: Manifest
    adapter: Adapter
    history: tuple[Mapping[str, Any], ...]  # the lines of metrics.jsonl
    privacy: Mapping[str, Any]  # privacy.json
    evaluated_on: str  # in words: whose text the loss was measured on

    @property
    def loss_before(self) -> float:
        """Nats a token on people who took no part, before any training."""
        return float(self.history[0]["eval_loss"])

    @property
    def loss_after(self) -> float:
        """The same, with the trained adapter."""
        return float(next(line["eval_loss"] for line in reversed(self.history) if line["eval_loss"] is not None))
