"""Connections that take their time: cut off, and in nobody's way."""

import contextlib
import socket
import ssl
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from gate_process import running_gate
from wire import PROTOBUF, Device, Server, hold_a_poll, tls_connection

from fedmini.flower import allow_list

NUM_SLOW = 200
HALF_A_LINE = b"POST /v1/fleet/pull-mess"


def test_slow_connections_are_cut_off_and_a_held_poll_is_not(tmp_path: Path):
    with running_gate(tmp_path, patience_s=1.0) as door:
        device = Device(door).activate()
        with hold_a_poll(device) as held:
            for slow in (silent, silent_after_the_handshake, half_a_line, a_second_request, a_trickling_body):
                with slow(device) as connection:
                    assert is_cut_off(connection), slow.__name__
            Server(door).send(device)
            assert b"200 OK" in held.recv(65536)


def test_two_hundred_slow_connections_stop_no_round(tmp_path: Path):
    with running_gate(tmp_path) as door, contextlib.ExitStack() as attack:
        device, slow_one, server = Device(door).activate(), Device(door).activate(), Server(door)
        seconds_of_a_round(server, device)
        alone = statistics.median(seconds_of_a_round(server, device) for _ in range(5))
        kinds = (silent, silent_after_the_handshake, half_a_line, a_trickling_body)
        for number in range(NUM_SLOW):
            attack.enter_context(kinds[number % len(kinds)](slow_one))
        attacked = statistics.median(seconds_of_a_round(server, device) for _ in range(5))
        print(f"a round alone {alone:.3f} s, beside {NUM_SLOW} slow connections {attacked:.3f} s")
        assert attacked < 2 * alone + 0.2  # the addend is for a busy machine


def test_one_address_can_take_its_share_of_the_connections_only(tmp_path: Path):
    with running_gate(tmp_path, max_connections=8, address_share=0.5) as door, contextlib.ExitStack() as kept:
        for _ in range(4):
            kept.enter_context(tls_connection(door))
        with pytest.raises((ConnectionError, ssl.SSLError)), tls_connection(door):
            pass
        kept.close()
        device = until_let_in(lambda: Device(door).activate())
        assert device.node_id


def seconds_of_a_round(server: Server, device: Device) -> float:
    begun = time.monotonic()
    message_id = server.send(device)
    found = device.pull()
    device.confirm(found)
    assert device.reply(found).status_code == 200
    assert len(server.pull(message_id).messages_list) == 1
    return time.monotonic() - begun


def silent(device: Device) -> socket.socket:
    """Never begins its handshake."""
    return socket.create_connection(("127.0.0.1", device.gate.port), timeout=20)


def silent_after_the_handshake(device: Device) -> socket.socket:
    return tls_connection(device.gate)


def half_a_line(device: Device) -> socket.socket:
    connection = tls_connection(device.gate)
    connection.sendall(HALF_A_LINE)
    return connection


def a_second_request(device: Device) -> socket.socket:
    """A good request first, then half of one."""
    connection = tls_connection(device.gate)
    connection.sendall(signed_head(device, len(body_of(device)), "send-node-heartbeat") + body_of(device))
    assert connection.recv(65536).startswith(b"HTTP/1.1 ")
    connection.sendall(HALF_A_LINE)
    return connection


def a_trickling_body(device: Device) -> socket.socket:
    """Let in by its signature, and then in no hurry."""
    connection = tls_connection(device.gate)
    connection.sendall(signed_head(device, 1000, "push-object"))
    return connection


def body_of(device: Device) -> bytes:
    return PullMessagesRequest(node=device.node).SerializeToString()


def signed_head(device: Device, size: int, call: str) -> bytes:
    assert call in allow_list.FLEET_CALLS
    headers = {"Host": "gate", **PROTOBUF, **device.signed(), "Content-Length": str(size)}
    lines = [f"POST /v1/fleet/{call} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the gate closes it although a byte comes now and then."""
    connection.settimeout(0.3)
    for _ in range(50):
        try:
            if isinstance(connection, ssl.SSLSocket):
                connection.sendall(b"a")
            if connection.recv(65536) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def until_let_in(connect: Callable[[], Device]) -> Device:
    """What `connect` gives, tried again while the gate has yet to notice who left."""
    for _ in range(50):
        with contextlib.suppress(httpx.TransportError):
            return connect()
    raise AssertionError("nobody was let in")
