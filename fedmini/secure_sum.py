"""The seam to devices by secure aggregation: a SumCohort over any transport that can carry five requests and answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedmini import vectors
from fedmini.secagg.messages import Context, Stage, hash_model
from fedmini.secagg.server_session import Refusal, ServerSession
from fedmini.secagg.trust import Trust
from fedmini.types import CohortSum, DeviceId, Manifest, Roster, TrainTask

Exchange = Callable[[Stage, Iterator[tuple[DeviceId, bytes]]], Iterable[tuple[DeviceId, bytes]]]
"""A transport: sends the requests of a stage, each made when it is asked for, and gives the answers as they arrive,
until all are there or the stage's deadline has passed. It says who sent an answer; it never holds two of them."""


@dataclass(frozen=True, slots=True)
class SecureSum:
    """The server's half of a SumCohort: `exchange` reaches the devices, `on_refusals` hears of answers not used."""

    manifest: Manifest
    trust: Trust
    exchange: Exchange
    on_refusals: Callable[[Sequence[Refusal]], None] = lambda refusals: None

    def __call__(self, chosen: Sequence[DeviceId], task: TrainTask, debit: Callable[[Roster], None]) -> CohortSum:
        """The sum of what the chosen devices contribute to a task, the survivors' alone.

        The ledger is debited when keys and shares are there, which fixes the roster, and before any contribution is
        asked for. Raises CohortError where too few are left: before the debit nothing was spent.
        """
        manifest = self.manifest
        model = vectors.to_bytes(task.adapter, manifest.template)
        context = Context(
            run_id=manifest.run_id,
            round_num=task.round_num,
            attempt=task.attempt,
            manifest_hash=bytes.fromhex(manifest.hash),
            model_hash=hash_model(model),
            invited=tuple(sorted(chosen)),
        )
        session = ServerSession(manifest, context, model, self.trust)
        try:
            requests = session.invite()
            while session.stage is not Stage.DONE:
                if session.stage is Stage.CONTRIBUTE:
                    debit(Roster(manifest.run_id, task.round_num, task.attempt, session.roster))
                requests = session.step(self.exchange(session.stage, requests))
        finally:
            if session.refusals:
                self.on_refusals(session.refusals)
        return session.cohort_sum
