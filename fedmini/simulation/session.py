"""A run in progress: the seam to the devices of this process, and what is written as the rounds go by."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedmini import checkpoint, pace, run_history, rundir, statement
from fedmini.checkpoint import Checkpoint
from fedmini.privacy import encoding
from fedmini.privacy.ledger import Ledger
from fedmini.rundir import RunDirectory
from fedmini.secagg.server_session import Refusal
from fedmini.secure_sum import SecureSum
from fedmini.simulation.progress import Progress, SimulationResult
from fedmini.simulation.secure import SecureDevices
from fedmini.simulation.setup import Setup, base_name
from fedmini.types import (
    CohortSum,
    DeviceId,
    Residues,
    Roster,
    RoundReport,
    ServerState,
    TrainTask,
)


class Session:
    """A run in progress: owns its history, and writes what happens to its directory."""

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        ledger: Ledger,
        tell: Callable[[Progress], None],
        history: list[dict[str, Any]],
    ) -> None:
        self._setup, self._directory, self._ledger, self._tell = setup, directory, ledger, tell
        self._history = history
        self._state: ServerState | None = None
        self._pace = pace.Pace()
        self._shown = Progress("round")
        is_secure = setup.config.simulation.secure
        self._secure = SecureDevices(setup, directory.devices, self._note) if is_secure else None

    def last_state(self, otherwise: ServerState) -> ServerState:
        """The last committed state."""
        return self._state or otherwise

    def on_round(self, state: ServerState, report: RoundReport) -> None:
        """Commit a round: the state first, then what a reader may know of it."""
        if self._secure is not None:
            report = self._secure.with_traffic(report)
        self._history.append(run_history.metrics_line(report))
        self._commit(state)
        self._pace = replace(
            self._pace,
            train_seconds=self._pace.train_seconds + report.seconds,
            num_trained=self._pace.num_trained + pace.num_trained(self._setup.run.manifest, report.num_survivors),
        )
        self.evaluate_if_due(state)
        pace.remember(self._setup.cache_dir, self._setup.config, self._pace)

    def evaluate_if_due(self, state: ServerState) -> None:
        """Fill in the loss on people who took no part, before the first round, after every so many, and at the end."""
        if not self._history:
            self._history.append(run_history.metrics_line(run_history.report_of_round_zero(self._setup.run.manifest)))
            self._commit(state)
        line = self._history[-1]
        every, last = self._setup.config.evaluation.every, self._setup.run.manifest.num_rounds
        is_due = state.round_num % every == 0 or state.round_num == last
        if line["eval_loss"] is None and is_due:
            self._progress("evaluation", state.round_num)
            line["eval_loss"] = self._evaluate(state)
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

    def sum_cohort(self, chosen: Sequence[DeviceId], task: TrainTask, debit: Callable[[Roster], None]) -> CohortSum:
        """The one seam, in one process: by secure aggregation where the run asks for it, else added up directly.

        Either way the same devices drop out, after the debit, and the sum has the same bits.
        """
        lost = self._lost(chosen, task)
        num_left, num_done = len(chosen) - len(lost), itertools.count(1)

        def on_answer() -> None:
            self._progress("round", task.round_num - 1, next(num_done), num_left)

        if self._secure is not None:
            exchange = self._secure.exchange(lost, on_answer)
            by_protocol = SecureSum(self._setup.run.manifest, self._secure.trust, exchange, self._note_refusals)
            return by_protocol(chosen, task, debit)
        debit(Roster(self._setup.run.manifest.run_id, task.round_num, task.attempt, tuple(sorted(chosen))))
        return self._sum_directly([device for device in sorted(chosen) if device not in lost], task, on_answer)

    def _lost(self, chosen: Sequence[DeviceId], task: TrainTask) -> frozenset[DeviceId]:
        """Who drops out of this attempt after its debit: each with the configured probability."""
        setup = self._setup
        draws = setup.run.streams("dropout", "round", task.round_num, "attempt", task.attempt).uniform(len(chosen))
        rate = setup.config.rounds.dropout_rate
        return frozenset(device for device, draw in zip(sorted(chosen), draws, strict=True) if draw < rate)

    def _sum_directly(self, survivors: Sequence[DeviceId], task: TrainTask, on_answer: Callable[[], None]) -> CohortSum:
        """One contribution in memory at a time."""
        manifest = self._setup.run.manifest
        total: Residues = np.zeros(manifest.num_coordinates, np.uint32)
        for device in survivors:
            contribution = self._setup.devices[device].contribute(task)
            total = encoding.add(total, contribution.vector, manifest.release.modulus_bits)
            on_answer()
        return CohortSum(total, len(survivors))

    def finish(self, state: ServerState) -> SimulationResult:
        """Write the adapter, the privacy statement and the report."""
        setup, directory = self._setup, self._directory
        rundir.write_metrics(directory, self._history)
        is_secure = setup.config.simulation.secure
        privacy = statement.privacy_statement(setup.run.manifest, self._ledger, is_secure=is_secure)
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

    def _note_refusals(self, refusals: Sequence[Refusal]) -> None:
        for refusal in refusals:
            self._note(f"{refusal.device}: an answer at stage {refusal.stage.name} was refused: {refusal.reason}")

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
