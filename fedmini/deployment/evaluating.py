"""The evaluations of a served run on its devices: over the same secure sum, with the devices that are ready anyway."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmini.config import TimingSection
from fedmini.deployment.exchange import FlowerExchange
from fedmini.deployment.roll_call import RollCall
from fedmini.deployment.run_files import RunFiles
from fedmini.deployment.status import StatusFile
from fedmini.device_evaluation import DeviceEvaluations, DeviceLoss
from fedmini.errors import CohortError, PrivacyBudgetError
from fedmini.events import Emit
from fedmini.flower.codec import EVALUATION
from fedmini.flower.server_link import ServerLink
from fedmini.privacy.ledger import Ledger
from fedmini.privacy.noise import Streams
from fedmini.secagg.server_session import Refusal
from fedmini.secure_sum import SecureSum
from fedmini.server_step import num_asked
from fedmini.types import Adapter, CohortSum, DeviceId, Roster, TrainTask


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


@dataclass(frozen=True, slots=True)
class EvaluatingOnDevices:
    """One run's evaluations, and how they reach its devices."""

    evaluations: DeviceEvaluations
    parts: ServedRunParts
    exchange: FlowerExchange
    on_refusals: Callable[[Sequence[Refusal]], None]

    def measure(self, adapter: Adapter, round_num: int) -> DeviceLoss | None:
        """The devices' loss with the adapter after a round; None, and the reason in the log, where there is none."""
        emit = self.parts.emit
        try:
            found = self.evaluations.measure(adapter, round_num, self._sum)
        except (CohortError, PrivacyBudgetError) as error:
            emit("evaluation.skipped", round=round_num, reason=str(error))
            return None
        emit("evaluation.measured", round=round_num, devices=found.num_devices, loss=found.loss, error=found.error)
        return found

    def _sum(self, chosen: Sequence[DeviceId], task: TrainTask, debit: Callable[[Roster], None]) -> CohortSum:
        manifest = self.evaluations.manifest
        return SecureSum(manifest, self.parts.roll.trust, self.exchange, self.on_refusals)(chosen, task, debit)


def on_devices(
    parts: ServedRunParts, ledger: Ledger, over_selection: float, on_refusals: Callable[[Sequence[Refusal]], None]
) -> EvaluatingOnDevices | None:
    """A run's evaluations on its devices; None where it has none. `ledger` is theirs, not the training's."""
    trained = parts.files.manifest
    manifest = trained.for_evaluation
    if manifest is None:
        return None
    evaluations = DeviceEvaluations(
        trained=trained,
        manifest=manifest,
        num_asked=num_asked(manifest.release.cohort_size, over_selection),
        population=parts.roll.willing,
        streams=parts.streams,
        ledger=ledger,
        is_seeded=parts.is_seeded,
        is_replayed=False,
    )
    about = {"manifest": trained.hash, "release": EVALUATION}
    exchange = FlowerExchange(parts.link, parts.roll, about, parts.timing, parts.emit)
    return EvaluatingOnDevices(evaluations, parts, exchange, on_refusals)
