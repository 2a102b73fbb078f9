"""Flower's device apps in one process, behind a network that tells the devices' time from its own and counts bytes."""

import time
from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common import Scalar
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from numpy.typing import NDArray


class TrainedDevice(NumPyClient):
    """A device that has trained already: asked to fit, it answers with its vector and its number of examples."""

    def __init__(self, vector: NDArray[np.float32], num_examples: int) -> None:
        self.vector, self.num_examples = vector, num_examples

    def fit(self, *_: object) -> tuple[list[NDArray[np.float32]], int, dict[str, Scalar]]:
        return [self.vector], self.num_examples, {}


class Network:
    """Nodes 1 to n, each a ClientApp with the mods; they answer one after the other, and none drops out.

    `devices_s` and `encoding_s` are CPU seconds, of all devices together and of passing every message through
    Flower's protobuf bytes; `upload_bytes` and `download_bytes` are all devices' together.
    """

    def __init__(self, devices: Sequence[TrainedDevice], mods: list[Mod]) -> None:
        self.app = ClientApp(lambda context: devices[context.node_id - 1].to_client(), mods)
        self.contexts = [Context(1, i + 1, {}, RecordDict(), {}) for i in range(len(devices))]
        self.devices_s = self.encoding_s = 0.0
        self.upload_bytes = self.download_bytes = 0

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> list[Message]:
        """All that a workflow calls of `flwr.serverapp.Grid`."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        request, num_bytes = self._encode(message)
        self.download_bytes += num_bytes
        start = time.process_time()
        reply = self.app(request, self.contexts[message.metadata.dst_node_id - 1])
        self.devices_s += time.process_time() - start
        received, num_bytes = self._encode(reply)
        self.upload_bytes += num_bytes
        return received

    def _encode(self, message: Message) -> tuple[Message, int]:
        start = time.process_time()
        content = message_to_proto(message).SerializeToString()
        decoded = message_from_proto(ProtoMessage.FromString(content))
        self.encoding_s += time.process_time() - start
        return decoded, len(content)
