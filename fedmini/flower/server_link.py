"""The server's program as Flower's ServerApp, in a process of ours: messages to devices, and their answers one by one.

Flower's own way to run a ServerApp installs packages, sleeps between polls and starts from the first round again. This
speaks the same calls to the SuperLink on loopback: a run is begun (with a stub in the place of code: none is shipped to
anybody), its task acquired and kept alive, and messages pushed and pulled for as long as this process lives.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto import control_pb2, message_pb2, runtime_pb2
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.constant import TASK_TOKEN_HEADER

from fedmini.errors import LinkError, StateError
from fedmini.flower import acquired_task, codec, objects
from fedmini.flower.acquired_task import AcquiredTask
from fedmini.flower.calls import Calls
from fedmini.flower.codec import Envelope
from fedmini.flower.incoming import Incoming, Reply
from fedmini.flower.objects import Deflated

HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 40.0
RETRY_SECONDS = 0.3
EMPTY_SECONDS = 0.1  # before asking again a SuperLink that holds no empty answer
ANSWER_SECONDS = 5.0  # for an answer that was held to its end
BATCH_MESSAGES, BATCH_BYTES = 16, 2 * 2**20
MESSAGE_TYPE = "train.fedmini"

PYPROJECT = b"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fedmini"
version = "1.0.0"
description = "No code is shipped: devices run their own."
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedmini"
[tool.flwr.app.components]
serverapp = "stub:app"
clientapp = "stub:app"
"""


class ServerLink:
    """The connection to the SuperLink on loopback. Raises LinkError where that is away: `begin` again then."""

    def __init__(
        self,
        port: int,
        loopback_headers: Mapping[str, str],
        max_payload_bytes: int,
        acquired: AcquiredTask | None = None,
    ) -> None:
        self._acquired = acquired
        self._task_token = acquired.token if acquired is not None else ""
        self._run = acquired.run if acquired is not None else 0
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

        def headers() -> dict[str, str]:
            token = {TASK_TOKEN_HEADER: self._task_token} if self._task_token else {}
            return {**loopback_headers, **token}

        url, tls = (acquired.url, acquired.tls) if acquired is not None else (f"http://127.0.0.1:{port}", None)
        self._calls = Calls(url, tls, "flwr-serverapp", headers)
        self._incoming = Incoming(self._calls, self._node, max_payload_bytes)

    @classmethod
    def attach(cls, grid: Grid, max_payload_bytes: int) -> "ServerLink":
        """The link of a ServerApp that `flwr run` has started: in its run, which Flower keeps alive and ends."""
        return cls(0, {}, max_payload_bytes, acquired_task.of_grid(grid))

    @property
    def run(self) -> int:
        """Flower's number of the run that goes on; 0 before `begin`."""
        return self._run

    def begin(self, previous: int | None = None) -> int:
        """End a run that an earlier process left, where one is named, and begin another; its number.

        Where this link is attached to a run of Flower's own: that one, if the SuperLink still knows it.
        """
        if self._acquired is not None:
            self.nodes()
            return self._run
        self._task_token = ""
        self._incoming.clear()
        if previous is not None:
            try:
                self._calls.call(
                    "/v1/control/stop-run",
                    control_pb2.StopRunRequest(run_id=previous),
                    control_pb2.StopRunResponse,
                )
            except LinkError as error:
                if error.status is None:
                    raise  # away; where it was refused, that run is over already
        stub, _ = build_fab_from_files({"pyproject.toml": PYPROJECT, "stub.py": b"# no code is shipped\n"})
        fab = Fab(hash_str=hashlib.sha256(stub).hexdigest(), content=stub)
        started = self._calls.call(
            "/v1/control/start-run", control_pb2.StartRunRequest(fab=fab), control_pb2.StartRunResponse
        )
        request = runtime_pb2.AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
        while True:  # tasks of runs that nobody ended come first
            acquired = self._calls.call("/v1/runtime/acquire-task", request, runtime_pb2.AcquireTaskResponse)
            if not acquired.token:
                raise StateError("the SuperLink has no task for the run that was just begun: start the server again")
            if acquired.task.run_id == started.run_id:
                break
        self._run, self._task_token = started.run_id, acquired.token
        self._calls.call(
            "/v1/runtime/pull-task-input", runtime_pb2.PullTaskInputRequest(), runtime_pb2.PullTaskInputResponse
        )
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="fedmini-task-heartbeat", daemon=True)
            self._heart.start()
        return self._run

    def nodes(self) -> frozenset[int]:
        """The nodes that are connected."""
        return frozenset(node.node_id for node in self._online())

    def nodes_by_key(self) -> dict[bytes, int]:
        """The same, by the public key that each logged in with (PEM)."""
        return {node.public_key: node.node_id for node in self._online()}

    def _online(self) -> Iterable[NodeInfo]:
        found = self._calls.call("/v1/runtime/get-nodes", runtime_pb2.GetNodesRequest(), runtime_pb2.GetNodesResponse)
        return found.nodes

    def send_all(self, requests: Iterable[tuple[int, Envelope]], ttl_s: float) -> Iterator[str | None]:
        """Put messages to nodes on their way, a few at a time: their ids, by which the answers are known, in order.

        None in the place of one that was not taken: its node is not registered any more.
        """
        batch: list[Deflated] = []
        for node, envelope in requests:
            batch.append(self._deflated(node, envelope, ttl_s))
            if len(batch) == BATCH_MESSAGES or sum(one.size_bytes for one in batch) >= BATCH_BYTES:
                yield from self._push(batch)
                batch = []
        if batch:
            yield from self._push(batch)

    def _deflated(self, node: int, envelope: Envelope, ttl_s: float) -> Deflated:
        metadata = Metadata(
            run_id=self._run,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=ttl_s,
            message_type=MESSAGE_TYPE,
        )
        return Deflated(make_message(metadata=metadata, content=codec.pack(envelope)))

    def _push(self, batch: list[Deflated]) -> list[str | None]:
        request = runtime_pb2.PushAppMessagesRequest(
            messages_list=[one.head for one in batch], message_object_trees=[one.tree for one in batch]
        )
        answer = self._calls.call("/v1/runtime/push-messages", request, runtime_pb2.PushAppMessagesResponse)
        contents = {name: content for one in batch for name, content in one.objects.items()}  # shared ones once

        def push(name: str, content: bytes) -> bool:
            request = message_pb2.PushObjectRequest(
                node=self._node,
                run_id=self._run,
                object_id=name,
                object_content=content,
                session_id=answer.session_id,
            )
            return self._calls.call("/v1/runtime/push-object", request, message_pb2.PushObjectResponse).stored

        wanted = set(answer.objects_to_push)
        objects.push(((name, content) for name, content in contents.items() if name in wanted), push)
        return [str(name) or None for name in answer.message_ids]

    def receive(self, pending: Iterable[str], until: float) -> Iterator[Reply]:
        """The answers to these messages as they come, one in memory at a time, until all came or it is `until`.

        By the monotonic clock. An answer that is still being sent holds up no other: it is put aside, for this call or a
        later one. A SuperLink that is away for a moment is waited for; one that refuses raises LinkError.
        """
        waiting = set(pending)
        while waiting and (left := until - time.monotonic()) > 0:
            for reply in self._incoming.finished(waiting):
                waiting.discard(reply.message_id)
                yield reply
            left = min(until, self._incoming.next_try(waiting)) - time.monotonic()
            unseen = self._incoming.unseen(waiting)
            if not waiting or left <= 0:
                continue
            if not unseen:
                self._closed.wait(left)
                continue
            request = runtime_pb2.PullAppMessagesRequest(message_ids=sorted(unseen))
            try:
                found = self._calls.call(
                    "/v1/runtime/pull-messages",
                    request,
                    runtime_pb2.PullAppMessagesResponse,
                    min(left + ANSWER_SECONDS, POLL_SECONDS),
                    hold_s=left,
                )
            except LinkError as error:
                if error.status is not None and error.status < 500:
                    raise
                self._closed.wait(min(RETRY_SECONDS, left))
                continue
            if self._acquired is not None and not found.messages_list:
                self._closed.wait(min(EMPTY_SECONDS, left))
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self._incoming.add(self._run, head, tree)

    def end(self) -> None:
        """Say that the run is over, where nobody else does, and close."""
        if self._acquired is not None:
            return self.close()
        request = runtime_pb2.PushTaskOutputRequest(sub_status="completed", details="")
        with contextlib.suppress(LinkError):
            self._calls.call("/v1/runtime/push-task-output", request, runtime_pb2.PushTaskOutputResponse, 5.0)
        self.close()

    def close(self) -> None:
        """End every call. Closing twice is fine."""
        self._closed.set()
        self._incoming.close()
        self._calls.close()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(LinkError):  # whoever sends or receives finds out too
                self._calls.call(
                    "/v1/runtime/send-task-heartbeat",
                    runtime_pb2.SendTaskHeartbeatRequest(),
                    runtime_pb2.SendTaskHeartbeatResponse,
                    10.0,
                )
