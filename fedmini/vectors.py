"""An adapter as one flat vector and back, checked against the template of its run."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmini.errors import UpdateError
from fedmini.types import Adapter, Template, Vector

# Coordinates at once: as float64 they stay in the processor's cache, and no BLAS starts threads for them.
BLOCK_SIZE = 2**13


def num_parameters(template: Template) -> int:
    """How many coordinates an adapter of this template has."""
    return sum(math.prod(shape) for _, shape in template)


def check(adapter: Mapping[str, Any], template: Template) -> None:
    """Raise UpdateError, naming the tensor, unless the adapter has exactly the template's float32 tensors, all finite."""
    for name in sorted(set(adapter) - {name for name, _ in template}):
        raise UpdateError(f"{name}: not a tensor of this run; remove it")
    for name, shape in template:
        if name not in adapter:
            raise UpdateError(f"{name}: expected a tensor of shape {shape}, it is missing")
        value = adapter[name]
        if not isinstance(value, np.ndarray) or value.dtype != np.float32:
            raise UpdateError(f"{name}: expected float32, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.shape != shape:
            raise UpdateError(f"{name}: expected shape {shape}, got {value.shape}")
        if not np.isfinite(value).all():
            raise UpdateError(f"{name}: holds values that are not finite")


def flatten(adapter: Adapter, template: Template) -> Vector:
    """All tensors as one float32 vector (num_parameters,), in the template's order, C order within a tensor.

    Raises UpdateError as `check` does.
    """
    check(adapter, template)
    if not template:
        return np.zeros(0, np.float32)
    return np.concatenate([adapter[name].reshape(-1) for name, _ in template])


def unflatten(vector: Vector, template: Template) -> Adapter:
    """The adapter that `flatten` turned into this vector; its tensors are copies, float32."""
    if vector.shape != (num_parameters(template),):
        raise UpdateError(f"expected a vector of shape ({num_parameters(template)},), got {vector.shape}")
    tensors = {}
    start = 0
    for name, shape in template:
        stop = start + math.prod(shape)
        tensors[name] = vector[start:stop].reshape(shape).astype(np.float32)
        start = stop
    return tensors


def to_bytes(adapter: Adapter, template: Template) -> bytes:
    """An adapter as it travels: the flat vector's little-endian float32 bytes. Raises UpdateError as `check` does."""
    return flatten(adapter, template).astype("<f4", copy=False).tobytes()


def from_bytes(content: bytes, template: Template) -> Adapter:
    """The adapter that `to_bytes` wrote. Raises UpdateError where the length is another's; values are not looked at."""
    expected = 4 * num_parameters(template)
    if len(content) != expected:
        raise UpdateError(f"expected a model of {expected} bytes, got {len(content)}")
    return unflatten(np.frombuffer(content, "<f4"), template)


def norm(vector: Vector) -> float:
    """The L2 norm of float32 coordinates, taken in float64, where it can't overflow; not finite where one of them isn't."""
    block = np.empty(min(vector.size, BLOCK_SIZE), np.float64)
    total = 0.0
    for start in range(0, vector.size, BLOCK_SIZE):
        part = vector[start : start + BLOCK_SIZE]
        values = block[: part.size]
        values[:] = part
        total += float(values @ values)
    return math.sqrt(total)
