"""An ASGI request read whole, and an answer held in hand before it is sent."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Answer:
    """What an app said to one request."""

    __slots__ = ("messages",)

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages

    @property
    def status(self) -> int:
        """The HTTP status; 0 where the app said nothing, as the client had gone."""
        return int(self.messages[0]["status"]) if self.messages else 0

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def is_empty(self) -> bool:
        """Whether a call went well and gave nothing: a protobuf without any field is no bytes at all."""
        return self.status == 200 and not self.body

    async def send(self, send: Send) -> None:
        """Send it on."""
        for message in self.messages:
            await send(message)


async def ask(app: ASGIApp, scope: Scope, body: bytes, then: Receive) -> Answer:
    """What an app answers to a request whose body was read already; `then` gives what the client does after it."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    said: list[Message] = []

    async def receive() -> Message:
        return unread.pop() if unread else await then()

    async def collect(message: Message) -> None:
        said.append(message)

    await app({**scope, "state": dict(scope.get("state") or {})}, receive, collect)
    return Answer(said)


async def read_body(receive: Receive) -> bytes | None:
    """A request's whole body; None where the client went away before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def bare(status: int) -> Answer:
    """A status without a body, after which the connection is closed."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    start: Message = {"type": "http.response.start", "status": status, "headers": headers}
    return Answer([start, {"type": "http.response.body", "body": b""}])


def nothing() -> Answer:
    """A call that went well and gave nothing."""
    headers = [(b"content-type", b"application/protobuf"), (b"content-length", b"0")]
    start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
    return Answer([start, {"type": "http.response.body", "body": b""}])
