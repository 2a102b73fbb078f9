"""Flower's protobuf calls over HTTP, spoken with httpx: no retry behind our back, and no hand on the process.

Flower's own client retries for ever, sends SIGINT to its process when it is refused, and ends it when it can't connect.
"""

import ssl
from collections.abc import Callable, Mapping
from typing import TypeVar

import httpx
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from google.protobuf.message import DecodeError, Message

from fedmini.errors import LinkError

Answer = TypeVar("Answer", bound=Message)

MAX_ANSWER_BYTES = 8 * 2**20
CONNECT_SECONDS = 10.0
LIMITS = httpx.Limits(max_connections=8, max_keepalive_connections=8, keepalive_expiry=45.0)
HOLD_HEADER = "fedmini-hold"  # seconds, at most; the gate's long polling reads it


class Calls:
    """An HTTP client of one server. `headers` gives what is added to each call: a token, a signature.

    Safe from several threads.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | None,
        component: str,
        headers: Callable[[], Mapping[str, str]],
        on_date: Callable[[str], None] = lambda date: None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`tls` and LIMITS are for httpx's own transport; where another is given, they are its matter."""
        self._url, self._headers, self._on_date = url.rstrip("/"), headers, on_date
        version = dict(RuntimeVersionMetadata.from_local_component(component).as_metadata())
        self._fixed = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE, **version}
        self._client = httpx.Client(
            verify=tls if tls is not None else False,
            follow_redirects=False,
            trust_env=False,
            limits=LIMITS,
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"Calls({self._url!r})"

    def call(
        self,
        path: str,
        request: Message,
        answer: type[Answer],
        timeout_s: float = 30.0,
        hold_s: float | None = None,
    ) -> Answer:
        """The answer to one call, at most 8 MiB. Raises LinkError: with the server's status where it refused.

        `hold_s`: how long the server may hold an answer that would be empty.
        """
        content = request.SerializeToString(deterministic=True)
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_SECONDS)
        try:
            hold = {} if hold_s is None else {HOLD_HEADER: f"{hold_s:.3f}"}
            headers = {**self._fixed, **self._headers(), **hold}
            with self._client.stream(
                "POST", f"{self._url}{path}", content=content, headers=headers, timeout=timeout
            ) as response:
                self._on_date(response.headers.get("date", ""))
                body = _read(response)
        except httpx.HTTPError as error:
            raise LinkError(f"can't reach {self._url}: {type(error).__name__}") from error
        except RuntimeError as error:  # httpx, of a client that another thread has closed
            raise LinkError(f"the connection to {self._url} was closed") from error
        if response.status_code != httpx.codes.OK:
            raise LinkError(f"{self._url} refused {path}: {response.status_code}", response.status_code)
        try:
            found = answer()
            found.ParseFromString(body)
            return found
        except DecodeError as error:
            raise LinkError(f"{self._url} gave an answer to {path} that can't be read") from error

    def close(self) -> None:
        """End every connection; a call that waits in another thread fails. Closing twice is fine."""
        self._client.close()


def _read(response: httpx.Response) -> bytes:
    """The body of an answer as it was sent: nothing is unpacked, so nothing small becomes large."""
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise LinkError(f"an answer of more than {MAX_ANSWER_BYTES} bytes was refused")
    return bytes(body)
