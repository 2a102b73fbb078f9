"""A Flower message as the objects that it travels as, for both ends: pulled, checked, pushed."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedmini.errors import LinkError, UpdateError
from fedmini.flower import codec

PULL_SECONDS = 10.0  # a message's head can be there before its objects
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.02, 0.5


class UnfinishedError(LinkError):
    """A part of a message was announced, and is not there yet."""


class Deflated:
    """A message ready to travel: its head without content, its tree, and its objects' bytes by id."""

    __slots__ = ("head", "message_id", "objects", "size_bytes", "tree")

    def __init__(self, message: Message) -> None:
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            self.message_id: str = message.object_id
            self.tree: ObjectTree = get_object_tree(message)
            self.objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
            bare = remove_content_from_message(message) if message.has_content() else message
            self.head: ProtoMessage = message_to_proto(bare)
        self.size_bytes = sum(len(content) for content in self.objects.values())


def pull(
    tree: ObjectTree, ask: Callable[[str], PullObjectResponse], max_payload_bytes: int, wait_s: float = PULL_SECONDS
) -> Message:
    """The message of a tree, its objects asked for one by one.

    Each is what its name, a hash, says. Raises UpdateError where it is more or larger than the payload allows for, or no
    message; LinkError where a part of it is gone, UnfinishedError where one is not there within `wait_s`.
    """
    names = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
    if len(names) > codec.num_objects(max_payload_bytes):
        raise UpdateError(f"a message of {len(names)} objects came, larger than expected")
    contents: dict[str, bytes] = {}
    left = max_payload_bytes + 2 * codec.MAX_HEAD_BYTES
    until = time.monotonic() + wait_s
    for name in names:
        content = _pull_one(name, ask, until)
        left -= len(content)
        if left < 0:
            raise UpdateError(f"a message of more than {max_payload_bytes} bytes came: refused")
        if get_object_id(content) != name:
            raise UpdateError("an object came that is not what its name says")
        contents[name] = content
    try:
        message = inflate_object_from_contents(tree.object_id, contents)
    except Exception as error:  # Flower's parsers raise what they meet
        raise UpdateError(f"a message came that can't be read ({type(error).__name__})") from error
    if not isinstance(message, Message):
        raise UpdateError("an object came that is no message")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def _pull_one(name: str, ask: Callable[[str], PullObjectResponse], until: float) -> bytes:
    wait = FIRST_WAIT_SECONDS
    while True:
        found = ask(name)
        if not found.object_found:
            raise LinkError("a part of a message is gone: it was taken back, or is too old")
        if found.object_available:
            return bytes(found.object_content)
        if time.monotonic() >= until:
            raise UnfinishedError("a part of a message was announced and never came")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def push(objects: Iterable[tuple[str, bytes]], send: Callable[[str, bytes], bool]) -> None:
    """Send objects, a few at a time. Raises LinkError where one is not taken."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        if not all(list(pool.map(lambda one: send(*one), objects))):
            raise LinkError("a part of a message was not taken: the other side gave up waiting for it")
