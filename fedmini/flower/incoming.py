"""Answers on their way to the server: put together when their parts are there, and none waits for another's."""

import contextlib
import math
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from flwr.proto import message_pb2
from flwr.proto.node_pb2 import Node

from fedmini.errors import LinkError, UpdateError
from fedmini.flower import codec, objects
from fedmini.flower.calls import Calls
from fedmini.flower.codec import Envelope
from fedmini.flower.objects import UnfinishedError

UPLOAD_SECONDS = 600.0  # after which an answer that was announced never comes; a stage ends by its own deadline
LONGEST_ASIDE_SECONDS = 2.0  # between two looks at an answer that is still being sent


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one message: an envelope, or why there is none."""

    message_id: str
    node: int
    envelope: Envelope | None
    problem: str = ""


@dataclass(slots=True)
class _Unfinished:
    """An answer whose head is there; how long until its parts are asked for again grows each time."""

    run: int
    head: message_pb2.Message
    tree: message_pb2.ObjectTree
    seen_at: float = field(default_factory=time.monotonic)
    try_at: float = 0.0
    wait_s: float = 0.05


class Incoming:
    """The answers whose heads the SuperLink has given out, which it does once: one payload in memory at a time."""

    def __init__(self, calls: Calls, node: Node, max_payload_bytes: int) -> None:
        self._calls, self._node, self._max_payload_bytes = calls, node, max_payload_bytes
        self._unfinished: dict[str, _Unfinished] = {}
        self._aside = ThreadPoolExecutor(1, "fedmini-confirm")

    def add(self, run: int, head: message_pb2.Message, tree: message_pb2.ObjectTree) -> None:
        """An answer's head is there; its parts are, or are on their way."""
        self._unfinished[head.metadata.reply_to_message_id] = _Unfinished(run, head, tree)

    def unseen(self, wanted: Collection[str]) -> set[str]:
        """Those of these whose heads did not come yet: of another, the SuperLink would say that it has expired."""
        return set(wanted) - set(self._unfinished)

    def next_try(self, wanted: Collection[str]) -> float:
        """When the parts of one of these answers are asked for again, by the monotonic clock; infinity: of none."""
        return min((one.try_at for name, one in self._unfinished.items() if name in wanted), default=math.inf)

    def clear(self) -> None:
        """Forget them all: their run is over."""
        self._unfinished.clear()

    def close(self) -> None:
        """End what is confirmed in the background. Closing twice is fine."""
        self._aside.shutdown(wait=False, cancel_futures=True)

    def finished(self, wanted: Collection[str]) -> Iterator[Reply]:
        """The answers of those whose heads were seen: those that are whole now, or never will be."""
        for name in [name for name in self._unfinished if name in wanted]:
            one, now = self._unfinished[name], time.monotonic()
            if now < one.try_at:
                continue
            try:
                reply = self._reply(one.run, one.head, one.tree)
            except UnfinishedError as error:
                if now < one.seen_at + UPLOAD_SECONDS:
                    one.try_at, one.wait_s = now + one.wait_s, min(2 * one.wait_s, LONGEST_ASIDE_SECONDS)
                    continue
                reply = Reply(name, one.head.metadata.src_node_id, None, str(error))
            del self._unfinished[name]
            yield reply

    def _reply(self, run: int, head: message_pb2.Message, tree: message_pb2.ObjectTree) -> Reply:
        """Raises UnfinishedError where it is not all there yet."""
        about, node = head.metadata.reply_to_message_id, head.metadata.src_node_id
        if head.HasField("error"):
            return Reply(about, node, None, f"Flower's code {head.error.code}")

        def ask(name: str) -> message_pb2.PullObjectResponse:
            request = message_pb2.PullObjectRequest(node=self._node, run_id=run, object_id=name)
            return self._calls.call("/v1/runtime/pull-object", request, message_pb2.PullObjectResponse)

        try:
            message = objects.pull(tree, ask, self._max_payload_bytes, wait_s=0.0)
            if not message.has_content():
                return Reply(about, node, None, f"Flower's code {message.error.code}")
            envelope = codec.unpack(message.content)
        except UnfinishedError:
            raise
        except (UpdateError, LinkError) as error:
            return Reply(about, node, None, str(error))
        self._aside.submit(self._confirm, run, tree.object_id)
        return Reply(about, node, envelope)

    def _confirm(self, run: int, name: str) -> None:
        """Let the SuperLink forget the objects of an answer; nobody waits for it."""
        request = message_pb2.ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=name)
        with contextlib.suppress(LinkError):
            self._calls.call(
                "/v1/runtime/confirm-message-received", request, message_pb2.ConfirmMessageReceivedResponse
            )
