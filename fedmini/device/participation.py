"""A run that a device takes part in: its frozen examples, the model in memory, and who answers the server."""

import hashlib
import time
from collections.abc import Mapping

from fedmini import vectors
from fedmini.conditions import DailyUsage
from fedmini.contributor import Contributor
from fedmini.data import Example
from fedmini.device.interruption import Interruption
from fedmini.device.loaded_base import LoadedBase
from fedmini.device.randomness import Randomness
from fedmini.device.receipts import DeviceReceipt, Receipts
from fedmini.enrolment import Enrolment
from fedmini.errors import ConditionsError, ProtocolError
from fedmini.privacy import accounting
from fedmini.store import StoredExample
from fedmini.types import Contribution, Manifest, TrainTask


class Participation:
    """One run, ready: the model is loaded, and stays so between messages.

    Raises ModelMismatchError where this device's base is not the run's, ConditionsError where it has no example that
    can be trained on.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        manifest: Manifest,
        examples: list[StoredExample],
        base: LoadedBase,
        randomness: Randomness,
        interruption: Interruption,
        usage: DailyUsage,
    ) -> None:
        self.manifest = manifest
        self._enrolment, self._interruption, self._usage = enrolment, interruption, usage
        self._receipts = Receipts(enrolment.folder / "receipts.jsonl")
        self._task: TrainTask | None = None
        model = base.model(manifest)
        model.interrupt_by(interruption.check)
        encoder = base.encoder(manifest.local.max_length)
        encoded = encoder.encode_all([Example(one.prompt, one.response) for one in examples])
        if not encoded:
            raise ConditionsError("this device has no example to train on yet: add some")
        self._contributor = Contributor(
            enrolment.identity.certificate.device_id,
            encoded,
            model,
            manifest,
            randomness.streams,
            base.physical_batch_size,
        )
        self._member = enrolment.member(manifest.hash, self._contribute, is_seeded=randomness.is_seeded)

    def __repr__(self) -> str:
        return f"Participation({self.manifest.run_id!r})"

    def answer(self, request: bytes) -> bytes:
        """The answer to one request of the server's, written down before it leaves where it holds a contribution.

        Raises a FedMiniError where this device takes no part (any more): nothing leaves it.
        """
        self._task = None
        answer = self._member.answer(request)
        if self._task is not None:
            self._usage.contributed()
            self._receipts.append(self._receipt(self._task, answer))
        return answer

    def close(self) -> None:
        """Give up what goes on, and erase its secrets."""
        self._member.close()

    def _contribute(self, task: TrainTask) -> Contribution:
        """Train, within what this device's owner allows."""
        self._interruption.begin()
        self._interruption.check()
        with self._usage.training():
            contribution = self._contributor.contribute(task)
        self._task = task
        return contribution

    def _receipt(self, task: TrainTask, answer: bytes) -> DeviceReceipt:
        return DeviceReceipt(
            time=time.time(),
            run_id=self.manifest.run_id,
            round_num=task.round_num,
            attempt=task.attempt,
            manifest_hash=self.manifest.hash,
            size_bytes=len(answer),
            sha256=hashlib.sha256(answer).hexdigest(),
            epsilon=spent(self._enrolment),
        )

    def newest_model(self) -> tuple[int, bytes] | None:
        """The model that the last contribution began from: (rounds committed before it, its bytes)."""
        if self._task is None:
            return None
        return self._task.round_num - 1, vectors.to_bytes(self._task.adapter, self.manifest.template)


def spent(enrolment: Enrolment) -> Mapping[str, float]:
    """What all contributions have cost each unit that any of them protected, at the lifetime delta, rounded up."""
    with enrolment.ledger() as ledger:
        units = {event.unit for one in ledger.releases() for event in one.events}
        return {
            unit: float(accounting.rounded_up(ledger.epsilon(unit, enrolment.lifetime.lifetime_delta)))
            for unit in sorted(units)
        }


def max_examples(manifest: Manifest, limit: int) -> int:
    """How many examples a device brings: what the run's public constants expect of one, and no more than its owner allows."""
    expected = round(manifest.local.expected_batch_size / manifest.local.sampling_rate)
    if expected < 1:
        raise ProtocolError("the manifest expects less than one example of a device")
    return min(expected, limit)
