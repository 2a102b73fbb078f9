"""What a simulation chooses where its configuration leaves the choice: the result is stored with the run."""

import math
import os
from collections.abc import Mapping
from typing import Any

from fedmini.config import RunConfig, SimulationSection
from fedmini.types import Manifest

# Measured by simulations/benchmarks/batch_measures.py: 3e-11 to 6e-11 s for each token and byte of the base.
LONG_RUN = 4e12  # tokens of all rounds times bytes of the base: minutes of work; below, no worker is worth its start
SMALLEST_BASE = 2**20  # bytes: the tokens of a smaller one take as long
MOST_DEVICES = 32  # of a batch: from 16 to 32 a device takes up to 4 % less of its time alone, with 64 no less
BATCH_BYTES = 2**28  # what the devices of a batch may hold together beside the activations


def resolve(config: RunConfig, compute_dtype: str, chosen: Mapping[str, int]) -> RunConfig:
    """The configuration with `chosen` in place of what is left to choose in [simulation]."""
    changes: dict[str, Any] = {}
    if config.base.compute_dtype == "auto":
        changes["base"] = config.base.model_copy(update={"compute_dtype": compute_dtype})
    automatic = {name: value for name, value in chosen.items() if getattr(config.simulation, name) == 0}
    changes["simulation"] = config.simulation.model_copy(update=automatic)
    return config.model_copy(update=changes)


def stored_choices(section: SimulationSection) -> dict[str, int]:
    """What a run chose that has begun."""
    return {name: getattr(section, name) for name in ("num_threads", "workers", "devices_per_batch")}


def num_workers(config: RunConfig, manifest: Manifest, base_bytes: int) -> int:
    """How many processes train: one for each core this process may use, where the run is long enough to be worth it."""
    if config.simulation.secure:
        return 1
    if config.simulation.workers:
        return config.simulation.workers
    local, release = manifest.local, manifest.release
    examples = manifest.num_rounds * release.cohort_size * local.num_steps * local.expected_batch_size
    if examples * local.max_length * max(base_bytes, SMALLEST_BASE) < LONG_RUN:
        return 1
    return min(len(os.sched_getaffinity(0)), math.ceil(release.cohort_size / devices_per_batch(config, manifest)))


def devices_per_batch(config: RunConfig, manifest: Manifest) -> int:
    """As many devices as fit BATCH_BYTES with their gradients, and with their adapters where these move."""
    if config.simulation.devices_per_batch:
        return config.simulation.devices_per_batch
    if config.simulation.secure:
        return 1
    local, release = manifest.local, manifest.release
    expected = local.expected_batch_size + 3 * math.sqrt(local.expected_batch_size)
    num_rows = 1.0 if release.example is None else min(expected, config.local.physical_batch_size)
    num_rows += 0 if release.sums_examples else 6  # its tensors, their first values, a step's gradient, Adam's moments
    fitting = int(BATCH_BYTES / (4 * manifest.num_trained * (num_rows + 2)))
    return max(1, min(fitting, MOST_DEVICES, release.cohort_size))
