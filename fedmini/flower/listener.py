"""A listener that slow or many connections can't block: uvicorn's HTTP/1.1 with deadlines, and a limit per address.

uvicorn waits for ever for the end of a request, and asyncio counts nobody before the TLS handshake is over; both are
added here. A request that arrived whole has no deadline: a long poll may wait.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fedmini.errors import ConfigError

BODY_BYTES_PER_S = 16 * 1024  # a body may take the patience and, beyond it, as long as this takes
KEEP_ALIVE_S = 120  # also the time in which a slow device reads an answer of 5 MiB
LAST_LOOK_S = 2.0
MAX_INCOMPLETE_HEADERS = 16 * 1024
MAX_SIZE_DIGITS = 9  # of a Content-Length; a longer one is refused by then
SHUTDOWN_S = 2
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; TLS 1.3 has only good ones


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections at once, and how long each may take to say what it wants."""

    max_connections: int
    address_share: float  # of these, for one address: many devices may sit behind one
    patience_s: float  # for a handshake, and for the headers of a request


class TimedConnection(H11Protocol):
    """One HTTP/1.1 connection that is cut off where a request takes too long to arrive."""

    def __init__(self, config: uvicorn.Config, state: ServerState, patience_s: float) -> None:
        super().__init__(config, state, {})
        self._patience_s = patience_s
        self.closed: asyncio.Future[None] = self.loop.create_future()
        self._deadline: asyncio.TimerHandle | None = None
        self._awaited: Any = None  # the part of a request that the deadline is for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect(h11.IDLE, self._patience_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.loop.is_closed():  # the process ends, and lets go of a request that nobody had answered
            return
        if self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            self.loop.call_later(LAST_LOOK_S, self.transport.abort)  # refused, and perhaps still sending
        elif self.conn.their_state is h11.IDLE:
            self._expect(None)  # between two requests uvicorn's keep-alive runs
        else:
            self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)
        if not self.closed.done():
            self.closed.set_result(None)

    def _follow(self) -> None:
        """Set the deadline of what has to come next; what is awaited already keeps the one that it has."""
        awaited = self.conn.their_state
        if awaited is h11.SEND_BODY and self._awaited is not awaited:
            size = next((value for name, value in self.headers if name == b"content-length"), b"0")
            self._expect(awaited, self._patience_s + int(size[:MAX_SIZE_DIGITS]) / BODY_BYTES_PER_S)
        elif awaited is h11.IDLE and self._awaited is not awaited:
            self._expect(awaited, self._patience_s)
        elif awaited not in (h11.SEND_BODY, h11.IDLE):
            self._expect(None)

    def _expect(self, part: Any, within_s: float = 0.0) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._awaited = part
        self._deadline = None if part is None else self.loop.call_later(within_s, self._cut)

    def _cut(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


class Listener(uvicorn.Server):
    """Serves one app on one bound socket, inside a running event loop."""

    def __init__(self, app: ASGIApp, bound: socket.socket, tls: ssl.SSLContext | None, limits: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_S,
                h11_max_incomplete_event_size=MAX_INCOMPLETE_HEADERS,
            )
        )
        self.bound = bound
        self.tls = tls
        self.limits = limits
        self.refused = 0
        self._by_address: Counter[str] = Counter()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to who runs the loop."""
        yield

    async def run_until_told(self) -> None:
        """Accept and serve until `should_exit` is set; then let answers out for a moment and close."""
        async with asyncio.TaskGroup() as group:
            accepting = group.create_task(self._accept())
            await self.serve(sockets=[])
            accepting.cancel()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        holding: set[asyncio.Task[None]] = set()
        self.bound.setblocking(False)
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(self.bound)
                except OSError:  # out of descriptors: those who are here go on, the rest wait
                    await asyncio.sleep(0.1)
                    continue
                if self._is_full(address[0]):
                    self.refused += 1
                    connection.close()
                    continue
                task = loop.create_task(self._hold(connection, address[0]))
                holding.add(task)
                task.add_done_callback(holding.discard)
        finally:
            self.bound.close()

    def _is_full(self, address: str) -> bool:
        of_one = int(self.limits.max_connections * self.limits.address_share)
        return self._by_address.total() >= self.limits.max_connections or self._by_address[address] >= of_one

    async def _hold(self, connection: socket.socket, address: str) -> None:
        """Serve one connection; it counts from before its handshake until it is closed."""
        self._by_address[address] += 1
        patience_s = self.limits.patience_s
        protocol = TimedConnection(self.config, self.server_state, patience_s)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(  # uvloop gives back its own protocol under TLS
                lambda: protocol,
                connection,
                ssl=self.tls,
                ssl_handshake_timeout=patience_s if self.tls else None,
            )
            await protocol.closed
        except OSError:  # a handshake that failed or took too long
            connection.close()
        finally:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host}:{port}: {error.strerror or error}. Is another server running there? "
            "Stop it, or choose another port"
        ) from error


def tls_context(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """TLS 1.2 or 1.3 with forward secrecy."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    load(context, certificate, private_key)
    return context


def load(context: ssl.SSLContext, certificate: Path, private_key: Path) -> None:
    """Let TLS show this certificate from now on. Raises ConfigError; then it shows the one before."""
    try:
        context.load_cert_chain(certificate, private_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"can't use the certificate {certificate} with the private key {private_key}: {error}. "
            "Expected two PEM files that belong together"
        ) from error
