"""The two sides of a gate for its tests: a device that signs and a server that shows the token, call by call."""

import base64
import hashlib
import socket
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import httpx
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.cli.build import build_fab_from_files
from flwr.proto import control_pb2, fleet_pb2, message_pb2, runtime_pb2
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import Node
from gate_process import GateProcess

from fedmini.flower import loopback_token, registry
from fedmini.flower.objects import Deflated

PROTOBUF = {"content-type": "application/protobuf"}
STUB = {
    "pyproject.toml": b'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n[project]\nname = "stub"\n'
    b'version = "1.0.0"\ndescription = "stub"\nlicense = "Apache-2.0"\ndependencies = []\n[tool.flwr.app]\npublisher = "stub"\n'
    b'[tool.flwr.app.components]\nserverapp = "stub:app"\nclientapp = "stub:app"\n',
    "stub.py": b"# nothing\n",
}


def trust(gate: GateProcess) -> ssl.SSLContext:
    """TLS that trusts the gate's throwaway authority only."""
    return ssl.create_default_context(cafile=str(gate.ca))


def stub_run() -> control_pb2.StartRunRequest:
    """Asks for a run of code."""
    fab, _ = build_fab_from_files(STUB)
    return control_pb2.StartRunRequest(fab=Fab(hash_str=hashlib.sha256(fab).hexdigest(), content=fab))


@dataclass
class Device:
    """A device's key, and its calls on the public port."""

    gate: GateProcess
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    node_id: int = 0

    def __post_init__(self) -> None:
        self.client = self.connect()

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def node(self) -> Node:
        return Node(node_id=self.node_id)

    def connect(self) -> httpx.Client:
        return httpx.Client(base_url=f"https://127.0.0.1:{self.gate.port}", verify=trust(self.gate), timeout=40)

    def register(self) -> "Device":
        self.node_id = registry.register_node(self.gate.local_port, self.gate.token, self.public_key)
        return self

    def activate(self) -> "Device":
        """Register and log in."""
        self.register()
        request = fleet_pb2.ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=30)
        answer = self.call("activate-node", request)
        assert answer.status_code == 200, answer
        return self

    def signed(self, age: timedelta = timedelta(0)) -> dict[str, str]:
        timestamp = (datetime.now(UTC) - age).isoformat()
        signature = self.key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(self.public_key).decode(),
            "flwr-timestamp": timestamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }

    def call(self, name: str, request: object, client: httpx.Client | None = None) -> httpx.Response:
        return (client or self.client).post(
            f"/v1/fleet/{name}",
            content=request.SerializeToString(),  # type: ignore[attr-defined]
            headers={**PROTOBUF, **self.signed()},
        )

    def poll(self, client: httpx.Client | None = None) -> httpx.Response:
        return self.call("pull-messages", fleet_pb2.PullMessagesRequest(node=self.node), client)

    def pull(self, client: httpx.Client | None = None) -> fleet_pb2.PullMessagesResponse:
        answer = self.poll(client)
        assert answer.status_code == 200, answer
        return fleet_pb2.PullMessagesResponse.FromString(answer.content)

    def confirm(self, found: fleet_pb2.PullMessagesResponse) -> None:
        metadata = found.messages_list[0].metadata
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=self.node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        assert self.call("confirm-message-received", request).status_code == 200

    def reply(self, found: fleet_pb2.PullMessagesResponse, source: int | None = None) -> httpx.Response:
        """Answer a message, with its one object; `source` is whom it claims to be from."""
        asked = found.messages_list[0].metadata
        metadata = Metadata(
            run_id=asked.run_id,
            message_id="",
            src_node_id=self.node_id if source is None else source,
            dst_node_id=1,
            reply_to_message_id=asked.message_id,
            group_id="",
            created_at=datetime.now(UTC).timestamp(),
            ttl=10.0,
            message_type=asked.message_type,
        )
        return self.push(deflated(metadata))

    def push(self, message: Deflated) -> httpx.Response:
        request = fleet_pb2.PushMessagesRequest(
            node=self.node, messages_list=[message.head], message_object_trees=[message.tree]
        )
        answer = self.call("push-messages", request)
        if answer.status_code != 200:
            return answer
        session = fleet_pb2.PushMessagesResponse.FromString(answer.content)
        for name in session.objects_to_push:
            one = message_pb2.PushObjectRequest(
                node=self.node,
                run_id=message.head.metadata.run_id,
                object_id=name,
                object_content=message.objects[name],
                session_id=session.session_id,
            )
            assert self.call("push-object", one).status_code == 200
        return answer


class Server:
    """The server's side on loopback, with a run that goes on."""

    def __init__(self, gate: GateProcess) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{gate.local_port}", timeout=40)
        self.headers = {**PROTOBUF, **loopback_token.headers(gate.token)}
        self.run_id = control_pb2.StartRunResponse.FromString(self.call("control/start-run", stub_run())).run_id
        wanted = runtime_pb2.AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
        task = None
        while task is None or task.task.run_id != self.run_id:
            task = runtime_pb2.AcquireTaskResponse.FromString(self.call("runtime/acquire-task", wanted))
        self.headers["flwr-task-token"] = task.token
        self.call("runtime/pull-task-input", runtime_pb2.PullTaskInputRequest())

    def call(self, path: str, request: object) -> bytes:
        content = request.SerializeToString()  # type: ignore[attr-defined]
        answer = self.client.post(f"/v1/{path}", content=content, headers=self.headers)
        assert answer.status_code == 200, (path, answer)
        return answer.content

    def send(self, device: Device) -> str:
        """Push one message with its object; its id."""
        message = deflated(
            Metadata(
                run_id=self.run_id,
                message_id="",
                src_node_id=1,
                dst_node_id=device.node_id,
                reply_to_message_id="",
                group_id="",
                created_at=datetime.now(UTC).timestamp(),
                ttl=60.0,
                message_type="train",
            )
        )
        request = runtime_pb2.PushAppMessagesRequest(messages_list=[message.head], message_object_trees=[message.tree])
        answer = runtime_pb2.PushAppMessagesResponse.FromString(self.call("runtime/push-messages", request))
        for name in answer.objects_to_push:
            one = message_pb2.PushObjectRequest(
                node=Node(node_id=1),
                run_id=self.run_id,
                object_id=name,
                object_content=message.objects[name],
                session_id=answer.session_id,
            )
            self.call("runtime/push-object", one)
        return answer.message_ids[0]

    def pull(self, message_id: str) -> runtime_pb2.PullAppMessagesResponse:
        request = runtime_pb2.PullAppMessagesRequest(message_ids=[message_id])
        return runtime_pb2.PullAppMessagesResponse.FromString(self.call("runtime/pull-messages", request))


def deflated(metadata: Metadata) -> Deflated:
    """A small message, ready to travel."""
    content = RecordDict({"config": ConfigRecord({"number": 1})})
    message: Message = make_message(metadata=metadata, content=content)
    return Deflated(message)


def tls_connection(gate: GateProcess) -> ssl.SSLSocket:
    """A connection to the public port on which nothing was said yet."""
    plain = socket.create_connection(("127.0.0.1", gate.port), timeout=20)
    return trust(gate).wrap_socket(plain, server_hostname="127.0.0.1")


def hold_a_poll(device: Device) -> ssl.SSLSocket:
    """A poll on a connection of its own that got no answer for half a second: it is held."""
    connection = tls_connection(device.gate)
    body = fleet_pb2.PullMessagesRequest(node=device.node).SerializeToString()
    headers = {"Host": "gate", **PROTOBUF, **device.signed(), "Content-Length": str(len(body))}
    lines = ["POST /v1/fleet/pull-messages HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    connection.settimeout(0.5)
    try:
        answer = connection.recv(65536)
    except TimeoutError:
        connection.settimeout(20)
        return connection
    raise AssertionError(f"the poll was answered at once: {answer!r}")


def raw(gate: GateProcess, sent: bytes) -> bytes:
    """What the public port answers to these very bytes, until it closes or the headers end."""
    with tls_connection(gate) as connection:
        connection.sendall(sent)
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            chunk = connection.recv(65536)
            if not chunk:
                break
            answer += chunk
        return answer


def status(answer: bytes) -> int:
    """The HTTP status of a raw answer; 0 where there was none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0
