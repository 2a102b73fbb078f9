"""The background thread of a device: connects when it may, answers the server, sleeps; whatever fails in it stays in it."""

import random
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

from fedmini import offer as offers
from fedmini.conditions import DailyUsage, Policy
from fedmini.device import kept_adapter
from fedmini.device.interruption import Interruption
from fedmini.device.membership import Membership
from fedmini.device.participation import Participation
from fedmini.device.randomness import Randomness
from fedmini.errors import (
    ConditionsError,
    FedMiniError,
    LinkError,
    ModelMismatchError,
    PrivacyBudgetError,
    ReplayError,
)
from fedmini.events import Emit
from fedmini.flower import replies
from fedmini.flower.codec import Envelope
from fedmini.flower.fleet import FleetConnection, Received

LOOK_SECONDS = 0.3  # between two looks at the conditions, while connected
REST_SECONDS = 5.0  # between two looks while it may not train
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
MAX_PAYLOAD_BYTES = 300 * 2**20
MAX_REASON = 300
MAX_ANSWERED = 2


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker works with."""

    membership: Membership
    policy: Policy
    usage: DailyUsage
    interruption: Interruption
    randomness: Randomness
    server: str
    tls: Callable[[], ssl.SSLContext | None]
    emit: Emit


class Worker:
    """The thread. `start` and `stop` it; it never raises, and never touches the process that it is in."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._connection: FleetConnection | None = None
        self._run: int | None = None
        self._ended: set[int] = set()
        self._answered: dict[str, Envelope] = {}  # the last few, by message: one that comes twice is one message
        self._why: str | None = "it was not started"
        self._problem: str | None = None
        self._threads: list[threading.Thread] = []

    @property
    def is_running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    @property
    def is_connected(self) -> bool:
        return self._connection is not None

    @property
    def why_not(self) -> str | None:
        """Why this device does not train or wait for work now; None: it is connected and would."""
        return self._why

    @property
    def problem(self) -> str | None:
        """What went wrong last, if it has not gone well since."""
        return self._problem

    def start(self) -> None:
        """Begin, once."""
        self._why = "it is starting"
        for name, target in (("fedmini-device", self._work), ("fedmini-conditions", self._watch)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop training at once, log out, and end."""
        self._stopping.set()
        self._parts.interruption.stop("it was stopped")
        self._wake.set()
        self._disconnect()
        for thread in self._threads:
            thread.join(timeout_s)
        self._why = "it was stopped"

    def wake(self) -> None:
        """Look again now: something has changed."""
        self._wake.set()

    def reconnect(self) -> None:
        """Log out and in again, so that the server offers its runs anew."""
        self._disconnect()
        self._wake.set()

    def _work(self) -> None:
        wait_s = FIRST_WAIT_SECONDS
        while not self._stopping.is_set():
            self._wake.clear()
            self._why = self._held_back()
            if self._why is not None:
                self._wake.wait(REST_SECONDS)
                continue
            try:
                self._serve()
                wait_s = FIRST_WAIT_SECONDS
            except Exception as error:  # the edge: nothing that fails here may reach the host
                if self._stopping.is_set():
                    return
                self._note(error)
                self._wake.wait(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, LONGEST_WAIT_SECONDS)

    def _held_back(self) -> str | None:
        if self._parts.membership.enrolment is None:
            return "it is not enrolled: give its device.pub to an operator"
        return self._parts.policy.why_not()

    def _watch(self) -> None:
        """Ends what goes on when the conditions do."""
        while not self._stopping.wait(LOOK_SECONDS if self.is_connected else REST_SECONDS / 10):
            if not self.is_connected:
                continue
            try:
                why = self._parts.policy.why_not()
            except Exception as error:
                why = f"its conditions can't be read: {type(error).__name__}"
            if why is not None:
                self._why = why
                self._parts.interruption.stop(why)
                self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _serve(self) -> None:
        """Log in, and answer what comes, until the conditions end or the connection does."""
        parts = self._parts
        own = parts.membership.enrolled()
        connection = FleetConnection(parts.server, parts.tls(), own.login_key, MAX_PAYLOAD_BYTES)
        try:
            connection.open()
            parts.interruption.allow()
            self._connection = connection
            self._problem = None
            parts.emit("device.connected")
            while not self._stopping.is_set() and self._connection is connection:
                received = self._pull(connection)
                if received is not None:
                    self._answer(connection, received)
        finally:
            if self._connection is connection:
                self._connection = None
            connection.close()
            parts.membership.leave_rounds()

    def _pull(self, connection: FleetConnection) -> Received | None:
        try:
            return connection.pull()
        except LinkError:
            raise
        except FedMiniError as error:  # a message that can't be used: the next may be better
            self._note(error)
            return None

    def _answer(self, connection: FleetConnection, received: Received) -> None:
        if received.message_id in self._answered:  # the server did not hear that it arrived: the same answer again
            return self._send(connection, received, self._answered[received.message_id])
        if received.run in self._ended:
            return  # a message from before the server's program began anew
        self._parts.emit("device.answering", stage=str(received.envelope.fields.get("stage", received.envelope.kind)))
        try:
            envelope = self._handled(received)
        except FedMiniError as error:
            self._note(error)
            envelope = _refusal(error)
        except Exception as error:  # a failure of a library: the round goes on without this device
            self._note(error)
            envelope = Envelope("refusal", {"code": "failure", "reason": type(error).__name__})
        if self._stopping.is_set() or envelope is None:
            return
        identity = self._parts.membership.enrolled().identity
        self._send(connection, received, replies.sign(identity, received.message_id, envelope))

    def _send(self, connection: FleetConnection, received: Received, signed: Envelope) -> None:
        self._answered[received.message_id] = signed
        for oldest in list(self._answered)[:-MAX_ANSWERED]:
            del self._answered[oldest]
        try:
            connection.reply(received, signed)
        except LinkError as error:
            if error.status is None or error.status in (401, 502, 503, 504):
                raise
            self._note(error)  # the server's run is over: a late answer, which nobody waits for

    def _handled(self, received: Received) -> Envelope | None:
        parts, envelope = self._parts, received.envelope
        if envelope.kind == "offer":
            if self._run is not None and self._run != received.run:
                self._ended.add(self._run)
            self._run = received.run
            return self._considered(envelope)
        if received.run != self._run:
            return Envelope("refusal", {"code": "stranger", "reason": "a message of a run whose offer never came"})
        run = self._ready(envelope.text("manifest"))
        if envelope.kind == "request":
            answer = run.answer(envelope.payload)
            newest = run.newest_model()
            if newest is not None:
                kept_adapter.keep(parts.membership.enrolled().folder, run.manifest, *newest)
                parts.emit("device.contributed", run=run.manifest.run_id, round=newest[0] + 1)
            return Envelope("answer", {}, answer)
        if envelope.kind == "adapter":
            round_num = envelope.fields.get("round")
            if type(round_num) is int and 0 <= round_num <= run.manifest.num_rounds:
                kept_adapter.keep(parts.membership.enrolled().folder, run.manifest, round_num, envelope.payload)
            return Envelope("thanks")
        return Envelope("refusal", {"code": "unknown", "reason": "a message of a kind that this device does not know"})

    def _considered(self, envelope: Envelope) -> Envelope:
        offer = offers.read(envelope.payload)
        why = self._parts.membership.consider(offer)
        if why is not None:
            self._why = f"run {offer.signed.manifest.run_id} waits for consent"
            self._parts.emit("device.asked_for_consent", run=offer.signed.manifest.run_id)
            return Envelope("refusal", {"code": why, "reason": "its owner has not agreed yet"})
        self._ready(offer.signed.manifest.hash)
        self._why = None
        return Envelope("ready")

    def _ready(self, manifest_hash: str) -> Participation:
        parts = self._parts
        return parts.membership.ready(manifest_hash, parts.randomness, parts.interruption, parts.usage)

    def _note(self, error: Exception) -> None:
        """Remember a problem, for its owner: our own words, or the class of a library's."""
        self._problem = str(error) if isinstance(error, FedMiniError) else f"a failure inside: {type(error).__name__}"
        self._parts.emit("device.problem", problem=self._problem)


def _refusal(error: FedMiniError) -> Envelope:
    """What the server is told: a code, and for a broken rule of the protocol what it was. Never more of the device."""
    codes = (
        (ConditionsError, "conditions"),
        (ReplayError, "replayed"),
        (PrivacyBudgetError, "budget"),
        (ModelMismatchError, "model"),
    )
    for kind, code in codes:
        if isinstance(error, kind):
            return Envelope("refusal", {"code": code, "reason": code})
    reason = str(error)[:MAX_REASON] if type(error).__name__ in ("ProtocolError", "UpdateError") else "refused"
    return Envelope("refusal", {"code": "protocol", "reason": reason})
