"""Who may speak at all: a request is checked by its headers, before its body takes any memory.

Flower checks the same signature, but after it has read and parsed the body, and with a query to its database for each
request. Here an unknown key costs a look into a set.
"""

import asyncio
import binascii
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Container, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmini.flower import answers

SIGNER = "fedmini.node"  # in an ASGI scope: the node whose signature was checked
LARGE_BODY_BYTES = 256 * 1024
MAX_LARGE_BODIES = 32  # in memory at once; more wait, unread
MAX_LARGE_BODIES_OF_ONE = 2  # so that no device takes them all


class KnownKeys:
    """The registered public keys (PEM) and whose node they are, as last read."""

    def __init__(self, read: Callable[[], Mapping[bytes, int]]) -> None:
        self._read = read
        self.current: Mapping[bytes, int] = {}

    async def refresh(self) -> None:
        """Read them again."""
        self.current = await asyncio.to_thread(self._read)


class KnownOnly:
    """Answers 401 to a request that no registered device has signed just now."""

    def __init__(self, app: ASGIApp, keys: KnownKeys) -> None:
        self.app = app
        self._keys = keys
        self._slots = asyncio.Semaphore(MAX_LARGE_BODIES)
        self._slots_of: dict[bytes, asyncio.Semaphore] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        key = signer(headers, self._keys.current, datetime.now(UTC))
        if key is None:
            return await answers.bare(401).send(send)
        scope = {**scope, SIGNER: self._keys.current[key]}
        if int(headers.get(b"content-length", b"0")) < LARGE_BODY_BYTES:
            return await self.app(scope, receive, send)
        async with self._slot(key):
            await self.app(scope, receive, send)

    @asynccontextmanager
    async def _slot(self, key: bytes) -> AsyncIterator[None]:
        of_one = self._slots_of.setdefault(key, asyncio.Semaphore(MAX_LARGE_BODIES_OF_ONE))
        async with of_one, self._slots:
            yield


def signer(headers: dict[bytes, bytes], known: Container[bytes], now: datetime) -> bytes | None:
    """The registered public key (PEM) that signed a request within Flower's window of time, or None."""
    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        if key not in known:
            return None
        timestamp = headers[TIMESTAMP_HEADER.encode()]
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
        age = (now - datetime.fromisoformat(timestamp.decode("ascii"))).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        return key if verify_signature(bytes_to_public_key(key), timestamp, signature) else None
    except (KeyError, ValueError, TypeError, binascii.Error):
        return None
