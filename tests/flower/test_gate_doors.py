"""What a gate lets in: nine calls of known devices from the network, everything with the token on loopback."""

import socket
import ssl
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from flwr.app.metadata import Metadata
from flwr.proto import control_pb2, fleet_pb2, runtime_pb2
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from gate_process import GateProcess, running_gate
from wire import PROTOBUF, Device, Server, deflated, raw, status, stub_run, tls_connection, trust

from fedmini.errors import ConfigError
from fedmini.flower import allow_list, gate, loopback_token


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GateProcess]:
    with running_gate(tmp_path_factory.mktemp("gate")) as running:
        yield running


class WithToken:
    """Shows the loopback token through Flower's own client."""

    def __init__(self, token: str) -> None:
        self.token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(loopback_token.headers(self.token))
        return call_next(context)


def post(target: str, *headers: str, version: str = "1.1", method: str = "POST", host: str = "Host: gate") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", host, "Content-Type: application/protobuf", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


PULL = "/v1/fleet/pull-messages"
EMPTY = "Content-Length: 0"


def test_code_sent_from_outside_is_refused_with_and_without_the_token(door: GateProcess):
    for interceptors in ([], [WithToken(door.token)]):
        address = f"127.0.0.1:{door.port}"
        with ControlHttpClient.from_server_address(address, False, door.ca.read_bytes(), interceptors) as control:
            with pytest.raises(httpx.HTTPStatusError) as refused:
                control.StartRun(stub_run())
            assert refused.value.response.status_code == 404
            with pytest.raises(httpx.HTTPStatusError):
                control.ListNodes(control_pb2.ListNodesRequest())
    with ControlHttpClient.from_server_address(
        f"127.0.0.1:{door.local_port}", True, None, [WithToken(door.token)]
    ) as local:
        assert not local.ListRuns(control_pb2.ListRunsRequest()).run_dict


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-messages",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
        "*",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet/pull-messages/../../control/start-run",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet//pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet%2Fpull-messages",
        "/v1/fleet/pull%2Dmessages",
        "/V1/FLEET/PULL-MESSAGES",
        "/v1/fleet/Pull-Messages",
        "/v1/fleet/pull-messages;/v1/control/start-run",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages?/../../control/start-run",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages%3f",
        "http://127.0.0.1/v1/control/start-run",
        "http://127.0.0.1/v1/fleet/pull-messages",
        "https://gate/v1/runtime/acquire-task",
    ],
)
def test_any_other_path_is_refused_however_it_is_spelt(door: GateProcess, target: str):
    token = f"{loopback_token.HEADER}: {door.token}"
    assert status(raw(door, post(target, EMPTY, token))) == 404


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "post", "CONNECT"])
def test_only_posts_are_let_in(door: GateProcess, method: str):
    assert status(raw(door, post(PULL, EMPTY, method=method))) in (400, 404)


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (post(PULL, EMPTY, version="1.0"), 404),
        (post(PULL, EMPTY, "Connection: Upgrade", "Upgrade: websocket"), 404),
        (post(PULL, EMPTY, "Host: other"), 400),
        (post(PULL, "Transfer-Encoding: chunked"), 413),
        (post(PULL, "Transfer-Encoding: chunked", "Content-Length: 5"), 413),
        (post(PULL), 413),
        (post(PULL, f"Content-Length: {2**31}"), 413),
        (post(PULL, "Content-Length: 8388609"), 413),
        (post(PULL, "Content-Length: 1", "Content-Length: 2"), 400),
        (post(PULL, "Content-Length: -1"), 400),
        (post(PULL, f"X-Long: {'a' * 9000}", EMPTY), 431),
        (post(PULL, *(f"X-{number}: 1" for number in range(40)), EMPTY), 431),
        (post(PULL, f"X-Long: {'a' * 200_000}", EMPTY), 400),
        (post(PULL, EMPTY), 401),
        (b"nonsense\r\n\r\n", 400),
    ],
)
def test_what_has_no_good_form_size_or_signature_is_refused(door: GateProcess, request_bytes: bytes, expected: int):
    answer = raw(door, request_bytes)
    assert status(answer) in (expected, 431 if expected == 400 else expected)
    assert b"connection: close" in answer.lower()


def test_a_message_of_two_gigabytes_is_refused_before_it_is_read(door: GateProcess):
    assert door.process is not None
    before = resident_bytes(door.process.pid)
    with tls_connection(door) as connection:
        connection.sendall(post(PULL, f"Content-Length: {2**31}"))
        assert status(connection.recv(65536)) == 413
        sent, chunk = 0, bytes(2**20)
        with pytest.raises(OSError):
            while sent < 2**36:
                connection.sendall(chunk)
                sent += len(chunk)
    assert resident_bytes(door.process.pid) - before < 100 * 2**20


def test_an_object_of_five_mebibytes_comes_through(door: GateProcess):
    device, server = Device(door).activate(), Server(door)
    request = PushObjectRequest(
        node=device.node, run_id=server.run_id, object_id="x", object_content=bytes(5 * 2**20), session_id="none"
    )
    answer = device.call("push-object", request)
    assert answer.status_code == 200 and not PushObjectResponse.FromString(answer.content).stored  # nobody wants it


def test_what_is_refused_never_reaches_the_app_behind():
    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("it was reached")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/control/start-run",
        "raw_path": b"/v1/fleet/pull-messages",
        "query_string": b"",
        "http_version": "1.1",
        "root_path": "",
        "headers": [(b"host", b"gate"), (b"content-length", b"0")],
    }
    assert allow_list.refusal(scope, 10) == 404
    assert allow_list.refusal({**scope, "path": "/v1/fleet/pull-messages"}, 10) is None
    assert allow_list.refusal({**scope, "path": "/v1/fleet/pull-messages", "root_path": "/x"}, 10) == 404


@pytest.mark.parametrize("path", ["control/list-nodes", "runtime/acquire-task", "fleet/pull-messages"])
def test_loopback_answers_nobody_without_the_token(door: GateProcess, path: str):
    with httpx.Client(base_url=f"http://127.0.0.1:{door.local_port}") as client:
        for headers in ({}, loopback_token.headers("x" * 64), {"authorization": f"Bearer {door.token}"}):
            assert client.post(f"/v1/{path}", headers={**PROTOBUF, **headers}).status_code == 401
        twice = [*PROTOBUF.items(), (loopback_token.HEADER, door.token), (loopback_token.HEADER, door.token)]
        assert client.post(f"/v1/{path}", headers=twice).status_code == 401
        assert client.get("/docs").status_code == 401


def test_loopback_answers_who_shows_the_token(door: GateProcess):
    device = Device(door).register()
    server = Server(door)
    server.call("control/list-nodes", control_pb2.ListNodesRequest())
    server.call("runtime/get-nodes", runtime_pb2.GetNodesRequest())
    server.headers.update(device.signed())
    server.call(
        "fleet/activate-node", fleet_pb2.ActivateNodeRequest(public_key=device.public_key, heartbeat_interval=30)
    )


def test_only_a_known_device_that_signed_just_now_is_heard(door: GateProcess):
    known, unknown = Device(door).activate(), Device(door)
    unknown.node_id = known.node_id
    request = SendNodeHeartbeatRequest(node=known.node, heartbeat_interval=30).SerializeToString()

    def answer(headers: dict[str, str]) -> int:
        answered = known.client.post("/v1/fleet/send-node-heartbeat", content=request, headers={**PROTOBUF, **headers})
        return answered.status_code

    good = known.signed()
    assert answer(good) == 200
    assert answer({}) == 401
    assert answer(unknown.signed()) == 401
    assert answer({**good, "flwr-public-key": unknown.signed()["flwr-public-key"]}) == 401
    assert answer({**good, "flwr-signature": unknown.signed()["flwr-signature"]}) == 401
    assert answer(known.signed(age=timedelta(seconds=320))) == 401
    assert answer(known.signed(age=timedelta(seconds=-60))) == 401
    assert answer({**good, "flwr-timestamp": "2030-01-01"}) == 401
    assert answer({**good, "flwr-public-key": "%%%"}) == 401


def test_a_device_speaks_for_itself_only(door: GateProcess):
    server, one, other = Server(door), Device(door).activate(), Device(door).activate()
    message_id = server.send(other)
    as_other = fleet_pb2.PullMessagesRequest(node=other.node)
    assert one.call("pull-messages", as_other).status_code == 401
    found = other.pull()
    assert found.messages_list[0].metadata.message_id == message_id
    assert one.reply(found, source=other.node_id).status_code == 403


def test_a_device_can_send_no_message_in_the_servers_name(door: GateProcess):
    server, one, other = Server(door), Device(door).activate(), Device(door).activate()
    forged = Metadata(
        run_id=server.run_id,
        message_id="",
        src_node_id=1,
        dst_node_id=other.node_id,
        reply_to_message_id="",
        group_id="",
        created_at=1e9,
        ttl=3e9,
        message_type="train",
    )
    assert one.push(deflated(forged)).status_code == 403
    message_id = server.send(other)
    assert [message.metadata.message_id for message in other.pull().messages_list] == [message_id]


def test_old_tls_and_no_tls_are_refused(door: GateProcess):
    old = trust(door)
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with (
        socket.create_connection(("127.0.0.1", door.port), timeout=20) as plain,
        pytest.raises((ssl.SSLError, ConnectionError), match=r"EOF|alert protocol version|reset"),
    ):
        old.wrap_socket(plain, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as plain:
        plain.sendall(post(PULL, EMPTY))
        assert not plain.recv(1024).startswith(b"HTTP")


def test_without_a_certificate_a_gate_stays_on_loopback(tmp_path: Path):
    def config(host: str) -> gate.GateConfig:
        return gate.GateConfig(host, 0, 0, tmp_path / "db", None, None, "x" * 64)

    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="loopback"):
            config(host)
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert config(host).host == host


def resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
