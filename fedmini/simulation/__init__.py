"""Many devices in this process: the edge that turns a configuration into a finished run directory."""

from pathlib import Path

from fedmini import run_history, rundir
from fedmini.config import RunConfig, load_run_config
from fedmini.errors import ConfigError
from fedmini.simulation import workers
from fedmini.simulation.progress import Progress, SimulationResult
from fedmini.simulation.session import Session
from fedmini.simulation.setup import Rows, SimulationOptions, same_run, set_up

__all__ = ["Progress", "Rows", "SimulationOptions", "SimulationResult", "simulate"]


def simulate(
    config: RunConfig | Path | str | None,
    data: Rows | None = None,
    output: Path | str = "runs/latest",
    options: SimulationOptions | None = None,
) -> SimulationResult:
    """Run a configuration on this machine, every device in this process, and give what came out.

    `data` stands in for the configured source: rows as in a JSONL file, or rows by device. The run directory is
    written as the run goes on; with `options.resume` an interrupted one goes on where it stopped, by its own stored
    configuration where `config` is None.
    Raises a FedMiniError whose message says what to do; whatever was committed before it is saved.
    """
    options = options or SimulationOptions()
    if options.resume:
        directory = rundir.open_existing(Path(output))
        stored = rundir.stored_config(directory)
        chosen = stored if config is None else same_run(_read(config), stored, directory)
    elif config is None:
        raise ConfigError("no configuration was given: name one, or resume a run that has its own")
    else:
        chosen = _read(config)
        directory = rundir.create(Path(output))
    setup = set_up(chosen, data, directory, options)
    if options.resume:
        run_history.check_saved_together(directory)
    with run_history.opened_ledgers(directory, setup.run.manifest) as (ledger, evaluation_ledger):
        if not options.resume:  # under the ledger's lock: of two runs begun in one folder, one writes there
            rundir.begin(directory, setup.config, setup.run.manifest, setup.environment)
        state, history = run_history.starting_point(
            setup.run.manifest, setup.model.initial_adapter, directory, ledger, evaluation_ledger
        )
        with workers.started(setup) as processes:
            sum_devices = None if processes is None else processes.sum_devices
            session = Session(setup, directory, ledger, options.on_progress, history, evaluation_ledger, sum_devices)
            return session.train(state)


def _read(config: RunConfig | Path | str) -> RunConfig:
    return config if isinstance(config, RunConfig) else load_run_config(Path(config))
