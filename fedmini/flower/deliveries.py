"""Messages that SuperLink gave out and no device has confirmed: given again to a device that asks again.

SuperLink marks a message as delivered when it answers, so an answer that a broken connection swallowed would be lost,
and with a phone connections break while a poll is held. In memory only: who kills the gate in that moment loses the
message, and the server's time-out for a stage is what goes on.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flwr.proto.message_pb2 import Metadata

from fedmini.flower.answers import Answer
from fedmini.flower.bells import Bell

MAX_GIVEN = 4  # a message that a device can't take must not stop those behind it


@dataclass(frozen=True, slots=True)
class Given:
    """One message that was given out."""

    message_id: str
    expires: float  # Unix time
    answer: Answer
    times: int = 0


class Deliveries:
    """By node, what was given out and not confirmed, oldest first."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._open: dict[Bell, list[Given]] = {}

    def add(self, node: Bell, metadata: Metadata, answer: Answer) -> None:
        """Note an answer that SuperLink won't give again, and whose message it holds."""
        given = Given(metadata.message_id, metadata.created_at + metadata.ttl, answer)
        self._open.setdefault(node, []).append(given)

    def next(self, node: Bell) -> Answer | None:
        """The answer to give a node that asks, if there is one; each is given a few times at most."""
        usable = [one for one in self._open.get(node, ()) if one.times < MAX_GIVEN and one.expires > self._clock()]
        if not usable:
            self.forget(node)
            return None
        first = replace(usable[0], times=usable[0].times + 1)
        self._open[node] = [first, *usable[1:]]
        return first.answer

    def confirm(self, node: Bell, message_id: str) -> None:
        """Forget a message that a node has, or has given up."""
        kept = [given for given in self._open.get(node, ()) if given.message_id != message_id]
        if kept:
            self._open[node] = kept
        else:
            self.forget(node)

    def forget(self, node: Bell) -> None:
        """Forget a node's messages."""
        self._open.pop(node, None)
