"""A run in progress: the seam to the devices of this process, and what is written as the rounds go by."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedmini import checkpoint, pace, rounds, run_history, rundir, schedule, statement
from fedmini.checkpoint import Checkpoint
from fedmini.device_evaluation import DeviceEvaluations
from fedmini.errors import CohortError, PrivacyBudgetError
from fedmini.privacy.ledger import Ledger
from fedmini.rundir import RunDirectory
from fedmini.simulation.cohort import SimulatedCohort, SumDevices
from fedmini.simulation.progress import Progress, SimulationResult
from fedmini.simulation.secure import SecureDevices
from fedmini.simulation.setup import Setup, base_name
from fedmini.types import RoundReport, ServerState, TrainTask


class Session:
    """A run in progress: owns its history, and writes what happens to its directory."""

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        ledger: Ledger,
        tell: Callable[[Progress], None],
        history: list[dict[str, Any]],
        evaluation_ledger: Ledger | None = None,
        sum_devices: SumDevices | None = None,
    ) -> None:
        self._setup, self._directory, self._ledger, self._tell = setup, directory, ledger, tell
        self._history = history
        self._state: ServerState | None = None
        self._pace = pace.Pace()
        self._shown = Progress("round")
        is_secure = setup.config.simulation.secure
        self._secure = SecureDevices(setup, directory.devices, self._note) if is_secure else None
        self.sum_cohort = SimulatedCohort(setup, self._secure, self._on_answer, self._note, sum_devices)
        self._evaluations = DeviceEvaluations.of(setup.run, evaluation_ledger)
        if (evaluating := setup.for_evaluation) is not None:
            secure = SecureDevices(evaluating, directory.devices, self._note) if is_secure else None
            self._evaluation_cohort = SimulatedCohort(evaluating, secure, self._on_evaluation, self._note)

    def train(self, state: ServerState) -> SimulationResult:
        """Every round that is left, and what came of the run. Raises as rounds.train does, after all was written."""
        try:
            self._evaluate_if_due(state)
            state = rounds.train(state, self._setup.run, self.sum_cohort, self._ledger, self.on_round)
        except (PrivacyBudgetError, CohortError):  # the run is over: what was paid for is written down
            self.finish(self._state or state)
            raise
        return self.finish(state)

    def on_round(self, state: ServerState, report: RoundReport) -> None:
        """Commit a round: the state first, then what a reader may know of it."""
        if self._secure is not None:
            report = self._secure.with_traffic(report)
        line = run_history.metrics_line(report)
        if self._evaluations is not None:
            self._evaluations.add_cost_to(line, self._ledger)
        self._history.append(line)
        self._commit(state)
        self._pace = replace(
            self._pace,
            train_seconds=self._pace.train_seconds + report.seconds,
            num_trained=self._pace.num_trained + pace.num_trained(self._setup.run.manifest, report.num_survivors),
        )
        self._evaluate_if_due(state)
        pace.remember(self._setup.cache_dir, self._setup.config, self._pace)

    def _evaluate_if_due(self, state: ServerState) -> None:
        """Fill in the loss on people who took no part, before the first round, after every so many, and at the end."""
        if not self._history:
            self._history.append(run_history.metrics_line(run_history.report_of_round_zero(self._setup.run.manifest)))
            self._commit(state)
        line = self._history[-1]
        every, last = self._setup.config.evaluation.every, self._setup.run.manifest.num_rounds
        if line["eval_loss"] is None and schedule.is_due(state.round_num, every, last):
            self._progress("evaluation", state.round_num)
            line["eval_loss"] = self._evaluate(state)
        self._evaluate_on_devices(state)
        rundir.write_metrics(self._directory, self._history)
        self._progress("round", state.round_num, num_devices=line["num_survivors"])

    def _evaluate(self, state: ServerState) -> float:
        started = time.monotonic()
        self._setup.model.set_adapter(state.adapter)
        nats, targets = self._setup.model.evaluate(self._setup.held_out, self._setup.config.local.physical_batch_size)
        self._pace = replace(
            self._pace,
            evaluation_seconds=self._pace.evaluation_seconds + time.monotonic() - started,
            num_evaluated=self._pace.num_evaluated + len(self._setup.held_out),
        )
        return nats / targets

    def _evaluate_on_devices(self, state: ServerState) -> None:
        """Let the devices measure the loss where that is due; where too few are left, or nothing is, go on without it."""
        evaluations, line = self._evaluations, self._history[-1]
        if evaluations is None or not evaluations.is_due(line):
            return
        try:
            found = evaluations.measure(state.adapter, state.round_num, self._evaluation_cohort)
        except (CohortError, PrivacyBudgetError) as error:
            self._note(f"no evaluation on devices after round {state.round_num}: {error}")
            return
        evaluations.add_to(line, found, self._ledger)
        self._commit(state)

    def finish(self, state: ServerState) -> SimulationResult:
        """Write the adapter, the privacy statement and the report."""
        setup, directory = self._setup, self._directory
        rundir.write_metrics(directory, self._history)
        privacy = statement.privacy_statement(
            setup.run.manifest,
            self._ledger,
            self._evaluations.ledger if self._evaluations is not None else None,
            is_secure=setup.config.simulation.secure,
        )
        rundir.write_json(directory.privacy, privacy)
        setup.model.set_adapter(state.adapter)
        setup.model.save_peft(directory.adapter, base_name(setup.config))
        self._progress("done", state.round_num)
        return SimulationResult(
            directory.path, setup.run.manifest, state.adapter, tuple(self._history), privacy, setup.evaluated_on
        )

    def _commit(self, state: ServerState) -> None:
        checkpoint.save(
            self._directory.checkpoints, Checkpoint(self._setup.run.manifest.hash, state, tuple(self._history))
        )
        self._state = state

    def _on_answer(self, task: TrainTask, num_done: int, num_expected: int) -> None:
        self._progress("round", task.round_num - 1, num_done, num_expected)

    def _on_evaluation(self, task: TrainTask, num_done: int, num_expected: int) -> None:
        self._progress("evaluation", self._history[-1]["round"], num_done, num_expected)

    def _note(self, text: str) -> None:
        self._tell(replace(self._shown, note=text))

    def _progress(self, stage: str, round_num: int, device_index: int = 0, num_devices: int = 0) -> None:
        measured = next((line for line in reversed(self._history) if line["eval_loss"] is not None), None)
        self._shown = Progress(
            stage=stage,
            round_num=round_num,
            num_rounds=self._setup.run.manifest.num_rounds,
            device_index=device_index,
            num_devices=num_devices,
            loss=measured["eval_loss"] if measured else None,
            loss_round=measured["round"] if measured else None,
            epsilon=self._history[-1]["epsilon"] if self._history else None,
        )
        self._tell(self._shown)
