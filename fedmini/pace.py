"""How fast this machine trains: measured while a run goes on, remembered in the cache folder, read by `fedmini plan`."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedmini import files, schedule
from fedmini.config import RunConfig
from fedmini.types import Manifest

FILE = "pace.json"  # in the cache folder: what was measured, by what it was measured on
CHOSEN = ("compute_dtype", "num_threads", "workers", "devices_per_batch")  # by a run, where its configuration does not


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds spent, and on how many examples. Of a training: the expected number, never what devices drew."""

    train_seconds: float = 0.0
    num_trained: float = 0.0
    evaluation_seconds: float = 0.0
    num_evaluated: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.num_trained > 0 and self.num_evaluated > 0


@dataclass(frozen=True, slots=True)
class KnownPace:
    """A pace that was measured here, and how the run went that it was measured in."""

    pace: Pace
    workers: int  # processes that trained
    devices_per_batch: int  # that computed together in each


def forecast_seconds(pace: Pace, manifest: Manifest, config: RunConfig) -> float:
    """How long the rounds and evaluations of a run take at a known pace; loading comes on top."""
    trained = manifest.num_rounds * num_trained(manifest, manifest.release.cohort_size)
    evaluated = schedule.num_measured(config.evaluation.every, manifest.num_rounds) * config.evaluation.max_examples
    if manifest.evaluation is not None:
        plan = manifest.evaluation
        evaluated += round(plan.num_evaluations * plan.release.cohort_size * plan.expected_examples)
    return pace.train_seconds / pace.num_trained * trained + pace.evaluation_seconds / pace.num_evaluated * evaluated


def num_trained(manifest: Manifest, num_devices: int) -> float:
    """Examples that a round of so many devices is expected to train on."""
    return num_devices * manifest.local.num_steps * manifest.local.expected_batch_size


def remember(cache_dir: Path, config: RunConfig, pace: Pace) -> None:
    """Keep a pace for the next plan, in place of the last one. A cache that can't be written is no reason to stop a run."""
    if not pace.is_known:
        return
    known, key = _read(cache_dir), _key(config)
    known.pop(key, None)  # the newest stands last
    known[key] = asdict(pace)
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        files.replace_synced(cache_dir / FILE, json.dumps(known, indent=1).encode())


def recall(cache_dir: Path, config: RunConfig) -> KnownPace | None:
    """The newest pace that was measured on this machine with these settings; None before a first run with them.

    What the configuration leaves open ("auto", and 0 in [simulation]) is taken as it was when that was measured: a run
    chooses again, so one that is much longer can have more workers.
    """
    wanted = _settings(config)
    for key, found in reversed(_read(cache_dir).items()):
        try:
            have = json.loads(key)
            known = KnownPace(
                Pace(**{field.name: float(found[field.name]) for field in fields(Pace)}),
                int(have["workers"]),
                int(have["devices_per_batch"]),
            )
        except (ValueError, TypeError, KeyError):
            continue
        if have == wanted | _choices(wanted, have) and known.pace.is_known:
            return known
    return None


def _choices(wanted: Mapping[str, Any], have: Mapping[str, Any]) -> dict[str, Any]:
    """What `wanted` leaves to a run, as it is in `have`."""
    return {name: have.get(name) for name in CHOSEN if wanted[name] in (0, "auto")}


def _key(config: RunConfig) -> str:
    return json.dumps(_settings(config), sort_keys=True)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Everything that decides how long one example takes, as it is in JSON."""
    local, lora, simulation = config.local, config.lora, config.simulation
    return {
        "base": str(config.base.name or config.base.path or config.base.hub_id),
        "compute_dtype": config.base.compute_dtype,
        "weights": [config.base.weights, config.base.accelerator],
        "cores": len(os.sched_getaffinity(0)),
        "num_threads": simulation.num_threads,
        "workers": simulation.workers,
        "devices_per_batch": simulation.devices_per_batch,
        "simulation": [simulation.secure, simulation.max_hidden_bytes],
        "lora": [lora.lora_rank, list(lora.target_modules), lora.layers and list(lora.layers), lora.trained],
        "data": [config.data.source, config.data.template, local.max_length],
        "local": [local.physical_batch_size, local.detach_prefix, local.checkpointing],
        "privacy": [config.privacy.example is not None, config.privacy.device is not None],
    }


def _read(cache_dir: Path) -> dict[str, Any]:
    try:
        known = json.loads((cache_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
