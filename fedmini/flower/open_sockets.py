"""The sockets of a connection, so that another thread than the one that reads, writes or connects can end them."""

import contextlib
import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any

import httpx

from fedmini.flower.calls import LIMITS

LOOK_SECONDS = 0.05  # between two looks at whether a connection that is being made is still wanted


class OpenSockets:
    """Every socket that its transports have opened, with TLS and without. `shut` may be called from any thread.

    A socket is shut down and not closed: who waits on it finds its end at once, and closes it. Closed from outside, its
    number could become another file of the host's while the thread still reads from it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._num_shut = 0
        self.is_resolving = False  # looking up a host's name, which nobody can end

    def transport(self, tls: ssl.SSLContext | None) -> httpx.BaseTransport:
        """What makes the connections of an HTTP client, so that they are known here; `tls` is for https."""
        return _Transport(tls, self)

    def shut(self) -> None:
        """End whatever goes on, also a connection that is being made. What is begun later goes on."""
        with self._lock:
            self._num_shut += 1
            found = list(self._sockets)
        for one in found:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # SSLSocket's own would drop TLS under a reader

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> "_Stream":
        """What httpcore asks of a network backend. The addresses of a host are tried in turn, within one timeout."""
        began, until = self._num_shut, None if timeout is None else time.monotonic() + timeout
        failure: OSError = OSError("no address")
        for family, kind, protocol, _, address in self._addresses(host, port):
            one = socket.socket(family, kind, protocol)
            try:
                self._connect(one, address, until, began)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.add(one, began)
                return _Stream(one, self, began)
            except OSError as error:
                one.close()
                failure = error
            except BaseException:
                one.close()
                raise
        if isinstance(failure, TimeoutError):
            raise httpx.ConnectTimeout("no answer came") from failure
        raise httpx.ConnectError(str(failure)) from failure

    def _addresses(self, host: str, port: int) -> list[tuple[Any, ...]]:
        self.is_resolving = True
        try:
            return [*socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(str(error)) from error
        finally:
            self.is_resolving = False

    def _connect(self, one: socket.socket, address: Any, until: float | None, began: int) -> None:
        """Connect, and look now and then whether it is still wanted. Raises OSError, TimeoutError, httpx.ConnectError."""
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            one.connect(address)
        poll = select.poll()
        poll.register(one, select.POLLOUT)
        while not poll.poll(1000 * LOOK_SECONDS):
            self._check_wanted(began)
            if until is not None and time.monotonic() > until:
                raise TimeoutError
        if code := one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))

    def add(self, one: socket.socket, began: int) -> None:
        """Know a socket from now on. Raises httpx.ConnectError where all were shut since `began`."""
        with self._lock:
            self._sockets.add(one)
        self._check_wanted(began)

    def _check_wanted(self, began: int) -> None:
        if self._num_shut != began:
            raise httpx.ConnectError("another thread has ended it")


class _Transport(httpx.HTTPTransport):
    def __init__(self, tls: ssl.SSLContext | None, sockets: OpenSockets) -> None:
        super().__init__(verify=tls if tls is not None else False, trust_env=False, limits=LIMITS)
        # httpx has no word of its own for what makes the connections, and httpcore's SyncBackend blocks in connect.
        self._pool._network_backend = sockets  # type: ignore[assignment]


class _Stream:
    """What httpcore asks of a network stream: a connected socket. Fails with httpx's own errors."""

    def __init__(self, one: socket.socket, sockets: OpenSockets, began: int) -> None:
        self._socket, self._sockets, self._began = one, sockets, began

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            self._socket.settimeout(timeout)
            return self._socket.recv(max_bytes)
        except TimeoutError as error:
            raise httpx.ReadTimeout("no answer came") from error
        except OSError as error:
            raise httpx.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._socket.settimeout(timeout)
            left = memoryview(buffer)
            while left:  # the timeout is for each piece: a slow line may take long for all of them
                left = left[self._socket.send(left) :]
        except TimeoutError as error:
            raise httpx.WriteTimeout("it was not taken") from error
        except OSError as error:
            raise httpx.WriteError(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Stream":
        try:
            self._socket.settimeout(timeout)
            self._socket = ssl_context.wrap_socket(
                self._socket, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            self._sockets.add(self._socket, self._began)  # it has taken over the plain one's number
            self._socket.do_handshake()
            return self
        except TimeoutError as error:
            self.close()
            raise httpx.ConnectTimeout("no answer came") from error
        except (OSError, ValueError) as error:
            self.close()
            raise httpx.ConnectError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def get_extra_info(self, info: str) -> Any:
        """As httpcore's own, as far as its pool asks: whether a connection that rests was ended by the other side."""
        if info == "is_readable":
            if self._socket.fileno() < 0:
                return True
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(0))
        return None
