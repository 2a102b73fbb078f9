"""A simulation whose devices are Flower's ClientApps: everything else is as `fedmini simulate` has it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from fedmini import config as configuration
from fedmini import report, rounds, run_history, rundir, vectors
from fedmini.config import RunConfig
from fedmini.errors import CohortError, ConfigError, PrivacyBudgetError
from fedmini.flower_apps import grid_cohort, messages
from fedmini.flower_apps.messages import SimulatedTask
from fedmini.rundir import RunDirectory
from fedmini.simulation import Progress, SimulationOptions, SimulationResult
from fedmini.simulation.session import Session
from fedmini.simulation.setup import same_run, set_up
from fedmini.types import CohortSum, DeviceId, Manifest, TrainTask

SEES_EVERYTHING = "the contributions are added up directly: whoever runs a simulation sees everything in it"


def simulate(grid: Grid, config: RunConfig, output: Path, tell: Callable[[Progress], None]) -> SimulationResult:
    """Run a configuration, or go on with it where `output` holds it already, on a grid of simulated nodes.

    Raises a FedMiniError; whatever was committed before it is saved.
    """
    if config.simulation.secure:
        raise ConfigError(
            "simulation.secure = true: secure aggregation needs devices that remember a round from one message to the next, "
            "which Flower's simulated ones don't; use `fedmini simulate --secure`, or leave it out"
        )
    is_resumed = RunDirectory(output).manifest.exists()
    directory = rundir.open_existing(output) if is_resumed else rundir.create(output)
    chosen = same_run(config, rundir.stored_config(directory), directory) if is_resumed else config
    setup = set_up(chosen, None, directory, SimulationOptions(resume=is_resumed, on_progress=tell))
    nodes = grid_cohort.find_nodes(grid, tuple(setup.devices))
    if is_resumed:
        run_history.check_saved_together(directory)
    with run_history.opened_ledgers(directory, setup.run.manifest) as (ledger, evaluation_ledger):
        if not is_resumed:
            rundir.begin(directory, setup.config, setup.run.manifest, setup.environment)
        state, history = run_history.starting_point(
            setup.run.manifest, setup.model.initial_adapter, directory, ledger, evaluation_ledger
        )
        text = configuration.dump_run_config(setup.config)
        on_grid = Nodes(grid, nodes, setup.run.manifest, text, directory.manifest.read_bytes())
        session = Session(setup, directory, ledger, tell, history, evaluation_ledger, on_grid.sum)
        try:
            session.evaluate_if_due(state)
            state = rounds.train(state, setup.run, session.sum_cohort, ledger, session.on_round)
        except (PrivacyBudgetError, CohortError):  # the run is over: what was paid for is written down
            session.finish(session.last_state(state))
            raise
        result = session.finish(state)
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
