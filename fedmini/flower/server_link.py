"""The server's program as Flower's ServerApp, in a process of ours: messages to devices, and their answers one by one.

Flower's own way to run a ServerApp installs packages, sleeps between polls and starts from the first round again. This
speaks the same calls to the SuperLink on loopback: a run is begun (with a stub in the place of code: none is shipped to
anybody), its task acquired and kept alive, and messages pushed and pulled for as long as this process lives.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto import control_pb2, message_pb2, runtime_pb2
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import TASK_TOKEN_HEADER

from fedmini.errors import LinkError, StateError, UpdateError
from fedmini.flower import codec, objects
from fedmini.flower.calls import Calls
from fedmini.flower.codec import Envelope

HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 40.0
RETRY_SECONDS = 0.3
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


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one message: an envelope, or why there is none."""

    message_id: str
    node: int
    envelope: Envelope | None
    problem: str = ""


class ServerLink:
    """The connection to the SuperLink on loopback. Raises LinkError where that is away: `begin` again then."""

    def __init__(self, port: int, loopback_headers: Mapping[str, str], max_payload_bytes: int) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._task_token = ""
        self._run = 0
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

        def headers() -> dict[str, str]:
            token = {TASK_TOKEN_HEADER: self._task_token} if self._task_token else {}
            return {**loopback_headers, **token}

        self._calls = Calls(f"http://127.0.0.1:{port}", None, "flwr-serverapp", headers)

    @property
    def run(self) -> int:
        """Flower's number of the run that goes on; 0 before `begin`."""
        return self._run

    def begin(self, previous: int | None = None) -> int:
        """End a run that an earlier process left, where one is named, and begin another; its number."""
        self._task_token = ""
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
        found = self._calls.call("/v1/runtime/get-nodes", runtime_pb2.GetNodesRequest(), runtime_pb2.GetNodesResponse)
        return frozenset(node.node_id for node in found.nodes)

    def send(self, node: int, envelope: Envelope, ttl_s: float) -> str:
        """Put a message to a node on its way; its id, by which the answer is known."""
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
        deflated = objects.Deflated(make_message(metadata=metadata, content=codec.pack(envelope)))
        request = runtime_pb2.PushAppMessagesRequest(
            messages_list=[deflated.head], message_object_trees=[deflated.tree]
        )
        answer = self._calls.call("/v1/runtime/push-messages", request, runtime_pb2.PushAppMessagesResponse)
        if not answer.message_ids or not answer.message_ids[0]:
            raise LinkError(f"the SuperLink took no message for node {node}: is it registered?")

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
        objects.push(((name, content) for name, content in deflated.objects.items() if name in wanted), push)
        return str(answer.message_ids[0])

    def receive(self, pending: Iterable[str], until: Callable[[], bool]) -> Iterator[Reply]:
        """The answers to these messages as they come, one in memory at a time, until all came or `until` is true.

        A SuperLink that is away for a moment is waited for; one that refuses raises LinkError.
        """
        waiting = set(pending)
        while waiting and not until():
            request = runtime_pb2.PullAppMessagesRequest(message_ids=sorted(waiting))
            try:
                found = self._calls.call(
                    "/v1/runtime/pull-messages", request, runtime_pb2.PullAppMessagesResponse, POLL_SECONDS
                )
            except LinkError as error:
                if error.status is not None and error.status < 500:
                    raise
                self._closed.wait(RETRY_SECONDS)
                continue
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                waiting.discard(head.metadata.reply_to_message_id)
                yield self._reply(head, tree)

    def _reply(self, head: message_pb2.Message, tree: message_pb2.ObjectTree) -> Reply:
        about, node, run = head.metadata.reply_to_message_id, head.metadata.src_node_id, self._run
        if head.HasField("error"):
            return Reply(about, node, None, f"Flower's code {head.error.code}")

        def ask(name: str) -> message_pb2.PullObjectResponse:
            request = message_pb2.PullObjectRequest(node=self._node, run_id=run, object_id=name)
            return self._calls.call("/v1/runtime/pull-object", request, message_pb2.PullObjectResponse)

        try:
            message = objects.pull(tree, ask, self._max_payload_bytes)
            if not message.has_content():
                return Reply(about, node, None, f"Flower's code {message.error.code}")
            envelope = codec.unpack(message.content)
        except (UpdateError, LinkError) as error:
            return Reply(about, node, None, str(error))
        confirm = message_pb2.ConfirmMessageReceivedRequest(
            node=self._node, run_id=run, message_object_id=tree.object_id
        )
        with contextlib.suppress(LinkError):  # it only lets the SuperLink forget the objects sooner
            self._calls.call(
                "/v1/runtime/confirm-message-received", confirm, message_pb2.ConfirmMessageReceivedResponse
            )
        return Reply(about, node, envelope)

    def end(self) -> None:
        """Say that the run is over, and close."""
        request = runtime_pb2.PushTaskOutputRequest(sub_status="completed", details="")
        with contextlib.suppress(LinkError):
            self._calls.call("/v1/runtime/push-task-output", request, runtime_pb2.PushTaskOutputResponse, 5.0)
        self.close()

    def close(self) -> None:
        """End every call. Closing twice is fine."""
        self._closed.set()
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
