"""The ServerApp: runs a simulation, or serves a run to the devices of a deployment, as its run config says."""

import sys
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmini import events
from fedmini.errors import ConfigError
from fedmini.events import Emit
from fedmini.simulation import Progress

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """What `flwr run` begins. Raises a FedMiniError, which Flower writes into the run's log."""
    emit = events.to_stream(sys.stdout, "text", "fedmini")
    settings = {name: str(value) for name, value in context.run_config.items() if value != ""}
    if {"config", "output"} == set(settings):
        _simulate(grid, settings, emit)
    elif {"server-folder", "run"} == set(settings):
        _serve(grid, settings, emit)
    else:
        raise ConfigError(
            f"the run config has {', '.join(sorted(settings)) or 'nothing'}: give config and output for a simulation, or "
            'server-folder and run for a deployment, as in --run-config \'config="/home/me/run.toml" output="/home/me/runs/a"\''
        )


def _simulate(grid: Grid, settings: Mapping[str, str], emit: Emit) -> None:
    from fedmini import config as configuration
    from fedmini import display
    from fedmini.flower_apps import simulated_run

    path, output = _path(settings, "config"), _path(settings, "output")
    config = configuration.load_run_config(path)
    for warning in (*display.warnings(config), simulated_run.SEES_EVERYTHING):
        emit("run.warning", text=warning)
    result = simulated_run.simulate(grid, config, output, _Rounds(emit))
    emit("run.finished", output=str(result.path), loss_before=result.loss_before, loss_after=result.loss_after)


def _serve(grid: Grid, settings: Mapping[str, str], emit: Emit) -> None:
    from fedmini.flower_apps import attached_run

    attached_run.serve(grid, _path(settings, "server-folder"), settings["run"], emit)


def _path(settings: Mapping[str, str], name: str) -> Path:
    """A path of the run config. It is read where the SuperLink was started, which is nowhere in particular."""
    path = Path(settings[name])
    if not path.is_absolute():
        raise ConfigError(f"{name}: expected an absolute path, got {str(path)!r}: SuperLink runs in another folder")
    return path


class _Rounds:
    """Says how a simulation goes on: a line for each stage and each round."""

    def __init__(self, emit: Emit) -> None:
        self._emit, self._said = emit, ""

    def __call__(self, progress: Progress) -> None:
        if progress.device_index:
            return
        said = f"{progress.stage} {progress.round_num} {progress.note}"
        if said != self._said:
            self._said = said
            self._emit(f"run.{progress.stage}", **_told(progress))


def _told(progress: Progress) -> dict[str, int | float | str]:
    found = {"loss": progress.loss} | {f"epsilon_{unit}": value for unit, value in (progress.epsilon or {}).items()}
    numbers = {name: value for name, value in found.items() if value is not None}
    return {"round": progress.round_num, **numbers, **({"note": progress.note} if progress.note else {})}
