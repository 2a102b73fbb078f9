"""The sockets of a connection, so that another thread than the one that reads can end them."""

import contextlib
import socket
import ssl
import threading
import weakref


class OpenSockets:
    """Every socket that a TLS context has opened. `shut` may be called from any thread.

    A socket is shut down and not closed: who waits on it finds its end at once, and closes it. Closed from outside, its
    number could become another file of the host's while the thread still reads from it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: weakref.WeakSet[ssl.SSLSocket] = weakref.WeakSet()

    def watch(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """The context, whose sockets are known here from now on, from before their handshakes."""
        opened = self

        class Watched(ssl.SSLSocket):
            def do_handshake(self, block: bool = False) -> None:
                opened._add(self)
                super().do_handshake(block)

        context.sslsocket_class = Watched
        return context

    def shut(self) -> None:
        """End whatever goes on. What is opened later goes on."""
        with self._lock:
            found = list(self._sockets)
        for one in found:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # SSLSocket's own would drop TLS under a reader

    def _add(self, one: ssl.SSLSocket) -> None:
        with self._lock:
            self._sockets.add(one)
