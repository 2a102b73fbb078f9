"""What this process and its workers say to each other: tensors and a few words in a frame, over a pipe. No pickle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import load, save

from fedmini.types import DeviceId, EncodedExample

_WORDS = "words"


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: what kind it is and what goes with it, as JSON, and tensors by name."""

    words: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)


def write(pipe: BinaryIO, frame: Frame) -> None:
    """Send a frame whole."""
    words = np.frombuffer(json.dumps(frame.words).encode(), np.uint8)
    content = save({_WORDS: words, **{name: np.ascontiguousarray(value) for name, value in frame.tensors.items()}})
    pipe.write(len(content).to_bytes(8, "little") + content)
    pipe.flush()


def read(pipe: BinaryIO) -> Frame | None:
    """The next frame; None where the other side has gone."""
    size = pipe.read(8)
    content = pipe.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    if len(size) < 8 or len(content) < int.from_bytes(size, "little"):
        return None
    tensors = load(content)
    words = json.loads(tensors.pop(_WORDS).tobytes())
    return Frame(words, tensors)


def pack_examples(devices: Sequence[Sequence[EncodedExample]]) -> dict[str, np.ndarray[Any, Any]]:
    """The examples of several devices behind each other."""
    examples = [example for own in devices for example in own]
    return {
        "num_examples": np.array([len(own) for own in devices], np.int64),
        "lengths": np.array([len(example.tokens) for example in examples], np.int64),
        "tokens": np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in examples)]).astype(np.int32),
        "is_target": np.concatenate([np.zeros(0, np.bool_), *(example.is_target for example in examples)]),
    }


def unpack_examples(
    names: Sequence[DeviceId], tensors: Mapping[str, np.ndarray[Any, Any]]
) -> dict[DeviceId, list[EncodedExample]]:
    """The examples of each device, as `pack_examples` put them together."""
    ends = np.cumsum(tensors["lengths"])
    parts = zip(np.split(tensors["tokens"], ends), np.split(tensors["is_target"], ends), strict=True)
    examples = [EncodedExample(tokens, is_target) for tokens, is_target in parts][:-1]  # nothing follows the last end
    firsts = np.cumsum([0, *tensors["num_examples"]])
    return {name: examples[firsts[index] : firsts[index + 1]] for index, name in enumerate(names)}
