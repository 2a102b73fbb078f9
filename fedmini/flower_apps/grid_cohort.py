"""Devices behind a Grid of Flower's: which node is which, and the sum of what they give, one reply in memory at a time."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmini.errors import ConfigError, StateError
from fedmini.flower_apps import messages
from fedmini.privacy import encoding
from fedmini.types import CohortSum, DeviceId, Manifest, Residues

POLL_SECONDS = 0.05
RESEND_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # a worker that was killed needs some to start anew
FIRST_ANSWER_SECONDS = 180.0  # the workers may have to start first


def find_nodes(grid: Grid, devices: Sequence[DeviceId], wait_s: float = FIRST_ANSWER_SECONDS) -> dict[DeviceId, int]:
    """The node of each device: partition i is the i-th name. Raises ConfigError where there are too few nodes.

    Nodes appear one by one when a simulation begins, and only a node itself knows which partition it is.
    """
    until, partitions, num_partitions = time.monotonic() + wait_s, dict[int, int](), 0
    while not partitions or len(partitions) < num_partitions:
        if time.monotonic() > until:
            raise ConfigError(f"{len(partitions)} simulated nodes answered in {wait_s:.0f} s: does the simulation run?")
        new = [node for node in grid.get_node_ids() if node not in partitions.values()]
        for node, reply in _exchange(grid, new, messages.ASK_PARTITION, RecordDict(), until):
            partition = messages.unpack_partition(reply)
            partitions[partition.index], num_partitions = node, partition.of
        if not new:
            time.sleep(POLL_SECONDS)
    if len(partitions) < len(devices):
        raise ConfigError(
            f"the run has {len(devices)} devices, and Flower simulates {len(partitions)} nodes: "
            f"flwr run ... --federation-config 'num-supernodes={len(devices)}'"
        )
    return {device: partitions[index] for index, device in enumerate(sorted(devices))}


def sum_contributions(
    grid: Grid,
    nodes: Sequence[int],
    task: RecordDict,
    manifest: Manifest,
    on_answer: Callable[[], None],
) -> CohortSum:
    """The sum of what the devices at these nodes give.

    Raises StateError where one fails: in a simulation that is a mistake to mend, not a device that dropped out.
    """
    total: Residues = np.zeros(manifest.num_coordinates, np.uint32)
    for _, reply in _exchange(grid, nodes, messages.ASK_CONTRIBUTION, task):
        total = encoding.add(total, messages.unpack_vector(reply, manifest), manifest.release.modulus_bits)
        on_answer()
    return CohortSum(total, len(nodes))


def _exchange(
    grid: Grid, nodes: Sequence[int], message_type: str, content: RecordDict, until: float = float("inf")
) -> Iterator[tuple[int, RecordDict]]:
    """Send one content to these nodes, and give the answers as they come, until all are there or it is `until`.

    A node whose worker was lost is sent the same once more, after each of RESEND_SECONDS: its task is computed anew.
    """
    pending = {_push(grid, Message(content, node, message_type)): node for node in nodes}
    num_lost, later = Counter[int](), dict[int, float]()  # by node: how often, and when to send again
    while (pending or later) and time.monotonic() < until:
        came = False
        for node in [node for node, due in later.items() if due <= time.monotonic()]:
            del later[node]
            pending[_push(grid, Message(content, node, message_type))] = node
        for message_id, node in tuple(pending.items()):
            for reply in grid.pull_messages([message_id]):
                came = True
                del pending[message_id]
                if _is_of_a_lost_worker(reply) and num_lost[node] < len(RESEND_SECONDS):
                    later[node] = time.monotonic() + RESEND_SECONDS[num_lost[node]]
                    num_lost[node] += 1
                else:
                    yield node, _content(reply)
        if not came:
            time.sleep(POLL_SECONDS)


def _push(grid: Grid, message: Message) -> str:
    """Send a message, and give its id."""
    pushed = list(grid.push_messages([message]))  # one by one: refused ones are left out
    if not pushed or not pushed[0]:
        raise StateError(f"Flower did not take a message to node {message.metadata.dst_node_id}: see its log")
    return pushed[0]


def _is_of_a_lost_worker(reply: Message) -> bool:
    """Whether Flower says that it could not run the app, killed as its worker was; what the app itself raised has a code."""
    return reply.has_error() and reply.error.code == ErrorCode.UNKNOWN


def _content(reply: Message) -> RecordDict:
    if _is_of_a_lost_worker(reply):
        raise StateError(
            f"a worker was lost {len(RESEND_SECONDS) + 1} times with the same device: its machine may have run out of memory; "
            "give the run fewer workers, and go on with it where it stopped"
        )
    if reply.has_error():
        raise StateError(f"a device failed: {reply.error.reason or f'code {reply.error.code} of Flower'}")
    return reply.content
