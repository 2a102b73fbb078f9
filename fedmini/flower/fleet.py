"""A device's connection to a server: Flower's Fleet API, spoken without Flower's own node.

A node of Flower's starts a process for every message, or ends the one that it is in. This one is a few blocking calls:
they raise, and never touch the process, its signals or its exit.
"""

import base64
import contextlib
import email.utils
import ssl
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

from fedmini.errors import ConfigError, LinkError, UpdateError
from fedmini.flower import codec, objects
from fedmini.flower.calls import Calls
from fedmini.flower.codec import Envelope
from fedmini.flower.open_sockets import OpenSockets

HEARTBEAT_SECONDS = 20.0  # the server takes a device for gone after about twice that
EMPTY_SECONDS = 0.3  # at least, between two empty answers: a stock SuperLink holds none
POLL_SECONDS = 40.0  # longer than the server holds an empty answer
CLOCK_TOLERANCE_SECONDS = 2.0  # the server's own is 5, ahead of it, and 300 behind
DATE_SECONDS = 1.0  # what a Date leaves open: it is a whole second, rounded down


@dataclass(frozen=True, slots=True)
class Received:
    """One message from the server, and what an answer to it needs."""

    run: int  # Flower's run: another each time that the server's program begins
    message_id: str
    envelope: Envelope
    message: Message


class FleetConnection:
    """One device's connection. `open` it, then `pull` and `reply`; heartbeats go on by themselves.

    One thread pulls and replies; `close` may be called from any, and ends a `pull` that waits.
    """

    def __init__(
        self,
        url: str,
        tls: ssl.SSLContext | None,
        login_key: ec.EllipticCurvePrivateKey,
        max_payload_bytes: int,
        sockets: OpenSockets | None = None,
    ) -> None:
        """`sockets`: where another thread finds every socket of this connection, to end it."""
        self._login_key, self._max_payload_bytes = login_key, max_payload_bytes
        self._public = login_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._clock_offset_s = 0.0  # the server's clock minus ours, as far as ours is wrong
        self._asked = threading.local()
        transport = (sockets or OpenSockets()).transport(tls)
        self._calls = Calls(url, tls, "SuperNode", self._signed, self._note_date, transport)
        self._node: Node | None = None
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"FleetConnection({self._calls!r})"

    def open(self) -> None:
        """Log in. Raises LinkError: status 401 or 403 where the server doesn't know this device (any more)."""
        request = fleet_pb2.ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        before = self._clock_offset_s
        try:
            answer = self._activate(request)
        except LinkError as error:
            if error.status != 401 or self._clock_offset_s == before:
                raise
            answer = self._activate(request)  # with the server's time, which its refusal brought
        self._node = Node(node_id=answer.node_id)
        self._heart = threading.Thread(target=self._beat, name="fedmini-heartbeat", daemon=True)
        self._heart.start()

    def _activate(self, request: fleet_pb2.ActivateNodeRequest) -> fleet_pb2.ActivateNodeResponse:
        return self._calls.call("/v1/fleet/activate-node", request, fleet_pb2.ActivateNodeResponse)

    def pull(self) -> Received | None:
        """The next message; None where none came for some seconds. Raises LinkError.

        A message that can't be read raises UpdateError: it is gone, the server hands out each once.
        """
        request = fleet_pb2.PullMessagesRequest(node=self._node)
        asked = time.monotonic()
        found = self._calls.call("/v1/fleet/pull-messages", request, fleet_pb2.PullMessagesResponse, POLL_SECONDS)
        if not found.messages_list:
            self._closed.wait(max(0.0, EMPTY_SECONDS - (time.monotonic() - asked)))
            return None
        run, tree = found.messages_list[0].metadata.run_id, found.message_object_trees[0]

        def ask(name: str) -> message_pb2.PullObjectResponse:
            request = message_pb2.PullObjectRequest(node=self._node, run_id=run, object_id=name)
            return self._calls.call("/v1/fleet/pull-object", request, message_pb2.PullObjectResponse)

        try:
            message = objects.pull(tree, ask, self._max_payload_bytes)
            envelope = codec.unpack(message.content) if message.has_content() else None
        finally:
            confirm = message_pb2.ConfirmMessageReceivedRequest(
                node=self._node, run_id=run, message_object_id=tree.object_id
            )
            self._calls.call("/v1/fleet/confirm-message-received", confirm, message_pb2.ConfirmMessageReceivedResponse)
        if envelope is None:
            raise UpdateError("a message without content came: it is not one of fedmini's")
        return Received(run, tree.object_id, envelope, message)

    def reply(self, received: Received, envelope: Envelope) -> int:
        """Answer a message; the number of bytes that left for it. Raises LinkError, also where the run is over."""
        message = Message(codec.pack(envelope), reply_to=received.message)
        asked = received.message.metadata
        # By the server's clock: by one that is ahead, an answer would have expired when it comes.
        message.metadata.created_at = self._server_time()
        message.metadata.ttl = asked.created_at + asked.ttl - message.metadata.created_at
        deflated = objects.Deflated(message)
        request = fleet_pb2.PushMessagesRequest(
            node=self._node,
            messages_list=[deflated.head],
            message_object_trees=[deflated.tree],
            clientapp_runtime_list=[0.0],
        )
        answer = self._calls.call("/v1/fleet/push-messages", request, fleet_pb2.PushMessagesResponse)

        def send(name: str, content: bytes) -> bool:
            request = message_pb2.PushObjectRequest(
                node=self._node,
                run_id=received.run,
                object_id=name,
                object_content=content,
                session_id=answer.session_id,
            )
            return self._calls.call("/v1/fleet/push-object", request, message_pb2.PushObjectResponse).stored

        wanted = set(answer.objects_to_push)
        objects.push(((name, content) for name, content in deflated.objects.items() if name in wanted), send)
        return deflated.size_bytes

    def close(self) -> None:
        """Log out, where the server can be reached, and end every call. Never raises. Closing twice is fine."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._node is not None:
            request = fleet_pb2.DeactivateNodeRequest(node_id=self._node.node_id)
            for _ in range(2):  # a socket that was just ended for a poll may be the one that it goes out on
                try:
                    self._calls.call("/v1/fleet/deactivate-node", request, fleet_pb2.DeactivateNodeResponse, 2.0)
                except LinkError:
                    continue
                break
        self._calls.close()
        if self._heart is not None and self._heart is not threading.current_thread():
            self._heart.join(timeout=5.0)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS / 2):
            request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
            with contextlib.suppress(LinkError):  # whoever pulls finds out too, and decides what to do
                self._calls.call(
                    "/v1/fleet/send-node-heartbeat", request, heartbeat_pb2.SendNodeHeartbeatResponse, 10.0
                )

    def _server_time(self) -> float:
        return time.time() + self._clock_offset_s

    def _signed(self) -> dict[str, str]:
        """The headers that say who calls: a signature over the time, as the server's clock has it."""
        self._asked.at = time.time()
        timestamp = datetime.fromtimestamp(self._server_time(), UTC).isoformat()
        signature = self._login_key.sign(timestamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self._public).decode("ascii"),
            TIMESTAMP_HEADER: timestamp,
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signature).decode("ascii"),
        }

    def _note_date(self, date: str) -> None:
        """Take over the server's clock where the date of its answer says that ours is off.

        The date is from some time between the call and its answer, which a poll's are far apart: what fits all of it stays.
        """
        try:
            theirs = email.utils.parsedate_to_datetime(date).timestamp()
        except (ValueError, TypeError, OverflowError):
            return
        least, most = theirs - time.time(), theirs + DATE_SECONDS - self._asked.at
        if least - CLOCK_TOLERANCE_SECONDS <= self._clock_offset_s <= most + CLOCK_TOLERANCE_SECONDS:
            return
        self._clock_offset_s = least  # too early is what the server bears with


def tls_context(server_key: bytes | None) -> ssl.SSLContext:
    """TLS that trusts these certificates (PEM) and no others; the system's where none are given. Raises ConfigError."""
    try:
        if server_key is None:
            return ssl.create_default_context()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=server_key.decode("ascii"))
        return context
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError("server_key is no certificate in PEM: take the server's tls/ca.crt") from error
