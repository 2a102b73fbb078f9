"""A run that a device takes part in: its frozen examples, the model in memory, and who answers the server."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fedmini import vectors
from fedmini.conditions import DailyUsage
from fedmini.device import room
from fedmini.device.hidden_cache import HiddenCache
from fedmini.device.interruption import Interruption
from fedmini.device.loaded_base import LoadedBase
from fedmini.device.receipts import DeviceReceipt, Receipts
from fedmini.enrolment import Enrolment
from fedmini.errors import ProtocolError
from fedmini.member import Member
from fedmini.model import runtime
from fedmini.privacy import accounting
from fedmini.randomness import Randomness
from fedmini.secagg import wire
from fedmini.types import Contribution, EncodedExample, Manifest, TrainTask

if TYPE_CHECKING:
    from fedmini.contributor import Contributor

RECEIPTS = "receipts.jsonl"
DRAWS_THAT_PAY = 2.0  # of one example over a run: an example that is drawn once is kept for nothing


@dataclass(frozen=True, slots=True)
class Means:
    """What every run of a device trains with."""

    base: LoadedBase
    randomness: Randomness
    interruption: Interruption
    usage: DailyUsage
    hidden: HiddenCache


class Participation:
    """One run, ready to train and to evaluate: the model is loaded, and stays so between messages.

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
        self.enrolment, self.means, self._read_examples = enrolment, means, read_examples
        self._receipts = Receipts(enrolment.folder / RECEIPTS)
        self._given: tuple[Manifest, TrainTask] | None = None  # what the newest answer contributed to
        self._model = means.base.model(manifest)
        self._frozen = self._model.keep_states(means.hidden) if _pays_to_keep(manifest, means.hidden) else None
        self._model.interrupt_by(means.interruption.check)
        self._contributor = self._made_contributor(manifest, ())  # tells at once whether the base is the run's
        self._parts = {one is not manifest: one for one in manifest.parts}  # by whether it is the evaluations
        self._members = {is_evaluation: self._made_member(is_evaluation) for is_evaluation in self._parts}

    def __repr__(self) -> str:
        return f"Participation({self.manifest.run_id!r})"

    def answer(self, request: bytes, *, is_evaluation: bool = False) -> bytes:
        """The answer to one request of the server's, written down before it leaves where it holds a contribution.

        Raises a FedMiniError where this device takes no part (any more): nothing leaves it.
        """
        self._given = None
        manifest = self._parts.get(is_evaluation)
        if manifest is None:
            raise ProtocolError(f"run {self.manifest.run_id!r} has no evaluations on devices")
        if wire.is_invitation(request):  # what would stop its training later stops it before it costs the run anything
            self.means.interruption.begin()
            self.means.interruption.check()
            examples = self._read_examples()
            if self._frozen is not None:
                self._frozen.keep_only(examples)
            self._contributor = self._made_contributor(manifest, examples)
            self.close()  # one round at a time, of either kind
            room.take(self.enrolment.folder)
        answer = self._members[is_evaluation].answer(request)
        runtime.give_back_memory()  # of the accountant and of the training: tens of MB, which would grow with the rounds
        if self._given is not None:
            self.means.usage.contributed()
            self._receipts.append(self._receipt(*self._given, answer))
        return answer

    def close(self) -> None:
        """Give up what goes on, and erase its secrets."""
        room.give_up(self.enrolment.folder)
        for member in self._members.values():
            member.close()

    @property
    def has_contributed(self) -> bool:
        """Whether the newest answer holds a contribution."""
        return self._given is not None

    def newest_model(self) -> tuple[int, bytes] | None:
        """The model that this answer's training began from: (rounds committed before it, its bytes)."""
        if self._given is None or self._given[0] is not self.manifest:
            return None
        task = self._given[1]
        return task.round_num - 1, vectors.to_bytes(task.adapter, self.manifest.template)

    def _made_member(self, is_evaluation: bool) -> Member:
        return self.enrolment.member(
            self.manifest.hash,
            partial(self._contribute, self._parts[is_evaluation]),
            is_evaluation=is_evaluation,
            is_seeded=self.means.randomness.is_seeded,
        )

    def _made_contributor(self, manifest: Manifest, examples: tuple[EncodedExample, ...]) -> "Contributor":
        from fedmini.contributor import Contributor  # with it come the libraries that train

        return Contributor(
            self.enrolment.identity.certificate.device_id,
            examples,
            self._model,
            manifest,
            self.means.randomness.streams,
            self.means.base.physical_batch_size,
        )

    def _contribute(self, manifest: Manifest, task: TrainTask) -> Contribution:
        """Train, or evaluate, within what this device's owner allows."""
        self.means.interruption.begin()
        self.means.interruption.check()
        room.give_up(self.enrolment.folder)  # for what is written from here on: the debit stands
        with self.means.usage.training():
            contribution = self._contributor.contribute(task)
        self.means.interruption.check()
        self._given = (manifest, task)
        return contribution

    def _receipt(self, manifest: Manifest, task: TrainTask, answer: bytes) -> DeviceReceipt:
        return DeviceReceipt(
            time=time.time(),
            run_id=manifest.run_id,
            round_num=task.round_num,
            attempt=task.attempt,
            manifest_hash=manifest.hash,
            size_bytes=len(answer),
            sha256=hashlib.sha256(answer).hexdigest(),
            epsilon=spent(self.enrolment)[1],
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


def _pays_to_keep(manifest: Manifest, hidden: HiddenCache) -> bool:
    """Whether what frozen layers say of an example will be asked for again, as often as a run's own numbers expect it."""
    expected = manifest.local.sampling_rate * manifest.local.num_steps * manifest.release.max_releases
    return hidden.max_bytes > 0 and expected >= DRAWS_THAT_PAY


def max_examples(manifest: Manifest, limit: int) -> int:
    """How many examples a device brings: what the run's public constants expect of one, and no more than its owner allows."""
    held_back = 0.0 if manifest.evaluation is None else manifest.evaluation.expected_examples
    expected = round(manifest.local.expected_batch_size / manifest.local.sampling_rate + held_back)
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
