"""The evaluations of a served run on its devices: over the same secure sum, with the devices that are ready anyway."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmini.deployment.exchange import FlowerExchange
from fedmini.deployment.roll_call import RollCall
from fedmini.device_evaluation import DeviceEvaluations, DeviceLoss
from fedmini.errors import CohortError, PrivacyBudgetError
from fedmini.events import Emit
from fedmini.secagg.server_session import Refusal
from fedmini.secure_sum import SecureSum
from fedmini.types import Adapter, CohortSum, DeviceId, Roster, TrainTask


@dataclass(frozen=True, slots=True)
class EvaluatingOnDevices:
    """One run's evaluations, and how they reach its devices."""

    evaluations: DeviceEvaluations
    roll: RollCall
    exchange: FlowerExchange
    on_refusals: Callable[[Sequence[Refusal]], None]
    emit: Emit

    def measure(self, adapter: Adapter, round_num: int) -> DeviceLoss | None:
        """The devices' loss with the adapter after a round; None, and the reason in the log, where there is none."""
        try:
            found = self.evaluations.measure(adapter, round_num, self._sum)
        except (CohortError, PrivacyBudgetError) as error:
            self.emit("evaluation.skipped", round=round_num, reason=str(error))
            return None
        self.emit("evaluation.measured", round=round_num, devices=found.num_devices, loss=found.loss, error=found.error)
        return found

    def _sum(self, chosen: Sequence[DeviceId], task: TrainTask, debit: Callable[[Roster], None]) -> CohortSum:
        manifest = self.evaluations.manifest
        return SecureSum(manifest, self.roll.trust, self.exchange, self.on_refusals)(chosen, task, debit)
