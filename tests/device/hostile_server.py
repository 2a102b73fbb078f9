"""A server that speaks Flower's device API over TLS, in this process, and does whatever a test wants with it."""

import contextlib
import hashlib
import queue
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flwr.app import Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto import fleet_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedmini.flower import codec
from fedmini.flower.codec import Envelope
from fedmini.flower.objects import Deflated

HOLD_S = 15.0
NODE = 7


@dataclass
class Answer:
    """What is sent for one call. `then` is called instead of sending a body, with the connection's stream."""

    status: int = 200
    body: bytes = b""
    then: Callable[[BaseHTTPRequestHandler], None] | None = None


Act = Callable[[bytes], Answer | None]


@dataclass
class Reply:
    """What a device pushed for one message."""

    about: str
    envelope: Envelope


@dataclass
class HostileServer:
    """Behaves until `acts` says otherwise: by the end of a path, what is done first; None goes on as usual."""

    folder: Path
    certificate: tuple[Path, Path]
    acts: dict[str, Act] = field(default_factory=dict)
    run: int = 1
    clock_offset_s: float = 0.0  # its clock against this machine's
    calls: list[str] = field(default_factory=list)
    replies: "queue.Queue[Reply]" = field(default_factory=queue.Queue)
    timestamps: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._waiting: queue.Queue[Deflated | fleet_pb2.PullMessagesResponse] = queue.Queue()
        self._pushed: dict[str, bytes] = {}
        self._heads: list[tuple[message_pb2.Message, set[str]]] = []
        self._lock = threading.Lock()
        self._num_polls = 0  # a newer one, or a logout, ends the one before: its device is gone
        self.is_ending = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # a head and its body by themselves would wait for each other's arrival

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer._serve(self, body)

            def log_message(self, *arguments: object) -> None: ...

            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(time.time() + outer.clock_offset_s, usegmt=True)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.is_ending.set()
        self._server.shutdown()
        self._server.server_close()

    def send(self, envelope: Envelope) -> str:
        """Put a message on its way; its id."""
        return self.send_message(codec.pack(envelope))

    def send_message(self, content: object, run: int | None = None) -> str:
        """Any content."""
        metadata = Metadata(
            run_id=self.run if run is None else run,
            message_id="",
            src_node_id=1,
            dst_node_id=NODE,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=600.0,
            message_type="train.fedmini",
        )
        message = Deflated(make_message(metadata=metadata, content=content))  # type: ignore[arg-type]
        self.send_again(message)
        self.last = message
        return message.message_id

    def send_again(self, message: Deflated) -> None:
        self._objects.update(message.objects)
        self._waiting.put(message)

    def send_raw(self, answer: fleet_pb2.PullMessagesResponse) -> None:
        """Anything as the answer to a poll."""
        self._waiting.put(answer)

    def ask(self, envelope: Envelope, seconds: float = 60.0) -> Envelope | None:
        """A message's answer; None where none comes."""
        return self.answer_to(self.send(envelope), seconds)

    def offer(self, envelope: Envelope) -> Envelope:
        """An offer's answer; as a server does, it asks again where none comes: what a broken connection took is lost."""
        names: set[str] = set()
        for _ in range(60):
            names.add(self.send(envelope))
            with contextlib.suppress(queue.Empty):
                while True:
                    reply = self.replies.get(timeout=1.0)
                    if reply.about in names:
                        return reply.envelope
        raise AssertionError("no answer came to an offer")

    def answer_to(self, message_id: str, seconds: float = 60.0) -> Envelope | None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                reply = self.replies.get(timeout=left)
            except queue.Empty:
                return None
            if reply.about == message_id:
                return reply.envelope
        return None

    def _serve(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        name = handler.path.rsplit("/", 1)[1]
        self.calls.append(name)
        if "flwr-timestamp" in handler.headers:
            self.timestamps.append(handler.headers["flwr-timestamp"])
        act = self.acts.get(name) or self.acts.get("*")
        answer = act(body) if act is not None else None
        if answer is None:
            answer = getattr(self, "_" + name.replace("-", "_"))(body)
        if answer.then is not None:
            handler.close_connection = True
            return answer.then(handler)
        handler.send_response(answer.status)
        handler.send_header("content-length", str(len(answer.body)))
        handler.end_headers()
        handler.wfile.write(answer.body)

    def _activate_node(self, body: bytes) -> Answer:
        return Answer(body=fleet_pb2.ActivateNodeResponse(node_id=NODE).SerializeToString())

    def _deactivate_node(self, body: bytes) -> Answer:
        with self._lock:
            self._num_polls += 1
        return Answer()

    def _send_node_heartbeat(self, body: bytes) -> Answer:
        return Answer()

    def _confirm_message_received(self, body: bytes) -> Answer:
        return Answer()

    def _pull_messages(self, body: bytes) -> Answer:
        until = time.monotonic() + HOLD_S
        with self._lock:
            self._num_polls += 1
            own = self._num_polls
        while time.monotonic() < until and own == self._num_polls and not self.is_ending.is_set():
            try:
                found = self._waiting.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(found, Deflated):
                found = fleet_pb2.PullMessagesResponse(messages_list=[found.head], message_object_trees=[found.tree])
            return Answer(body=found.SerializeToString())
        return Answer()

    def _pull_object(self, body: bytes) -> Answer:
        request = message_pb2.PullObjectRequest.FromString(body)
        found = self._objects.get(request.object_id)
        answer = message_pb2.PullObjectResponse(
            object_found=found is not None, object_available=found is not None, object_content=found or b""
        )
        return Answer(body=answer.SerializeToString())

    def _push_messages(self, body: bytes) -> Answer:
        request = fleet_pb2.PushMessagesRequest.FromString(body)
        tree = request.message_object_trees[0]
        names = set(_names(tree))
        with self._lock:
            self._heads.append((request.messages_list[0], names))
        answer = fleet_pb2.PushMessagesResponse(session_id="1", objects_to_push=sorted(names))
        return Answer(body=answer.SerializeToString())

    def _push_object(self, body: bytes) -> Answer:
        request = message_pb2.PushObjectRequest.FromString(body)
        assert hashlib.sha256(request.object_content).hexdigest() == request.object_id
        with self._lock:
            self._pushed[request.object_id] = request.object_content
            whole = [(head, names) for head, names in self._heads if names <= set(self._pushed)]
            self._heads = [one for one in self._heads if one not in whole]
        for head, names in whole:
            message = inflate_object_from_contents(
                head.metadata.message_id, {name: self._pushed[name] for name in names}
            )
            assert isinstance(message, Message)
            self.replies.put(Reply(head.metadata.reply_to_message_id, codec.unpack(message.content)))
        return Answer(body=message_pb2.PushObjectResponse(stored=True).SerializeToString())


def _names(tree: message_pb2.ObjectTree) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in _names(child))]
