"""An answer that is still being sent costs nobody else time, and is taken when it is whole."""

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from fedmini.errors import LinkError
from fedmini.flower import fleet, registry
from fedmini.flower.allow_list import PUSH_OBJECT
from fedmini.flower.codec import Envelope
from fedmini.flower.fleet import FleetConnection
from fedmini.secagg import device_keys
from tests.device.gate_server import gate_server

SLOW_S = 12.0  # longer than a part of a message was waited for once


def answer_slowly(connection: FleetConnection, go_on: threading.Event) -> None:
    """Announce an answer, and send its parts when told to."""
    call = connection._calls.call

    def held_back(path: str, *others: Any) -> Any:
        if path == PUSH_OBJECT and not go_on.wait(60):
            raise LinkError("it was never told to")
        return call(path, *others)

    connection._calls.call = held_back
    with contextlib.suppress(LinkError):
        connection.reply(connection.pull(), Envelope("answer", {}, b"S" * 1000))


def test_an_answer_that_is_still_being_sent_holds_up_no_other_and_is_taken_in_the_end(tmp_path: Path) -> None:
    """Two announce and stall; the third's answer is read while they do. One of the two goes on after 12 s, the other never."""
    with gate_server(tmp_path) as server:
        tls = fleet.tls_context(server.gate.ca.read_bytes())
        keys = [device_keys.draw_login() for _ in range(3)]
        encoding = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        nodes = [
            registry.register_node(server.gate.local_port, server.gate.token, key.public_key().public_bytes(*encoding))
            for key in keys
        ]
        address = f"https://127.0.0.1:{server.gate.port}"
        slow, stalled, honest = (FleetConnection(address, tls, key, 2**24) for key in keys)
        for connection in (slow, stalled, honest):
            connection.open()
        sent = [(node, Envelope("request", {}, b"x")) for node in nodes]
        names = list(server.link.send_all(sent, 120.0))
        go_on, never = threading.Event(), threading.Event()
        for connection, event in ((slow, go_on), (stalled, never)):
            threading.Thread(target=answer_slowly, args=(connection, event), daemon=True).start()

        waiting = {name for name in names if name is not None}
        assert not list(server.link.receive(waiting, time.monotonic() + 3)), "two heads are there, and nothing whole"
        honest.reply(honest.pull(), Envelope("answer", {}, b"H"))
        began = time.monotonic()
        (first,) = server.link.receive({str(names[2])}, began + 60)
        assert first.envelope is not None and first.envelope.payload == b"H"

        assert not list(server.link.receive({str(names[0])}, began + SLOW_S)), "it is not given up"
        go_on.set()
        (second,) = server.link.receive({str(names[0])}, time.monotonic() + 60)
        assert second.envelope is not None and second.envelope.payload == b"S" * 1000
