"""A simulation whose devices train in the workers of a Ray cluster, under Flower's own simulation engine.

Nothing of flwr is imported before it is told not to report home: it reads that once.
"""

import importlib
import importlib.util
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedmini.config import RunConfig
from fedmini.errors import ConfigError, FedMiniError, StateError
from fedmini.simulation import SimulationOptions, SimulationResult

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

REACHABLE_S = 10.0
WORKERS: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1}  # one that was killed is started anew
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def simulate(
    config: RunConfig, output: Path, options: SimulationOptions, address: str | None = None
) -> SimulationResult:
    """Run a configuration, with one core for each worker: the bits of a simulation that trains device by device.

    `address`: of a Ray cluster that is there, as `ray.init` takes it; every machine of it has this fedmini and the same
    files at the same paths. None: a Ray of its own on this machine, with `simulation.workers` workers, and one for each
    core where that is 0.
    Raises a FedMiniError, before anything is written where Ray is missing or can't be reached; what was committed before
    one is saved.
    """
    _check_installed()
    os.environ.update(QUIET)
    from fedmini.flower_apps import simulated_run

    ray = importlib.import_module("ray")
    try:
        _start(ray, config.simulation.workers, address)
        return _run(simulated_run.prepare(_on_one_thread(config), output, options))
    finally:
        ray.shutdown()


def _check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--engine ray needs Ray, which is not installed: pip install 'fedmini[cluster]'")


def _start(ray: Any, workers: int, address: str | None) -> None:
    _check_reachable(address)
    paths = os.pathsep.join(path for path in sys.path if path)
    where = {"num_cpus": workers or len(os.sched_getaffinity(0))} if address is None else {"address": address}
    environment = {"PYTHONPATH": paths, **QUIET} if address is None else QUIET
    quietly = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(runtime_env={"env_vars": environment}, **quietly, **where)
    except Exception as error:  # Ray's own, of many kinds
        raise ConfigError(
            f"no Ray cluster could be had at {address or 'this machine'} ({type(error).__name__})"
        ) from error


def _check_reachable(address: str | None) -> None:
    """Raise ConfigError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, found, port = (address or "").rpartition("://")[2].rpartition(":")
    if not (found and port.isdecimal()):
        return  # "auto", say
    try:
        socket.create_connection((host, int(port)), REACHABLE_S).close()
    except OSError as error:
        raise ConfigError(f"--ray-address {address}: nobody listens there ({error.strerror or error})") from error


def _on_one_thread(config: RunConfig) -> RunConfig:
    section = config.simulation
    return config.model_copy(
        update={"simulation": section.model_copy(update={"num_threads": section.num_threads or 1})}
    )


def _run(prepared: Any) -> SimulationResult:
    """The run in a thread, as Flower has a ServerApp, while this one hands its messages to the workers."""
    import logging

    from flwr.app import Context
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedmini.flower_apps import client_app

    found: list[SimulationResult] = []
    has_ended = threading.Event()
    server = ServerApp()

    @server.main()
    def main(grid: "Grid", context: Context) -> None:
        found.append(prepared.run_on(cast("Grid", _OpenGrid(grid, has_ended))))

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what goes wrong comes as an error
    try:
        run_simulation(
            server_app=server,
            client_app=client_app.app,
            num_supernodes=len(prepared.setup.devices),
            backend_config={"client_resources": WORKERS},
        )
    except FedMiniError:
        raise
    except Exception as error:  # Flower's or Ray's
        cause = error.__cause__ or error
        raise StateError(f"Flower's engine ended in mid-run ({type(cause).__name__}): go on with --resume") from error
    finally:
        has_ended.set()
    if not found:
        raise StateError("Flower's engine ended in mid-run: go on with --resume")
    return found[0]


class _OpenGrid:
    """A grid until its simulation ends: then whoever still waits for an answer is told, instead of waiting for ever."""

    def __init__(self, grid: "Grid", has_ended: threading.Event) -> None:
        self._grid, self._has_ended = grid, has_ended

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable["Message"]) -> Iterable[str]:
        self._check()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable["Message"]:
        self._check()
        return self._grid.pull_messages(message_ids)

    def _check(self) -> None:
        if self._has_ended.is_set():
            raise StateError("Flower's engine ended in mid-run")
