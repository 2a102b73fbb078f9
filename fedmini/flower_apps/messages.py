"""What a ServerApp and the ClientApps of a simulation say to each other: plain records, one value of bytes for numbers."""

from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedmini.errors import UpdateError
from fedmini.types import Manifest, Residues

PARTITION, CONTRIBUTE = "partition", "contribute"  # the actions; with their categories, the types of messages:
ASK_PARTITION, ASK_CONTRIBUTION = f"query.{PARTITION}", f"train.{CONTRIBUTE}"
RECORD = "fedmini"


@dataclass(frozen=True, slots=True)
class SimulatedTask:
    """One round's work, and the run that it is of: a worker may never have heard of it."""

    config: str  # the run's settings as TOML, everything that was "auto" resolved
    record: bytes  # the run's manifest.json
    round_num: int
    attempt: int
    adapter: bytes  # as `vectors.to_bytes` gives it


@dataclass(frozen=True, slots=True)
class Partition:
    """Which of Flower's partitions a node is, and of how many."""

    index: int
    of: int


def pack_task(task: SimulatedTask) -> RecordDict:
    """A task as a message's content; all devices of a round can share it."""
    record = ConfigRecord(
        {
            "config": task.config,
            "record": task.record,
            "round_num": task.round_num,
            "attempt": task.attempt,
            "adapter": task.adapter,
        }
    )
    return RecordDict({RECORD: record})


def unpack_task(content: RecordDict) -> SimulatedTask:
    """The task in a message's content. Raises UpdateError."""
    config, record, adapter = (_value(content, name) for name in ("config", "record", "adapter"))
    round_num, attempt = _value(content, "round_num"), _value(content, "attempt")
    if not (isinstance(config, str) and isinstance(record, bytes) and isinstance(adapter, bytes)):
        raise UpdateError("a task's settings, manifest or adapter is missing: is the other side the same fedmini?")
    return SimulatedTask(config, record, _whole(round_num), _whole(attempt), adapter)


def pack_vector(vector: Residues) -> RecordDict:
    """A contribution as a reply's content: little-endian, 4 bytes a number."""
    return RecordDict({RECORD: ConfigRecord({"vector": vector.astype("<u4", copy=False).tobytes()})})


def unpack_vector(content: RecordDict, manifest: Manifest) -> Residues:
    """The contribution in a reply's content, (num_coordinates,). Raises UpdateError where it is no vector of this run."""
    vector, expected = _value(content, "vector"), 4 * manifest.num_coordinates
    if not isinstance(vector, bytes) or len(vector) != expected:
        raise UpdateError(f"expected a contribution of {expected} bytes, got another: is it the same fedmini?")
    return np.frombuffer(vector, "<u4").astype(np.uint32)


def pack_partition(partition: Partition) -> RecordDict:
    """A node's place as a reply's content."""
    return RecordDict({RECORD: ConfigRecord({"index": partition.index, "of": partition.of})})


def unpack_partition(content: RecordDict) -> Partition:
    """The node's place in a reply's content. Raises UpdateError."""
    return Partition(_whole(_value(content, "index")), _whole(_value(content, "of")))


def _value(content: RecordDict, name: str) -> object:
    record = content.get(RECORD)
    return record.get(name) if isinstance(record, ConfigRecord) else None


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise UpdateError("a message's number is missing or negative: is the other side the same fedmini?")
    return value
