"""The messages and methods of clients/proto/device.proto, made from the descriptor that was compiled of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from fedmini.errors import UpdateError

DESCRIPTOR, PACKAGE = "device.binpb", "fedmini.device.v1"
SERVICE = f"{PACKAGE}.Device"


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the service: it takes one request, and answers with one message or with several."""

    name: str
    request: type[Message]
    is_streaming: bool


def _pool() -> descriptor_pool.DescriptorPool:
    content = resources.files(__package__).joinpath(DESCRIPTOR).read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(content).file:
        pool.Add(file)
    return pool


_POOL = _pool()
METHODS: Mapping[str, Method] = {
    one.name: Method(one.name, message_factory.GetMessageClass(one.input_type), one.server_streaming)
    for one in _POOL.FindServiceByName(SERVICE).methods
}


def _class(kind: str) -> type[Message]:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{kind}"))


def make(kind: str, /, **fields: Any) -> Message:
    """A message by its name in the .proto; a field that is None stays absent."""
    return _class(kind)(**{field: value for field, value in fields.items() if value is not None})


def parse(method: Method, content: bytes) -> Any:
    """A method's request. Raises UpdateError, which holds nothing of the bytes."""
    try:
        return method.request.FromString(content)
    except DecodeError:
        pass  # outside the handler: what protobuf raised is no context of ours
    raise UpdateError(f"expected the message {method.request.DESCRIPTOR.name}, its texts in UTF-8, got something else")
