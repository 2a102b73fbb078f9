"""Five requests and their answers over Flower: the transport that `SecureSum` is given."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping

from fedmini.config import TimingSection
from fedmini.deployment.roll_call import RollCall, refusal_of
from fedmini.errors import LinkError, StateError, UpdateError
from fedmini.events import Emit
from fedmini.flower import replies
from fedmini.flower.codec import Envelope, Value
from fedmini.flower.incoming import Reply
from fedmini.flower.server_link import ServerLink
from fedmini.secagg.messages import Stage
from fedmini.types import DeviceId

GRACE_SECONDS = 5.0
FOLDER_SECONDS = 2.0  # between two looks at who was revoked


class _RefusedError(UpdateError):
    """A device refuses, in an answer that it signed: it may name another device, whose shares it could not use."""

    def __init__(self, message: str, dealer: Value) -> None:
        super().__init__(message)
        self.dealer = dealer


class FlowerExchange:
    """One run's exchanges. What a device does not answer in time, or not usably, costs it the round and nobody else."""

    def __init__(
        self,
        link: ServerLink,
        roll: RollCall,
        about: Mapping[str, str],
        timing: TimingSection,
        emit: Emit,
    ) -> None:
        """`about`: the fields of every request, beside its stage: the hash of the run's manifest, and what is released."""
        self._link, self._roll, self._about, self._emit = link, roll, about, emit
        self._seconds: Mapping[Stage, float] = {
            Stage.ADVERTISE: timing.advertise_s,
            Stage.SHARE: timing.share_s,
            Stage.CONTRIBUTE: timing.contribute_s,
            Stage.AGREE: timing.agree_s,
            Stage.UNMASK: timing.unmask_s,
        }
        self._late: dict[str, tuple[DeviceId, Stage]] = {}
        self.num_late = 0
        self.sent: Counter[DeviceId] = Counter()  # bytes to each device in this round
        self.received: Counter[DeviceId] = Counter()

    def __call__(self, stage: Stage, requests: Iterator[tuple[DeviceId, bytes]]) -> Iterator[tuple[DeviceId, bytes]]:
        """Send a stage's requests, and give the answers as they arrive, until all are there or its time is over."""
        if stage is Stage.ADVERTISE:
            self.sent, self.received = Counter(), Counter()
        until = time.monotonic() + self._seconds[stage]
        self._emit("stage.began", stage=stage.name)
        try:
            pending = self._send(stage, requests)
            yield from self._answers(stage, pending, until)
        except LinkError as error:  # the SuperLink is away or knows us no more: who has not answered is out
            self._emit("link.lost", reason=str(error))

    def _send(self, stage: Stage, requests: Iterator[tuple[DeviceId, bytes]]) -> dict[str, DeviceId]:
        order: list[DeviceId] = []

        def messages() -> Iterator[tuple[int, Envelope]]:
            for device, request in requests:
                node = self._roll.node(device)
                if node is None:  # revoked since
                    continue
                order.append(device)
                self.sent[device] += len(request)
                yield node, Envelope("request", {**self._about, "stage": stage.name}, request)

        names = list(self._link.send_all(messages(), self._seconds[stage] + GRACE_SECONDS))
        return {name: device for name, device in zip(names, order, strict=True) if name is not None}

    def _answers(self, stage: Stage, pending: dict[str, DeviceId], until: float) -> Iterator[tuple[DeviceId, bytes]]:
        waiting, replayed = dict(pending), 0
        while waiting and (now := time.monotonic()) < until:
            for reply in self._link.receive([*waiting, *self._late], min(until, now + FOLDER_SECONDS)):
                if reply.message_id in self._late:
                    self._note_late(reply)
                    continue
                device = waiting.pop(reply.message_id)
                try:
                    envelope = self._usable(device, stage, reply)
                except UpdateError as error:
                    dealer = error.dealer if isinstance(error, _RefusedError) else None
                    replayed += str(error).startswith("replayed")
                    self._gave_up(device, stage, str(error), dealer)
                    self._check_not_restored(replayed, len(pending))
                    continue
                self.received[device] += len(envelope.payload)
                if stage is Stage.UNMASK:
                    self._roll.preference.stayed(device)
                yield device, envelope.payload
                if not waiting:
                    return
            self._roll.follow_folder()  # who was revoked meanwhile is cut off at once, and its answer not taken
        for name, device in waiting.items():
            self._late[name] = (device, stage)
            self._gave_up(device, stage, f"no answer at stage {stage.name}")

    def _gave_up(self, device: DeviceId, stage: Stage, why: str, dealer: Value = None) -> None:
        """A device is out of the round. Once the roster is fixed that may cost the round: it is asked last from then on."""
        self._roll.not_ready(device, why)
        if stage is Stage.CONTRIBUTE and isinstance(dealer, str) and self._roll.device_key(dealer) is not None:
            self._roll.preference.blamed(device, dealer)
            self._emit("device.blamed", device=device, dealer=dealer)
        elif stage >= Stage.CONTRIBUTE:
            self._roll.preference.left(device)

    def _usable(self, device: DeviceId, stage: Stage, reply: Reply) -> Envelope:
        """The answer in a reply. Raises UpdateError, which says why there is none."""
        envelope, device_key = reply.envelope, self._roll.device_key(device)
        if device_key is None:
            raise UpdateError("it was revoked, or removed from the server's folder")
        if envelope is None:
            raise UpdateError(f"no answer at stage {stage.name} ({reply.problem})")
        replies.check(device_key, reply.message_id, envelope)
        if envelope.kind != "answer":
            raise _RefusedError(refusal_of(envelope), envelope.fields.get("dealer"))
        return envelope

    def _note_late(self, reply: Reply) -> None:
        device, stage = self._late.pop(reply.message_id)
        if reply.envelope is None:  # Flower says that the message has expired
            return
        self.num_late += 1
        self._emit("reply.late", device=device, stage=stage.name)

    def _check_not_restored(self, num_replayed: int, num_asked: int) -> None:
        """Raise StateError where most devices say that they have been in this round or a later one."""
        if 2 * num_replayed > num_asked:
            self._emit("alarm.restored", devices=num_replayed)
            raise StateError(
                f"{num_replayed} of {num_asked} devices have taken part in this round or a later one: this server's state is an "
                "old copy; bring the newest one back, or plan and sign a new run"
            )
