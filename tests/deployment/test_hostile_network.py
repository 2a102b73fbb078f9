"""A whole deployment under attack from its network, by strangers and by devices that it has enrolled: a run ends as it would.

One deployment serves a run that is left alone, then one that is attacked from its first moment to its last. Each test
looks at what one attack came to.
"""

import contextlib
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree

from fedmini import config as configuration
from fedmini import enrolment, operator_keys, server_folder
from fedmini import offer as offers
from fedmini.errors import LinkError
from fedmini.flower import allow_list, objects, replies
from fedmini.flower.codec import Envelope
from fedmini.flower.fleet import FleetConnection, Received, tls_context
from fedmini.member import ForThisProcess, Member
from fedmini.secagg import device_keys
from fedmini.secagg.checks import Agreed
from fedmini.secagg.messages import Stage
from fedmini.secagg.trust import Identity, Trust
from fedmini.types import Adapter, Contribution, TrainTask
from tests.deployment import chaos
from tests.deployment.deployed import TIMING, Deployment, Logged, a_config, deployment, wait_until

pytestmark = pytest.mark.timeout(600)  # the first test brings up the deployment, and waits for both runs

NUM_SLOW = 200
NUM_OBJECTS = 20_000  # names alone, 1.4 MB; SuperLink would serve nobody for some twenty seconds
NUM_ROUNDS = 3
MAX_PAYLOAD_BYTES = 2**24
# Five are asked and four have to stay, so that a round can do without the fifth: the one that attacks from inside.
ROUNDS = {"num_rounds": NUM_ROUNDS, "cohort_size": 4, "over_selection": 1.25, "min_survivors": 4, "spare_attempts": 4}
NOT_THEIRS = "an answer is not signed by the device that was asked, or answers another message"


@dataclass
class Attacker:
    """A device that the operator has enrolled, and that does as a test says. It waits for messages in a thread."""

    name: str
    identity: Identity
    trust: Trust
    connection: FleetConnection
    behave: Callable[["Attacker", Received], None]
    seen: dict[str, tuple[Received, Envelope]] = field(default_factory=dict)  # what it has answered well, by stage
    statuses: list[int | None] = field(default_factory=list)  # with what it was refused, None where it was not
    refused: LinkError | None = None  # what ended it
    member: Member | None = None

    def start(self) -> None:
        self.connection.open()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while self.refused is None:
            try:
                received = self.connection.pull()
                if received is not None:
                    self.behave(self, received)
            except LinkError as error:
                if error.status in (401, None):
                    self.refused = error

    def answer(self, received: Received, envelope: Envelope) -> None:
        """Answer as an honest device signs it, and remember that."""
        signed = replies.sign(self.identity, received.message_id, envelope)
        self.seen[str(received.envelope.fields.get("stage", received.envelope.kind))] = (received, signed)
        self.connection.reply(received, signed)


@dataclass
class Evidence:
    """What the attacks came to."""

    deployed: Deployment
    expected: Adapter
    server: Logged  # of the run that was attacked
    forger: Attacker
    replayer: Attacker
    announcer: Attacker  # of objects without number
    seconds_alone: list[float]
    stranger: dict[str, int | None]  # the status that an unenrolled key got, by call
    upload: tuple[bytes, int]  # what a 2 GB message got, and how much the gate's memory grew, in bytes
    others_reply: int | None  # the status of a reply in another device's name
    cut_off_s: float  # from the revocation to the end of the connection that stood open

    def logged(self, event: str, device: str) -> list[str]:
        return [
            str(one.get("why")) for one in self.server.events if (one["event"], one.get("device")) == (event, device)
        ]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    folder = tmp_path_factory.mktemp("hostile")
    config, rows = a_config(folder, changes={"rounds": ROUNDS}), chaos.marked_rows()
    expected = chaos.simulated_adapter(config, folder, rows)
    with deployment(folder, config, rows, num_runs=2) as deployed, contextlib.ExitStack() as attack:
        wait_at_most(deployed, 3.0)
        alone = deployed.start_server()
        deployed.start_devices()
        alone.wait_for("run.finished", since=alone.wait_for("round.committed", round=1))
        assert alone.process.wait(60) == 0
        seconds_alone = round_seconds(alone)

        attackers = {name: enrolled(deployed, name) for name in BEHAVIOUR}
        wait_at_most(deployed, 25.0)  # longer than a device that was refused rests
        server = deployed.start_server("tiny-2")
        server.wait_for("run.began")
        attack.enter_context(slow_connections(deployed, NUM_SLOW))
        for attacker in attackers.values():
            attack.callback(attacker.connection.close)
            wait_until(lambda one=attacker: is_let_in(one), f"{attacker.name} to be let in")
        forger, replayer = attackers["forger"], attackers["replayer"]
        stranger = statuses_of_a_stranger(deployed)
        upload = send_two_gigabytes(deployed, forger)
        forged = server.wait_for("device.not_ready", device="forger", why=NOT_THEIRS)
        server.wait_for("device.not_ready", since=forged, device="forger", why=NOT_THEIRS)
        captured = forger.seen["ADVERTISE"]
        others_reply = status_of(lambda: replayer.connection.reply(*captured))
        status_of(lambda: forger.connection.reply(*captured))  # the very message once more: it changes nothing
        replayer.seen["captured"] = captured
        began = time.monotonic()
        revoke(deployed, "forger")
        server.wait_for("device.cut_off")
        wait_until(lambda: forger.refused is not None, "the revoked device to be cut off")
        cut_off_s = time.monotonic() - began
        server.wait_for("run.finished")
        assert server.process.wait(60) == 0, server.tail()
        announcer = attackers["many-objects"]
        yield Evidence(
            deployed,
            expected,
            server,
            forger,
            replayer,
            announcer,
            seconds_alone,
            stranger,
            upload,
            others_reply,
            cut_off_s,
        )


def test_a_run_under_attack_ends_with_the_very_adapter_of_one_that_is_left_alone(attacked: Evidence) -> None:
    committed = [one for one in attacked.server.events if one["event"] == "round.committed"]
    assert [(one["round"], one["survivors"]) for one in committed] == [
        (number, 4) for number in range(1, NUM_ROUNDS + 1)
    ]
    chaos.check_adapter(attacked.deployed, attacked.expected)


def test_every_release_under_attack_was_paid_for(attacked: Evidence) -> None:
    chaos.check_paid_for(attacked.deployed)


def test_a_key_that_is_not_enrolled_is_refused_at_every_call(attacked: Evidence) -> None:
    assert attacked.stranger == dict.fromkeys(allow_list.FLEET_CALLS, 401)


def test_a_reply_that_another_key_signed_is_refused_and_logged(attacked: Evidence) -> None:
    assert NOT_THEIRS in attacked.logged("device.not_ready", "forger")


def test_a_captured_reply_is_good_for_nobody_at_any_later_message(attacked: Evidence) -> None:
    assert attacked.logged("device.not_ready", "forger").count(NOT_THEIRS) == 2  # the forged one, and its own replayed
    assert NOT_THEIRS in attacked.logged("reply.refused", "replayer")
    assert attacked.others_reply == 403


def test_a_revoked_device_is_cut_off_and_the_others_go_on(attacked: Evidence) -> None:
    print(f"cut off {attacked.cut_off_s:.1f} s after the revocation")
    assert attacked.forger.refused is not None and attacked.forger.refused.status == 401
    later = [one for one in attacked.server.events if one["event"] == "round.keyed" and one["round"] == NUM_ROUNDS]
    assert later[-1]["devices"] == 4


def test_a_message_of_two_gigabytes_takes_no_memory(attacked: Evidence) -> None:
    answer, grown = attacked.upload
    print(f"the gate's memory grew by {grown / 2**20:.0f} MiB")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert grown < 100 * 2**20


@pytest.mark.parametrize(
    ("name", "why"), [("many-objects", "a message of 20 objects came"), ("large-objects", "a message of more than")]
)
def test_a_reply_with_too_many_or_too_large_objects_costs_its_sender_only(
    attacked: Evidence, name: str, why: str
) -> None:
    waiting = [one["missing"] for one in attacked.server.events if one["event"] == "round.waiting"]
    assert any(f"{name} (no answer came ({why}" in missing for missing in waiting), waiting
    assert not [one for one in attacked.server.events if one["event"] == "device.ready" and one["device"] == name]


def test_a_reply_that_names_twenty_thousand_objects_is_refused_before_anybody_waits_for_it(
    attacked: Evidence,
) -> None:
    assert attacked.announcer.statuses[:2] == [413, None]


def test_two_hundred_slow_connections_slow_no_round_down(attacked: Evidence) -> None:
    alone, beside = statistics.median(attacked.seconds_alone), statistics.median(round_seconds(attacked.server))
    print(f"a round alone {alone:.2f} s, under attack and beside {NUM_SLOW} slow connections {beside:.2f} s")
    assert beside < 4 * alone + 5.0  # about as long; the rest is for a busy machine


def test_no_log_and_no_file_holds_a_secret_or_a_traceback(attacked: Evidence) -> None:
    chaos.check_nothing_leaked(attacked.deployed)


def be_forger(attacker: Attacker, received: Received) -> None:
    """Ready at once, then: signed by another key; replayed one stage later; and honest as far as keys."""
    asked = received.envelope
    if asked.kind == "offer":
        offer = offers.read(asked.payload)
        agreed = Agreed(attacker.name, offer.signed.manifest, attacker.trust)
        attacker.member = attacker.member or Member(attacker.identity, ForThisProcess(agreed), trains_nothing, None)
        return attacker.answer(received, Envelope("ready"))
    assert attacker.member is not None
    answer = Envelope("answer", {}, attacker.member.answer(asked.payload))
    if "forged" not in attacker.seen:
        stranger = Identity(Ed25519PrivateKey.generate(), attacker.identity.certificate)
        attacker.seen["forged"] = (received, replies.sign(stranger, received.message_id, answer))
        return attacker.connection.reply(*attacker.seen["forged"])
    if asked.fields["stage"] == Stage.SHARE.name:
        return attacker.connection.reply(received, attacker.seen["ADVERTISE"][1])
    attacker.answer(received, answer)


def trains_nothing(task: TrainTask) -> Contribution:
    raise AssertionError("it leaves before it is asked for a contribution")


def be_replayer(attacker: Attacker, received: Received) -> None:
    """Never ready; once it has another device's signed reply, it sends that as its own."""
    if "captured" in attacker.seen:
        attacker.connection.reply(received, attacker.seen["captured"][1])
    else:
        attacker.answer(received, Envelope("refusal", {"code": "later", "reason": "not yet"}))


def send_many_objects(attacker: Attacker, received: Received) -> None:
    """Announce far more objects than the gate lets anybody name, then fewer, but more than an answer can have."""
    records = {f"{number}": ConfigRecord({"number": number}) for number in range(18)}
    bomb = objects.Deflated(Message(RecordDict(records), reply_to=received.message))
    many = [ObjectTree(object_id=f"{number:064x}") for number in range(NUM_OBJECTS)]
    attacker.statuses.append(announce(attacker, bomb, ObjectTree(object_id=bomb.tree.object_id, children=many)))
    attacker.statuses.append(announce(attacker, bomb, bomb.tree))


def announce(attacker: Attacker, message: objects.Deflated, tree: ObjectTree) -> int | None:
    request = PushMessagesRequest(
        node=attacker.connection._node, messages_list=[message.head], message_object_trees=[tree]
    )
    path = "/v1/fleet/push-messages"
    return status_of(lambda: attacker.connection._calls.call(path, request, PushMessagesResponse))


def send_large_objects(attacker: Attacker, received: Received) -> None:
    attacker.answer(received, Envelope("ready", {}, bytes(2**20)))


BEHAVIOUR = {
    "forger": be_forger,
    "replayer": be_replayer,
    "many-objects": send_many_objects,
    "large-objects": send_large_objects,
}


def enrolled(deployed: Deployment, name: str) -> Attacker:
    """A device that the operator trusts like any other."""
    place = deployed.folder / name
    operator_keys.create_device(place)
    keys = device_keys.read((place / "device.pub").read_bytes())
    with operator_keys.opened(deployed.folder / "operator", lambda: b"") as operator:
        certificate, operator_key = operator.certify(keys.device_key, name), operator.public_key
    server_folder.opened(deployed.server_folder).enroll(keys, certificate)
    enrolment.enrol(place, certificate, operator_key)
    with enrolment.opened(place) as own:
        connection = FleetConnection(deployed.address, tls_of(deployed), own.login_key, MAX_PAYLOAD_BYTES)
        return Attacker(name, own.identity, Trust(operator_key), connection, BEHAVIOUR[name])


def revoke(deployed: Deployment, name: str) -> None:
    """What an operator does, and whoever runs the server after it."""
    with operator_keys.opened(deployed.folder / "operator", lambda: b"") as operator:
        revocations = operator.revoke(name)
    server_folder.opened(deployed.server_folder).follow(revocations=revocations)


def wait_at_most(deployed: Deployment, wait_s: float) -> None:
    """For how long the server waits for a whole cohort, from its next start."""
    values = {
        "server": {"host": "127.0.0.1", "listen": "127.0.0.1", "port": deployed.port, "log_format": "json"},
        "timing": {**TIMING, "wait_s": wait_s},
    }
    content = configuration.dump_server_config(configuration.parse_server_config(values))
    (deployed.server_folder / "server.toml").write_text(content)


def tls_of(deployed: Deployment) -> ssl.SSLContext:
    return tls_context((deployed.server_folder / "tls" / "ca.crt").read_bytes())


def is_let_in(attacker: Attacker) -> bool:
    """Whether a device that was just enrolled has connected."""
    try:
        attacker.start()
    except LinkError:
        return False
    return True


def round_seconds(server: Logged) -> list[float]:
    return [one["seconds"] for one in server.events if one["event"] == "round.committed"]


def status_of(call: Callable[[], object]) -> int | None:
    """With what status a call is refused; None where it is not."""
    try:
        call()
    except LinkError as error:
        return error.status
    return None


def statuses_of_a_stranger(deployed: Deployment) -> dict[str, int | None]:
    """What a key that nobody enrolled is told, at each call."""
    stranger = FleetConnection(deployed.address, tls_of(deployed), device_keys.draw_login(), MAX_PAYLOAD_BYTES)

    def ask(call: str) -> int | None:
        path = f"/v1/fleet/{call}"
        return status_of(lambda: stranger._calls.call(path, PullMessagesRequest(), PullMessagesResponse))

    found = {call: ask(call) for call in allow_list.FLEET_CALLS}
    stranger.close()
    return found


def send_two_gigabytes(deployed: Deployment, sender: Attacker) -> tuple[bytes, int]:
    """What the gate answers to a message of that size, signed as it should be, and how much its memory grows meanwhile."""
    before = resident_bytes(deployed.pid_of("gate"))
    headers = {"Host": "gate", "Content-Length": str(2**31), **sender.connection._signed()}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    answer = b""
    with tls_connection(deployed) as connection:
        connection.sendall(f"POST /v1/fleet/push-object HTTP/1.1\r\n{head}\r\n".encode())
        with contextlib.suppress(OSError):  # it is cut off
            answer = connection.recv(4096)
            for _ in range(2**11):
                connection.sendall(bytes(2**20))
    return answer, resident_bytes(deployed.pid_of("gate")) - before


def tls_connection(deployed: Deployment) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", deployed.port), timeout=20)
    return tls_of(deployed).wrap_socket(plain, server_hostname="127.0.0.1")


@contextlib.contextmanager
def slow_connections(deployed: Deployment, number: int) -> Iterator[None]:
    """So many connections that never end what they begin, all the time: what is cut off is opened anew."""
    ended = threading.Event()
    kept: list[socket.socket] = []

    def keep_up() -> None:
        while not ended.wait(0.02):
            kept[:] = [one for one in kept if is_open(one)]
            if len(kept) < number:
                with contextlib.suppress(OSError):
                    kept.append(open_one(len(kept)))

    def open_one(index: int) -> socket.socket:
        if index % 2:
            return socket.create_connection(("127.0.0.1", deployed.port), timeout=20)
        connection = tls_connection(deployed)
        connection.sendall(b"POST /v1/fleet/pull-mess")
        return connection

    thread = threading.Thread(target=keep_up)
    thread.start()
    try:
        wait_until(lambda: len(kept) == number, f"{number} slow connections")
        yield
    finally:
        ended.set()
        thread.join()
        for one in kept:
            one.close()


def is_open(connection: socket.socket) -> bool:
    """Whether the other end has not cut it off; closes it else."""
    connection.settimeout(0.0)
    try:
        if connection.recv(1):
            return True
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        pass
    connection.close()
    return False


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024
