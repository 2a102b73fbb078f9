"""The devices of a simulation in one of Flower's worker processes: loaded once, and kept for every later message."""

import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from fedmini import config as configuration
from fedmini import vectors
from fedmini.contributor import Contributor
from fedmini.errors import ConfigError
from fedmini.flower_apps.messages import SimulatedTask
from fedmini.rundir import RunDirectory
from fedmini.simulation import SimulationOptions
from fedmini.simulation.setup import set_up
from fedmini.types import Contribution, DeviceId, Manifest, TrainTask


def contribute(task: SimulatedTask, partition: int) -> Contribution:
    """What the device of this partition gives: devices are numbered in the order of their names.

    Raises StateError where this worker's data, base or versions are not those of the run.
    """
    manifest, devices = _loaded(task.config, task.record)
    if partition >= len(devices):
        raise ConfigError(f"partition {partition} is nobody: the run has {len(devices)} devices")
    adapter = vectors.from_bytes(task.adapter, manifest.template)
    return devices[sorted(devices)[partition]].contribute(
        TrainTask(manifest.hash, task.round_num, task.attempt, adapter)
    )


@lru_cache(maxsize=1)
def _loaded(config: str, record: bytes) -> tuple[Manifest, Mapping[DeviceId, Contributor]]:
    """Base, data and devices, as a run that is resumed loads them: the same checks, against the same manifest."""
    with tempfile.TemporaryDirectory(prefix="fedmini-") as folder:
        directory = RunDirectory(Path(folder))
        directory.config.write_text(config, encoding="utf-8")
        directory.manifest.write_bytes(record)
        setup = set_up(configuration.load_run_config(directory.config), None, directory, SimulationOptions(resume=True))
    return setup.run.manifest, setup.devices
