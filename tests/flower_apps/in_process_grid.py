"""Flower's Grid without its simulation engine: the ClientApp is called in this process, as the engine would call it."""

import copy
from collections.abc import Iterable
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class InProcessGrid(Grid):
    """So many nodes, each with its partition; answers come in the order in which they are asked for."""

    def __init__(self, app: ClientApp, num_nodes: int) -> None:
        self._app = app
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # as Flower sets them before a main
        self._contexts = {
            100 + 7 * index: a_context({"partition-id": index, "num-partitions": num_nodes})
            for index in reversed(range(num_nodes))
        }
        self._names = count()
        self._waiting: dict[str, Message] = {}
        self.num_asked = 0
        self.fail_after: int | None = None  # answers
        self.lost_answers: frozenset[int] = frozenset()  # by their numbers, from 1: a worker is killed then

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        name = f"message-{next(self._names)}"
        message.metadata.__dict__["_message_id"] = name
        self._waiting[name] = copy.deepcopy(message)  # a real node gets its own
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self._waiting.pop(name) for name in message_ids if name in self._waiting]
        self.num_asked += len(found)
        return [self._answer(message) for message in found]

    def _answer(self, message: Message) -> Message:
        if self.fail_after is not None and self.num_asked > self.fail_after:
            return Message(Error(2, "out of memory"), reply_to=message)
        if self.num_asked in self.lost_answers:
            return Message(Error(0, "<class 'ActorDiedError'>:<'The actor died\nin many lines'>"), reply_to=message)
        return self._app(message, self._contexts[message.metadata.dst_node_id])

    def send_and_receive(self, messages: Iterable[Message], *, timeout=None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def a_context(node_config: dict) -> Context:
    """A node's context, as Flower makes one."""
    return Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})


def a_run(config: str = "", output: str = "", **more: str) -> Context:
    """A ServerApp's context, with the run config that `flwr run` would give it."""
    declared = {"config": config, "output": output, "server-folder": "", "run": "", **more}
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=declared)
