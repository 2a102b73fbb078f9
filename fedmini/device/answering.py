"""What a device says to each message of a server's: data in, data out. Nothing that comes is ever executed."""

from collections import OrderedDict, deque
from collections.abc import Callable

from fedmini import offer as offers
from fedmini.device import kept_adapter, participation
from fedmini.device.diary import About, Diary, in_words
from fedmini.device.membership import Membership
from fedmini.device.participation import Means, Participation
from fedmini.errors import (
    ConditionsError,
    DealerError,
    FedMiniError,
    ModelMismatchError,
    PrivacyBudgetError,
    ProtocolError,
    ReplayError,
    StateError,
    UpdateError,
)
from fedmini.flower import replies
from fedmini.flower.codec import EVALUATION, Envelope
from fedmini.flower.fleet import Received
from fedmini.secagg import wire
from fedmini.types import Manifest

MAX_REASON = 300
NO_OFFER = "no run was offered to it yet"
NUM_KEPT_ANSWERS = 2  # whole ones, which may be as large as a contribution
NUM_REMEMBERED = 4096  # messages that are not answered a second time
CODES = (
    (ConditionsError, "conditions"),
    (ReplayError, "replayed"),
    (PrivacyBudgetError, "budget"),
    (ModelMismatchError, "model"),
)


class Answers:
    """The answers to messages, one at a time. Each message has one answer: whoever asks twice hears the same, or nothing.

    `why_not`: what holds a new round back now, in words for the owner.
    """

    def __init__(self, membership: Membership, means: Means, diary: Diary, why_not: Callable[[], str | None]) -> None:
        self._membership, self._means, self._diary, self._why_not = membership, means, diary, why_not
        self._run: int | None = None
        self._ended: deque[int] = deque(maxlen=NUM_REMEMBERED)
        self._given: OrderedDict[str, Envelope | None] = OrderedDict()
        self.is_waiting_for_consent = False
        self.why: str | None = NO_OFFER  # why this device takes no part, as far as runs go; None: it does

    def to(self, received: Received) -> Envelope | None:
        """The signed answer to a message; None where there is none: it is from before the server's program began anew.

        Raises a FedMiniError where this device's folder is closed.
        """
        if received.message_id in self._given:  # the server did not hear that it had arrived
            return self._given[received.message_id]
        if received.run in self._ended:
            return None
        kind = received.envelope.kind
        self._diary.tell("device.answering", stage=str(received.envelope.fields.get("stage", kind)))
        about = About.ROUND if kind == "request" else About.OFFER
        try:
            envelope = self._answer(received)
        except FedMiniError as error:
            if not self._means.interruption.is_stopped:  # else its conditions ended, or its owner said so: all is well
                self._diary.note(error, about)
            envelope = _refusal(error)
        except BaseException as error:  # a library's: some of Flower's are no Exception. The round goes on without us
            self._diary.note(error, about)
            envelope = Envelope("refusal", {"code": "failure", "reason": type(error).__name__})
        signed = replies.sign(self._membership.enrolled().identity, received.message_id, envelope)
        self._remember(received.message_id, signed)
        return signed

    def _remember(self, message_id: str, signed: Envelope) -> None:
        self._given[message_id] = signed
        for older in list(self._given)[-NUM_KEPT_ANSWERS - 1 : -NUM_KEPT_ANSWERS]:
            self._given[older] = None
        while len(self._given) > NUM_REMEMBERED:
            self._given.popitem(last=False)

    def _answer(self, received: Received) -> Envelope:
        envelope = received.envelope
        if envelope.kind == "offer":
            if self._run is not None and self._run != received.run:
                self._ended.append(self._run)
            self._run = received.run
            return self._consider(envelope)
        if received.run != self._run:
            return Envelope("refusal", {"code": "stranger", "reason": "a message of a run whose offer never came"})
        if envelope.kind == "request":
            return self._take_part(envelope)
        if envelope.kind == "adapter":
            return self._take_adapter(envelope)
        return Envelope("refusal", {"code": "unknown", "reason": "a message of a kind that this device does not know"})

    def _consider(self, envelope: Envelope) -> Envelope:
        offer = offers.read(envelope.payload)
        manifest = offer.signed.manifest
        self.is_waiting_for_consent = False
        try:
            why = self._membership.consider(offer)
            if why is not None:
                self.is_waiting_for_consent = True
                self._explain(f"run {manifest.run_id} waits for consent")
                self._diary.tell("device.asked_for_consent", run=manifest.run_id)
                return Envelope("refusal", {"code": why, "reason": "its owner has not agreed yet"})
            if (held := self._held()) is not None:
                return held
            self._ready(manifest.hash)
            self._diary.went_well(About.OFFER)
            self._explain(participation.why_done(self._membership.enrolled(), manifest))
            return Envelope("ready")
        except BaseException as error:
            self._explain(_no_part(manifest, error))
            raise

    def _take_part(self, envelope: Envelope) -> Envelope:
        run = self._ready(envelope.text("manifest"))
        if wire.is_invitation(envelope.payload) and (held := self._held()) is not None:
            return held
        is_evaluation = envelope.fields.get("release") == EVALUATION
        try:
            answer = run.answer(envelope.payload, is_evaluation=is_evaluation)
        except StateError as error:  # a full disk: the next round fails too, until its owner has made room
            self._explain(_no_part(run.manifest, error))
            raise
        if wire.is_invitation(envelope.payload):
            self._explain(None)
        newest = run.newest_model()
        if run.has_contributed:
            self._diary.went_well(About.ROUND)
        if run.has_contributed and newest is None:
            self._diary.tell("device.evaluated", run=run.manifest.run_id)
        if newest is not None:
            self._keep(run.manifest, *newest)
            self._diary.tell("device.contributed", run=run.manifest.run_id, round=newest[0] + 1)
            self._explain(participation.why_done(self._membership.enrolled(), run.manifest))
        return Envelope("answer", {}, answer)

    def _take_adapter(self, envelope: Envelope) -> Envelope:
        own = self._membership.enrolled()
        manifest, round_num = own.manifest(envelope.text("manifest")), envelope.fields.get("round")
        if type(round_num) is not int or not 0 <= round_num <= manifest.num_rounds:
            raise UpdateError(f"expected an adapter after 0 to {manifest.num_rounds} rounds")
        kept_adapter.keep(own.folder, manifest, round_num, envelope.payload)
        if round_num == manifest.num_rounds:
            self._explain(f"run {manifest.run_id} is over")
        return Envelope("thanks")

    def _keep(self, manifest: Manifest, round_num: int, content: bytes) -> None:
        """Keep the model that was trained on. Its contribution is paid for: no full disk keeps it from leaving."""
        try:
            kept_adapter.keep(self._membership.enrolled().folder, manifest, round_num, content)
        except FedMiniError as error:
            self._diary.note(error, About.ROUND)

    def _held(self) -> Envelope | None:
        """What is said where no round may begin now."""
        why = self._why_not()
        if why is None:
            return None
        self._diary.why = why
        return Envelope("refusal", {"code": "conditions", "reason": "conditions"})

    def _explain(self, why: str | None) -> None:
        self.why = self._diary.why = why

    def _ready(self, manifest_hash: str) -> Participation:
        return self._membership.ready(manifest_hash, self._means)


def _no_part(manifest: Manifest, error: BaseException) -> str:
    return f"it does not take part in run {manifest.run_id}: {in_words(error)}"


def _refusal(error: FedMiniError) -> Envelope:
    """What the server is told: a code, and for a broken rule of the protocol what it was. Never more of the device."""
    for kind, code in CODES:
        if isinstance(error, kind):
            return Envelope("refusal", {"code": code, "reason": code})
    reason = str(error)[:MAX_REASON] if type(error) in (ProtocolError, UpdateError, DealerError) else "refused"
    about = {"dealer": error.dealer} if isinstance(error, DealerError) else {}
    return Envelope("refusal", {"code": "protocol", "reason": reason, **about})
