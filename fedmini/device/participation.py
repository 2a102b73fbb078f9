"""A run that a device takes part in: its frozen examples, the model in memory, and who answers the server."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmini import vectors
from fedmini.conditions import DailyUsage
from fedmini.contributor import Contributor
from fedmini.device.interruption import Interruption
from fedmini.device.loaded_base import LoadedBase
from fedmini.device.receipts import DeviceReceipt, Receipts
from fedmini.enrolment import Enrolment
from fedmini.errors import ProtocolError
from fedmini.privacy import accounting
from fedmini.randomness import Randomness
from fedmini.secagg import wire
from fedmini.types import Contribution, EncodedExample, Manifest, TrainTask

RECEIPTS = "receipts.jsonl"


@dataclass(frozen=True, slots=True)
class Means:
    """What every run of a device trains with."""

    base: LoadedBase
    randomness: Randomness
    interruption: Interruption
    usage: DailyUsage


class Participation:
    """One run, ready: the model is loaded, and stays so between messages.

    `read_examples` gives the run's frozen examples, as far as they are still there: it is asked anew for each round, as
    one may have expired. Raises ModelMismatchError where this device's base is not the run's.
    """

    def __init__(
        self,
        enrolment: Enrolment,
        manifest: Manifest,
        read_examples: Callable[[], tuple[EncodedExample, ...]],
        means: Means,
    ) -> None:
        self.manifest = manifest
        self._enrolment, self._means, self._read_examples = enrolment, means, read_examples
        self._receipts = Receipts(enrolment.folder / RECEIPTS)
        self._task: TrainTask | None = None
        self._model = means.base.model(manifest)
        self._model.interrupt_by(means.interruption.check)
        self._contributor = self._made_contributor(())  # tells at once whether the base is the run's
        self._member = enrolment.member(manifest.hash, self._contribute, is_seeded=means.randomness.is_seeded)

    def __repr__(self) -> str:
        return f"Participation({self.manifest.run_id!r})"

    def answer(self, request: bytes) -> bytes:
        """The answer to one request of the server's, written down before it leaves where it holds a contribution.

        Raises a FedMiniError where this device takes no part (any more): nothing leaves it.
        """
        self._task = None
        if wire.is_invitation(request):  # what would stop its training later stops it before it costs the run anything
            self._means.interruption.begin()
            self._means.interruption.check()
            self._contributor = self._made_contributor(self._read_examples())
        answer = self._member.answer(request)
        if self._task is not None:
            self._means.usage.contributed()
            self._receipts.append(self._receipt(self._task, answer))
        return answer

    def close(self) -> None:
        """Give up what goes on, and erase its secrets."""
        self._member.close()

    def newest_model(self) -> tuple[int, bytes] | None:
        """The model that this answer's contribution began from: (rounds committed before it, its bytes)."""
        if self._task is None:
            return None
        return self._task.round_num - 1, vectors.to_bytes(self._task.adapter, self.manifest.template)

    def _made_contributor(self, examples: tuple[EncodedExample, ...]) -> Contributor:
        return Contributor(
            self._enrolment.identity.certificate.device_id,
            examples,
            self._model,
            self.manifest,
            self._means.randomness.streams,
            self._means.base.physical_batch_size,
        )

    def _contribute(self, task: TrainTask) -> Contribution:
        """Train, within what this device's owner allows."""
        self._means.interruption.begin()
        self._means.interruption.check()
        with self._means.usage.training():
            contribution = self._contributor.contribute(task)
        self._means.interruption.check()
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
            epsilon=spent(self._enrolment)[1],
        )


def spent(enrolment: Enrolment) -> tuple[int, Mapping[str, float]]:
    """How many contributions there were, and what all have cost each unit that any of them protected.

    At the lifetime delta, rounded up.
    """
    with enrolment.ledger() as ledger:
        receipts = ledger.releases()
        units = sorted({event.unit for one in receipts for event in one.events})
        delta = enrolment.lifetime.lifetime_delta
        return len(receipts), {unit: float(accounting.rounded_up(ledger.epsilon(unit, delta))) for unit in units}


def max_examples(manifest: Manifest, limit: int) -> int:
    """How many examples a device brings: what the run's public constants expect of one, and no more than its owner allows."""
    expected = round(manifest.local.expected_batch_size / manifest.local.sampling_rate)
    if expected < 1:
        raise ProtocolError("the manifest expects less than one example of a device")
    return min(expected, limit)


def why_done(enrolment: Enrolment, manifest: Manifest) -> str | None:
    """Why this device takes no part in a run any more, in words; None where it may."""
    with enrolment.ledger() as ledger:
        num_done = ledger.num_participations(manifest.run_id)
    if num_done < manifest.release.max_releases:
        return None
    return f"it has taken part in run {manifest.run_id} as often as it may: {num_done} times"
