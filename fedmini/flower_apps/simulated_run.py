"""A simulation whose devices are Flower's ClientApps: everything else is as `fedmini simulate` has it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from fedmini import config as configuration
from fedmini import report, run_history, rundir, vectors
from fedmini.config import RunConfig
from fedmini.errors import ConfigError
from fedmini.flower_apps import grid_cohort, messages
from fedmini.flower_apps.messages import SimulatedTask
from fedmini.rundir import RunDirectory
from fedmini.simulation import Progress, SimulationOptions, SimulationResult
from fedmini.simulation.session import Session
from fedmini.simulation.setup import Setup, same_run, set_up
from fedmini.types import CohortSum, DeviceId, Manifest, TrainTask

SEES_EVERYTHING = "the contributions are added up directly: whoever runs a simulation sees everything in it"


def simulate(grid: Grid, config: RunConfig, output: Path, tell: Callable[[Progress], None]) -> SimulationResult:
    """Run a configuration, or go on with it where `output` holds it already, on a grid of simulated nodes.

    Raises a FedMiniError; whatever was committed before it is saved.
    """
    is_resumed = RunDirectory(output).manifest.exists()
    return prepare(config, output, SimulationOptions(resume=is_resumed, on_progress=tell)).run_on(grid)


def prepare(config: RunConfig, output: Path, options: SimulationOptions) -> "PreparedRun":
    """Everything of a run but its grid. Raises ConfigError for what Flower's simulated devices can't do."""
    config = _one_by_one(config)
    directory = rundir.open_existing(output) if options.resume else rundir.create(output)
    chosen = same_run(config, rundir.stored_config(directory), directory) if options.resume else config
    return PreparedRun(set_up(chosen, None, directory, options), directory, options)


def _one_by_one(config: RunConfig) -> RunConfig:
    section = config.simulation
    if section.secure:
        raise ConfigError(
            "simulation.secure = true: secure aggregation needs devices that remember a round from one message to the next, "
            "which Flower's simulated ones don't; use `fedmini simulate --secure`, or leave it out"
        )
    if section.devices_per_batch > 1:
        raise ConfigError(
            f"simulation.devices_per_batch = {section.devices_per_batch}: Flower hands out devices one by one; "
            "say 1, or leave it out"
        )
    return config.model_copy(update={"simulation": section.model_copy(update={"devices_per_batch": 1})})


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run whose base, data and manifest are there, and whose nodes are not yet."""

    setup: Setup
    directory: RunDirectory
    options: SimulationOptions

    def run_on(self, grid: Grid) -> SimulationResult:
        """The run to its end, from wherever it stands. Raises a FedMiniError; what was committed is saved."""
        setup, directory, tell = self.setup, self.directory, self.options.on_progress
        nodes = grid_cohort.find_nodes(grid, tuple(setup.devices))
        if self.options.resume:
            run_history.check_saved_together(directory)
        with run_history.opened_ledgers(directory, setup.run.manifest) as (ledger, evaluation_ledger):
            if not self.options.resume:
                rundir.begin(directory, setup.config, setup.run.manifest, setup.environment)
            state, history = run_history.starting_point(
                setup.run.manifest, setup.model.initial_adapter, directory, ledger, evaluation_ledger
            )
            text = configuration.dump_run_config(setup.config)
            on_grid = Nodes(grid, nodes, setup.run.manifest, text, directory.manifest.read_bytes())
            session = Session(setup, directory, ledger, tell, history, evaluation_ledger, on_grid.sum)
            result = session.train(state)
        report.write_report(directory.path)
        return result


@dataclass(frozen=True, slots=True)
class Nodes:
    """The devices of a run as nodes of a grid."""

    grid: Grid
    of: Mapping[DeviceId, int]
    manifest: Manifest
    config: str
    record: bytes

    def sum(self, survivors: Sequence[DeviceId], task: TrainTask, on_answer: Callable[[], None]) -> CohortSum:
        """The sum of what these devices give to a round."""
        adapter = vectors.to_bytes(task.adapter, self.manifest.template)
        asked = SimulatedTask(self.config, self.record, task.round_num, task.attempt, adapter)
        nodes = [self.of[device] for device in survivors]
        return grid_cohort.sum_contributions(self.grid, nodes, messages.pack_task(asked), self.manifest, on_answer)
