"""Long polling for a SuperLink that only knows short polls: an empty answer waits until something was pushed.

Both listeners run in one event loop, so a push on one side rings a bell on the other. A device's poll is rung for its
own node; the server's (one ServerApp per SuperLink) by any device's reply. A bell rings when the last object of a
message has arrived, not when its head has: who is woken finds everything there.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias, TypeVar

from flwr.proto.control_pb2 import UnregisterNodeRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PushObjectRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse
from google.protobuf.message import DecodeError, Message
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from fedmini.flower import admission, answers, calls
from fedmini.flower.answers import Answer
from fedmini.flower.bells import SERVER, Bell, Bells, Uploads, Wait
from fedmini.flower.deliveries import Deliveries

HOLD_S = 15.0  # under the 30 s after which Flower's own clients give up, and under what proxies allow

Handler: TypeAlias = Callable[[Scope, bytes, Receive], Awaitable[Answer | None]]
Parsed = TypeVar("Parsed", bound=Message)


class LongPoll:
    """Holds empty answers to polls, and wakes them; passes everything else on.

    `on_registration` is awaited when an operator has added or removed a device, before the operator is answered.
    """

    def __init__(self, app: ASGIApp, on_registration: Callable[[], Awaitable[None]], hold_s: float = HOLD_S) -> None:
        self.app = app
        self.bells = Bells()
        self._hold_s = hold_s
        self._on_registration = on_registration
        self._uploads = Uploads()
        self._deliveries = Deliveries()
        self._handlers: dict[str, Handler] = {
            "/v1/fleet/pull-messages": self._device_polls,
            "/v1/fleet/push-messages": self._device_pushes,
            "/v1/fleet/push-object": self._object_arrives,
            "/v1/fleet/confirm-message-received": self._device_confirms,
            "/v1/runtime/pull-messages": self._server_polls,
            "/v1/runtime/push-messages": self._server_pushes,
            "/v1/runtime/push-object": self._object_arrives,
            "/v1/control/register-node": self._device_is_added,
            "/v1/control/unregister-node": self._device_is_removed,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get(scope.get("path", ""))
        if scope["type"] != "http" or handler is None:
            return await self.app(scope, receive, send)
        body = await answers.read_body(receive)
        if body is None:
            return
        try:
            answer = await handler(scope, body, receive)
        except DecodeError:
            answer = answers.bare(400)
        if answer is not None:
            await answer.send(send)

    async def _device_polls(self, scope: Scope, body: bytes, receive: Receive) -> Answer | None:
        node = parse(PullMessagesRequest, body).node.node_id

        async def look() -> Answer:
            # A device that waits costs no query: where nothing was pushed since the last look, there is nothing.
            if scope.get(admission.SIGNER) == node and self.bells.is_quiet(node):
                return answers.nothing()
            answer = await answers.ask(self.app, scope, body, receive)
            if answer.status == 200 and (found := parse(PullMessagesResponse, answer.body)).messages_list:
                self._deliveries.add(node, found.messages_list[0].metadata, answer)
            return self._deliveries.next(node) or answer if answer.status == 200 else answer

        return await self._poll(look, receive, node, self._hold_s)

    async def _server_polls(self, scope: Scope, body: bytes, receive: Receive) -> Answer | None:
        hold_s = min(self._hold_s, asked_hold(scope))
        return await self._poll(lambda: answers.ask(self.app, scope, body, receive), receive, SERVER, hold_s)

    async def _poll(
        self, look: Callable[[], Awaitable[Answer]], receive: Receive, bell: Bell, hold_s: float
    ) -> Answer | None:
        wait = self.bells.listen(bell)
        gone = asyncio.ensure_future(receive())  # resolves when the client goes away
        try:
            return await self._held(look, gone, bell, wait, hold_s)
        finally:
            self.bells.leave(bell, wait)
            gone.cancel()

    async def _held(
        self,
        look: Callable[[], Awaitable[Answer]],
        gone: asyncio.Future[AsgiMessage],
        bell: Bell,
        wait: Wait,
        hold_s: float,
    ) -> Answer | None:
        """The answer to send; None where the client went away while nothing was there for it."""
        loop = asyncio.get_running_loop()
        end = loop.time() + hold_s
        while True:
            wait.rung.clear()
            answer = await look()
            if answer.status != 200:
                return answer
            if not wait.over:
                self.bells.supersede(bell, wait)  # not before it was said that it is who it claims to be
            elif not answer.is_empty:
                self.bells.ring([bell])  # the newer poll looks again, and is given the same
            left = end - loop.time()
            if not answer.is_empty or left <= 0 or wait.over:
                return answer
            self.bells.note_empty(bell, wait)
            ringing = asyncio.ensure_future(wait.rung.wait())
            await asyncio.wait((ringing, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            ringing.cancel()
            if gone.done():
                return None  # not looked at again, so Flower marks nothing as delivered
            if wait.over or not wait.rung.is_set():
                return answer

    async def _device_pushes(self, scope: Scope, body: bytes, receive: Receive) -> Answer:
        request = parse(PushMessagesRequest, body)
        if not is_own_reply(request):
            return answers.bare(403)
        answer = await answers.ask(self.app, scope, body, receive)
        if answer.status == 200:
            pushed = parse(PushMessagesResponse, answer.body)
            self.bells.ring(self._uploads.begin(pushed.session_id, {SERVER: set(pushed.objects_to_push)}))
        return answer

    async def _server_pushes(self, scope: Scope, body: bytes, receive: Receive) -> Answer:
        answer = await answers.ask(self.app, scope, body, receive)
        if answer.status == 200:
            pushed = parse(PushAppMessagesResponse, answer.body)
            missing = missing_by_node(parse(PushAppMessagesRequest, body), set(pushed.objects_to_push))
            self.bells.ring(self._uploads.begin(pushed.session_id, missing))
        return answer

    async def _object_arrives(self, scope: Scope, body: bytes, receive: Receive) -> Answer:
        answer = await answers.ask(self.app, scope, body, receive)
        if answer.status == 200:
            pushed = parse(PushObjectRequest, body)
            self.bells.ring(self._uploads.arrived(pushed.session_id, pushed.object_id))
        return answer

    async def _device_confirms(self, scope: Scope, body: bytes, receive: Receive) -> Answer:
        answer = await answers.ask(self.app, scope, body, receive)
        if answer.status != 401:  # also where the run is over: the device is done with it
            request = parse(ConfirmMessageReceivedRequest, body)
            self._deliveries.confirm(request.node.node_id, request.message_object_id)
        return answer

    async def _device_is_added(self, scope: Scope, body: bytes, receive: Receive) -> Answer:
        answer = await answers.ask(self.app, scope, body, receive)
        await self._on_registration()
        return answer

    async def _device_is_removed(self, scope: Scope, body: bytes, receive: Receive) -> Answer:
        answer = await self._device_is_added(scope, body, receive)
        node = parse(UnregisterNodeRequest, body).node_id
        self._deliveries.forget(node)
        self.bells.ring([node])  # a poll that it holds is asked again, and refused
        return answer


def asked_hold(scope: Scope) -> float:
    """For how long the server's program wants an empty answer to be held at most: its stage may be over before."""
    shown = [value for name, value in scope["headers"] if name == calls.HOLD_HEADER.encode("ascii")]
    try:
        return max(0.0, float(shown[0])) if shown else float("inf")
    except ValueError:
        return 0.0


def is_own_reply(request: PushMessagesRequest) -> bool:
    """Whether a device pushes one reply of its own to the server.

    Flower checks who signed, but not what is pushed: a device could send other devices messages in the server's name.
    """
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    metadata = request.messages_list[0].metadata
    to_server = metadata.dst_node_id == SERVER and bool(metadata.reply_to_message_id)
    return metadata.src_node_id == request.node.node_id and to_server


def missing_by_node(request: PushAppMessagesRequest, to_push: set[str]) -> dict[Bell, set[str]]:
    """For each node that messages go to, the objects of theirs that have yet to be uploaded."""
    missing: dict[Bell, set[str]] = {}
    for message, tree in zip(request.messages_list, request.message_object_trees, strict=True):
        missing.setdefault(message.metadata.dst_node_id, set()).update(to_push.intersection(object_ids(tree)))
    return missing


def object_ids(tree: ObjectTree) -> Iterable[str]:
    """Every object of a message."""
    yield tree.object_id
    for child in tree.children:
        yield from object_ids(child)


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """A protobuf message. Raises DecodeError."""
    found = kind()
    found.ParseFromString(body)
    return found
