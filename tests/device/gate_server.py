"""The server's side on a real gate: one device registered, messages sent, answers read. And a wire that breaks."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmini.flower import registry
from fedmini.flower.codec import Envelope
from fedmini.flower.loopback_token import HEADER
from fedmini.flower.server_link import ServerLink
from tests.flower.gate_process import GateProcess, running_gate


@dataclass
class GateServer:
    """A server whose program has begun."""

    gate: GateProcess
    link: ServerLink
    node: int = 0

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.gate.port}"

    def register(self, login_key: bytes) -> None:
        self.node = registry.register_node(self.gate.local_port, self.gate.token, login_key)

    def unregister(self) -> None:
        registry.unregister_node(self.gate.local_port, self.gate.token, self.node)

    def wait_for_device(self) -> None:
        until = time.monotonic() + 60
        while self.node not in self.link.nodes():
            assert time.monotonic() < until, "the device does not come"
            time.sleep(0.05)

    def ask(self, envelope: Envelope, seconds: float = 60.0) -> Envelope | None:
        (name,) = self.link.send_all([(self.node, envelope)], 60.0)
        assert name is not None
        replies = self.link.receive([name], time.monotonic() + seconds)
        return next((reply.envelope for reply in replies), None)


@contextmanager
def gate_server(folder: Path, **changes: object) -> Iterator[GateServer]:
    with running_gate(folder, **changes) as gate:
        link = ServerLink(gate.local_port, {HEADER: gate.token}, 2**24)
        try:
            link.begin()
            yield GateServer(gate, link)
        finally:
            link.close()


class Wire:
    """A TCP connection's middle: `break_at_next_answer` lets the server's next bytes vanish, and the connection with them."""

    def __init__(self, port: int) -> None:
        self._port, self._is_armed = port, threading.Event()
        self.num_broken = 0
        self._ends: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def break_at_next_answer(self) -> None:
        self._is_armed.set()

    def break_all(self) -> None:
        """Every connection ends now."""
        for one in self._ends:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                for source, sink, is_answer in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._carry, args=(source, sink, is_answer), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                if is_answer and self._is_armed.is_set():
                    self._is_armed.clear()
                    self.num_broken += 1
                    break
                sink.sendall(content)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
