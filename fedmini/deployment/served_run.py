"""A run on the server, from its first round to its last: waits for devices, commits rounds, survives what dies."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmini import checkpoint, planning, report, rounds, run_history, rundir, schedule, statement, vectors
from fedmini.aggregates import AggregateFolder
from fedmini.checkpoint import Checkpoint
from fedmini.config import TimingSection
from fedmini.deployment.evaluating import EvaluatingOnDevices
from fedmini.deployment.exchange import FlowerExchange
from fedmini.deployment.roll_call import RollCall
from fedmini.deployment.run_files import RunFiles
from fedmini.deployment.server_model import ServerModel
from fedmini.deployment.status import StatusFile
from fedmini.device_evaluation import DeviceEvaluations
from fedmini.errors import AttemptsError, CohortError, LinkError
from fedmini.events import Emit
from fedmini.flower.codec import EVALUATION, Envelope
from fedmini.flower.server_link import ServerLink
from fedmini.privacy import accounting
from fedmini.privacy.ledger import Ledger
from fedmini.privacy.noise import Streams
from fedmini.secagg.server_session import Refusal
from fedmini.secure_sum import SecureSum
from fedmini.server_step import num_asked
from fedmini.types import Aggregate, CohortSum, DeviceId, Roster, RoundReport, ServerState, TrainTask

GOODBYE_SECONDS = 15.0
LINK_WAIT_SECONDS = 1.0
FIRST_REST_SECONDS = 1.0  # after a round that too few devices came to; longer each time, up to timing.wait_s


@dataclass(frozen=True, slots=True)
class ServedRunParts:
    """What a run is served with."""

    files: RunFiles
    link: ServerLink
    roll: RollCall
    timing: TimingSection
    streams: Streams
    is_seeded: bool  # in tests only
    status: StatusFile
    emit: Emit


class ServedRun:
    """One run in progress. Whatever it has committed is on the disk; what it was doing is begun again."""

    def __init__(
        self,
        parts: ServedRunParts,
        ledger: Ledger,
        state: ServerState,
        history: list[dict[str, Any]],
        evaluation_ledger: Ledger | None = None,
    ) -> None:
        self._parts, self._ledger, self._state, self._history = parts, ledger, state, history
        files = parts.files
        self._rest_s = FIRST_REST_SECONDS
        self._model = ServerModel(files.config, files.manifest, parts.emit)
        self._aggregates = _Announced(AggregateFolder(files.aggregates), parts.emit)
        about = {"manifest": files.manifest.hash}
        self._exchange = FlowerExchange(parts.link, parts.roll, about, parts.timing, parts.emit)
        self._run = rounds.Run(
            manifest=files.manifest,
            server=planning.server_plan(files.config),
            population=parts.roll.willing,
            streams=parts.streams,
            is_seeded=parts.is_seeded,
            is_replayed=False,
        )
        self._on_devices: EvaluatingOnDevices | None = None
        if (evaluations := DeviceEvaluations.of(self._run, evaluation_ledger)) is not None:
            exchange = FlowerExchange(parts.link, parts.roll, about | {"release": EVALUATION}, parts.timing, parts.emit)
            self._on_devices = EvaluatingOnDevices(evaluations, parts.roll, exchange, self._note_refusals, parts.emit)

    def run(self) -> None:
        """Every round that is left. Raises PrivacyBudgetError or AttemptsError where the run is over before its end."""
        manifest, emit = self._parts.files.manifest, self._parts.emit
        self._evaluate_if_due()
        try:
            while self._state.round_num < manifest.num_rounds:
                self._one_round()
            self._evaluate_on_devices()
        except AttemptsError:
            self._finish()
            raise
        self._finish()
        emit("run.finished", rounds=self._state.round_num)

    def _one_round(self) -> None:
        round_num = self._state.round_num + 1
        kept = self._aggregates.load(self._run.manifest.run_id, round_num)
        if kept is None:
            self._wait_for_devices(round_num)
            self._evaluate_on_devices()
        self._parts.emit("round.planned", round=round_num, ready=len(self._parts.roll.ready()))
        try:
            state, found = rounds.run_round(self._state, self._run, self._sum_cohort, self._ledger, self._aggregates)
        except AttemptsError:
            raise
        except CohortError as error:  # nothing was spent, or it is written down: the next try is a new attempt
            self._parts.emit("round.waits", round=round_num, reason=str(error))
            self._rest()
            return
        self._rest_s = FIRST_REST_SECONDS
        self._commit(state, self._with_traffic(found))

    def _rest(self) -> None:
        """A while, longer each time: it may be that nothing changes by itself. Somebody who comes ends it."""
        parts, before = self._parts, set(self._parts.roll.ready())
        until = time.monotonic() + min(self._rest_s, parts.timing.wait_s)
        self._rest_s *= 2
        while (left := until - time.monotonic()) > 0 and before.issuperset(parts.roll.ready()):
            try:
                parts.roll.look(min(parts.timing.poll_s, left))
            except LinkError as error:
                self._relink(error)

    def _wait_for_devices(self, round_num: int) -> None:
        """Until a whole cohort is ready, or `wait_s` have passed and enough for a round are. Says for whom it waits."""
        parts, release = self._parts, self._run.manifest.release
        wanted = num_asked(release.cohort_size, self._run.server.over_selection)
        began, said = time.monotonic(), ""
        while True:
            try:
                parts.roll.look(parts.timing.poll_s if len(parts.roll.ready()) < wanted else 0.0)
            except LinkError as error:
                self._relink(error)
                continue
            num_ready = len(parts.roll.ready())
            patient = time.monotonic() - began < parts.timing.wait_s
            if num_ready >= wanted or (num_ready >= release.min_survivors and not patient):
                return
            missing = parts.roll.waiting_for()
            self._write_status("waiting", missing)
            if (now := f"{num_ready} {sorted(missing.items())}") != said:
                said = now
                parts.emit(
                    "round.waiting",
                    round=round_num,
                    ready=num_ready,
                    needed=release.min_survivors,
                    wanted=wanted,
                    missing=", ".join(f"{name} ({why})" for name, why in list(missing.items())[:8]),
                )

    def _relink(self, error: LinkError) -> None:
        """The SuperLink went away, or has forgotten this run: wait for it, and begin another run of Flower's."""
        self._parts.emit("link.lost", reason=str(error))
        time.sleep(LINK_WAIT_SECONDS)
        try:
            self._parts.link.begin(self._parts.link.run or None)
            self._parts.status.remember_link(self._parts.link.run)
            self._parts.roll.begin_anew()
        except LinkError:
            pass

    def _sum_cohort(self, chosen: Sequence[DeviceId], task: TrainTask, debit: Any) -> CohortSum:
        self._write_status("round", {}, task)
        by_protocol = SecureSum(self._run.manifest, self._parts.roll.trust, self._exchange, self._note_refusals)

        def announced(roster: Roster) -> None:
            self._parts.emit("round.keyed", round=task.round_num, attempt=task.attempt, devices=len(roster.devices))
            debit(roster)
            self._parts.emit("round.debited", round=task.round_num, attempt=task.attempt)

        return by_protocol(chosen, task, announced)

    def _note_refusals(self, refusals: Sequence[Refusal]) -> None:
        for one in refusals:
            self._parts.roll.not_ready(one.device, one.reason)
            self._parts.emit("answer.refused", device=one.device, stage=one.stage.name, reason=one.reason)

    def _with_traffic(self, found: RoundReport) -> RoundReport:
        sent, received = self._exchange.received, self._exchange.sent
        if not sent:
            return found
        return replace(
            found,
            upload_bytes_per_device=max(sent.values()),
            download_bytes_per_device=max(received.values()),
        )

    def _commit(self, state: ServerState, found: RoundReport) -> None:
        """The state first, then what a reader may know of it."""
        files = self._parts.files
        line = run_history.metrics_line(found)
        if self._on_devices is not None:
            self._on_devices.evaluations.add_cost_to(line, self._ledger)
        self._history.append(line)
        self._state = state
        self._save()
        AggregateFolder(files.aggregates).forget(state.round_num)
        self._parts.emit(
            "round.committed",
            round=state.round_num,
            survivors=found.num_survivors,
            sampled=found.num_sampled,
            seconds=round(found.seconds, 3),
            late=self._exchange.num_late,
            **{f"epsilon_{unit}": float(accounting.rounded_up(spent)) for unit, spent in line["epsilon"].items()},
        )
        self._evaluate_if_due()

    def _save(self) -> None:
        files = self._parts.files
        checkpoint.save(files.directory.checkpoints, Checkpoint(files.manifest.hash, self._state, tuple(self._history)))

    def _evaluate_if_due(self) -> None:
        """Fill in the loss on the public file: before the first round, after every so many, and at the end."""
        files = self._parts.files
        if not self._history:
            self._history.append(run_history.metrics_line(run_history.report_of_round_zero(files.manifest)))
            self._save()
        line = self._history[-1]
        is_due = schedule.is_due(self._state.round_num, files.config.evaluation.every, files.manifest.num_rounds)
        if self._model.evaluates and is_due and line["eval_loss"] is None:
            line["eval_loss"] = self._model.loss(self._state.adapter)
            self._parts.emit("round.evaluated", round=self._state.round_num, loss=line["eval_loss"])
        rundir.write_metrics(files.directory, self._history)
        self._write_status("committed", {})

    def _evaluate_on_devices(self) -> None:
        """Let the devices that are ready measure the loss, where that is due; where they can't, the run goes on without it."""
        line, own = self._history[-1], self._on_devices
        if own is None or not own.evaluations.is_due(line):
            return
        found = own.measure(self._state.adapter, self._state.round_num)
        if found is not None:
            own.evaluations.add_to(line, found, self._ledger)
            self._save()
            rundir.write_metrics(self._parts.files.directory, self._history)

    def _finish(self) -> None:
        """The adapter, the statement and the report; and the adapter to every device that is there."""
        files = self._parts.files
        rundir.write_metrics(files.directory, self._history)
        evaluation_ledger = self._on_devices.evaluations.ledger if self._on_devices is not None else None
        privacy = statement.privacy_statement(
            files.manifest, self._ledger, evaluation_ledger, is_secure=True, is_simulated=False
        )
        rundir.write_json(files.directory.privacy, privacy)
        self._model.write(files.directory.adapter, self._state.adapter)
        report.write_report(files.directory.path)
        self._say_goodbye()
        self._write_status("finished", {})

    def _say_goodbye(self) -> None:
        parts, manifest = self._parts, self._parts.files.manifest
        content = vectors.to_bytes(self._state.adapter, manifest.template)
        fields: Mapping[str, str | int] = {"manifest": manifest.hash, "round": self._state.round_num}
        nodes = [node for name in parts.roll.ready() if (node := parts.roll.node(name)) is not None]
        try:
            names = parts.link.send_all(((node, Envelope("adapter", fields, content)) for node in nodes), 60.0)
            pending = [name for name in names if name is not None]
            thanked = sum(1 for _ in parts.link.receive(pending, time.monotonic() + GOODBYE_SECONDS))
            parts.emit("adapter.sent", devices=thanked)
        except LinkError as error:
            parts.emit("link.lost", reason=str(error))

    def _write_status(self, phase: str, missing: Mapping[DeviceId, str], task: TrainTask | None = None) -> None:
        self._parts.status.write_standing(
            self._run.manifest,
            self._state.round_num,
            self._history[-1] if self._history else {},
            phase,
            attempt=task.attempt if task is not None else None,
            ready=list(self._parts.roll.ready()),
            waiting_for=dict(missing),
            late_replies=self._exchange.num_late,
        )


class _Announced:
    """Keeps aggregates, and says so."""

    def __init__(self, folder: AggregateFolder, emit: Emit) -> None:
        self._folder, self._emit = folder, emit

    def load(self, run_id: str, round_num: int) -> Aggregate | None:
        """As the folder does."""
        return self._folder.load(run_id, round_num)

    def save(self, aggregate: Aggregate) -> None:
        """As the folder does."""
        self._folder.save(aggregate)
        roster = aggregate.roster
        self._emit("round.aggregated", round=roster.round_num, attempt=roster.attempt, devices=aggregate.num_devices)
