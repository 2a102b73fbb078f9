"""The background threads of a device: they connect when they may, answer, rest; whatever fails in them stays in them."""

import random
import threading
import time
from dataclasses import dataclass
from functools import partial

from fedmini import offer as offers
from fedmini.conditions import Policy
from fedmini.device.answering import Answers
from fedmini.device.diary import About, Diary, in_words
from fedmini.device.membership import Membership
from fedmini.device.participation import Means
from fedmini.device.settings import Server
from fedmini.enrolment import Enrolment
from fedmini.errors import FedMiniError, LinkError
from fedmini.flower.codec import Envelope
from fedmini.flower.fleet import FleetConnection, Received
from fedmini.flower.open_sockets import OpenSockets
from fedmini.secagg import wire
from fedmini.vectors import num_parameters

LOGOUT_SECONDS = 1.0  # for a logout on the way out: without it, the server takes a device for gone a minute later
LOOK_SECONDS = 0.3  # between two looks at the conditions, while connected
REST_SECONDS = 5.0  # between two looks while it may not train
STOP_SECONDS = 6.0  # for the threads to end; one that an app's or a library's code holds ends by itself, later
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
MISSED_SECONDS = 30.0  # after which the server may have taken a device for gone: its heartbeats last about 40
STILL_ONLINE = 412  # what the SuperLink says to a login while it has not missed the one before
STILL_ONLINE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker works with. `during` is `policy` without what a round of its own uses up."""

    membership: Membership
    means: Means
    policy: Policy
    during: Policy
    server: Server
    diary: Diary


class Worker:
    """The threads. `start` and `stop` them, from any thread; they never raise, and never touch the process they are in.

    One of them owns the connection: nobody else uses or closes it, but for shutting its sockets.
    """

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._answers = Answers(parts.membership, parts.means, parts.diary, partial(why_not, parts.policy))
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._cut = threading.Event()  # the connection that stands is to end
        self._sockets = OpenSockets()
        self._is_serving = False
        self._is_connected = False
        self._is_waiting = False  # for the server, to log in or for a message: nothing is lost where that is cut
        self._lost_at: float | None = None
        self._wait_s = FIRST_WAIT_SECONDS
        self._threads: list[threading.Thread] = []

    @property
    def is_running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    def start(self) -> None:
        """Begin, once."""
        self._parts.diary.why = "it is starting"
        for name, target in (("fedmini-device", self._work), ("fedmini-conditions", self._watch)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Stop training at once, log out, and end. Called by a thread of its own, by an app's log, it waits for nothing."""
        self._stopping.set()
        self._end_connection("it was stopped")
        began = time.monotonic()
        while (passed := time.monotonic() - began) < STOP_SECONDS:
            others = (thread for thread in self._threads if thread is not threading.current_thread())
            alive = next((thread for thread in others if thread.is_alive()), None)
            if alive is None:
                break
            has_had_its_time = passed > LOGOUT_SECONDS
            if self._is_waiting or has_had_its_time:
                self._sockets.shut()
            if has_had_its_time and self._sockets.is_resolving:
                break
            alive.join(LOOK_SECONDS / 3)
        self._parts.diary.why = "it was stopped"

    def leave(self, why: str) -> None:
        """Give up the round that goes on, log out, and in again."""
        self._end_connection(why)

    def ask_again(self) -> None:
        """Log out and in where a run waits for consent, so that it is offered anew at once."""
        if self._answers.is_waiting_for_consent:
            self._end_connection("it asks its server again")

    def _end_connection(self, why: str) -> None:
        self._cut.set()
        self._parts.means.interruption.stop(why)
        self._sockets.shut()
        self._wake.set()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            self._cut.clear()
            try:
                if (why := self._held_back()) is not None:
                    self._parts.diary.why = why
                    self._wake.wait(REST_SECONDS)
                    continue
                self._serve()
            except BaseException as error:  # the edge: nothing that fails here may reach the host, or end this thread
                if self._goes_on():
                    self._rest_after(error)

    def _rest_after(self, error: BaseException) -> None:
        """Say what is wrong with the connection, and wait: longer each time, until it is well."""
        diary = self._parts.diary
        diary.why = f"it is not connected: {in_words(error)}"
        diary.note(error, About.LINK)
        if isinstance(error, LinkError) and error.status == STILL_ONLINE:
            self._wake.wait(STILL_ONLINE_SECONDS)
            return
        self._wake.wait(self._wait_s * random.uniform(0.5, 1.0))
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_SECONDS)

    def _held_back(self) -> str | None:
        return self._parts.membership.why_barred() or why_not(self._parts.policy)

    def _watch(self) -> None:
        """Ends what goes on when the conditions do."""
        while not self._stopping.wait(LOOK_SECONDS):
            if self._cut.is_set() and self._is_waiting:
                self._sockets.shut()  # it had begun just before
            if not self._is_serving or self._cut.is_set():
                continue
            if (why := why_not(self._parts.during)) is not None:
                self._parts.diary.why = why
                self._end_connection(why)

    def _serve(self) -> None:
        """Log in, and answer what comes, until the conditions end or the connection does."""
        parts = self._parts
        own, tls = parts.membership.enrolled(), parts.server.tls()
        max_bytes = max_payload_bytes(own)
        connection = FleetConnection(parts.server.url, tls, own.login_key, max_bytes, self._sockets)
        parts.diary.why = "it is connecting to its server"
        try:
            self._open(connection)
            parts.means.interruption.allow()
            self._is_serving = True
            parts.diary.tell("device.connected")
            self._note_connected()
            while self._goes_on() and max_payload_bytes(own) == max_bytes:
                received = self._pull(connection)
                if received is not None and self._goes_on() and not self._answer(connection, received):
                    return
        finally:
            self._is_serving = self._is_connected = False
            try:
                connection.close()
            finally:
                parts.membership.leave_rounds(parts.means)

    def _open(self, connection: FleetConnection) -> None:
        self._is_waiting = True
        try:
            connection.open()
        finally:
            self._is_waiting = False

    def _note_connected(self) -> None:
        if self._is_connected:
            return
        self._is_connected, self._lost_at = True, None
        self._parts.diary.went_well(About.LINK)
        self._parts.diary.why = self._answers.why

    def _goes_on(self) -> bool:
        return not (self._cut.is_set() or self._stopping.is_set())

    def _pull(self, connection: FleetConnection) -> Received | None:
        """The next message, if one came. A connection that breaks is taken up again, and so is the round over it.

        Raises LinkError where the server refuses, or was away for so long that this device has to log in anew.
        """
        received = None
        self._is_waiting = True
        try:
            received = connection.pull() if self._goes_on() else None
            self._wait_s = FIRST_WAIT_SECONDS
        except LinkError as error:
            now = time.monotonic()
            self._is_connected, self._lost_at = False, now if self._lost_at is None else self._lost_at
            is_refused = error.status is not None and error.status < 500
            if is_refused or now - self._lost_at > MISSED_SECONDS or not self._goes_on():
                raise
            self._rest_after(error)
            return None
        except FedMiniError as error:  # a message that can't be used: the next may be better
            self._parts.diary.note(error, About.OFFER)
        finally:
            self._is_waiting = False
        self._note_connected()
        return received

    def _answer(self, connection: FleetConnection, received: Received) -> bool:
        """Answer a message; whether the next may come."""
        answer = self._answers.to(received)
        if answer is None:
            return True
        is_refusal = answer.kind == "refusal"
        # A refusal says nothing of the device, and lets the others' round go on at once, also where this one has to end.
        if self._goes_on() or is_refusal:
            self._send(connection, received, answer)
        return self._goes_on() and not (is_refusal and self._held_back() is not None)

    def _send(self, connection: FleetConnection, received: Received, answer: Envelope) -> None:
        try:
            connection.reply(received, answer)
        except LinkError as error:
            if error.status is None or error.status in (401, 502, 503, 504):
                raise
            self._parts.diary.tell("device.late", status=error.status)  # the server's round or run is over


def why_not(policy: Policy) -> str | None:
    """What holds training back; also an app's conditions that fail with what is no Exception."""
    try:
        return policy.why_not()
    except BaseException as error:
        return f"the app's conditions failed: {type(error).__name__}"


def max_payload_bytes(own: Enrolment) -> int:
    """The largest message that a device takes: an offer, or a request of a run that it agreed to."""
    models = (4 * num_parameters(manifest.template) for manifest in own.manifests.values())
    return max([offers.MAX_BYTES, *map(wire.max_request_bytes, models)])
