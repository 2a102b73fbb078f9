"""Causal attention for short sequences on a CPU, where torch's fused kernel spends most of backward on conversions.

Heads that share a key are multiplied as one; probabilities are in float32, and computed again in backward instead of
kept. In bfloat16 a whole training step takes 0.75 to 0.8 of its time with the fused kernel (24 examples of 64 tokens,
8 of 128), in the same memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

LONGEST = 256  # tokens; above, the fused kernel's memory counts for more


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens stand: how their queries and keys are turned (arXiv:2104.09864)."""

    table: torch.Tensor  # (places, 2, head_dim / 2), float32: cosines and sines
    first: int
    length: int

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """(examples, heads, length, head_dim), each half of a head with the other."""
        cosines, sines = self.table[self.first : self.first + self.length].to(heads.dtype).unbind(1)
        left, right = heads.chunk(2, dim=-1)
        return torch.cat((left * cosines - right * sines, right * cosines + left * sines), dim=-1)


class Rotations:
    """The table of all places so far."""

    def __init__(self, head_dim: int, base: float) -> None:
        self._head_dim, self._base = head_dim, base
        self._table: torch.Tensor | None = None

    def of(self, first: int, length: int, device: torch.device) -> Places:
        """`length` places from `first` on."""
        end = first + length
        if self._table is None or len(self._table) < end or self._table.device != device:
            turns = 1.0 / (self._base ** (torch.arange(0, self._head_dim, 2, dtype=torch.float32) / self._head_dim))
            angles = torch.arange(max(2 * end, LONGEST), dtype=torch.float32)[:, None] * turns
            self._table = torch.stack((angles.cos(), angles.sin()), dim=1).to(device)
        return Places(self._table, first, length)


class KeyValueCache:
    """Keys and values of the tokens read so far, a pair for each layer: (examples, key heads, length, head_dim)."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()) -> None:
        self.layers = list(layers)

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extended(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values behind those of a layer; where no gradient is taken, the cache then holds them all."""
        if index > len(self.layers):
            raise IndexError(f"layer {index} of a cache of {len(self.layers)}: those below it come first")
        if index < len(self.layers):
            old_key, old_value = self.layers[index]
            key, value = torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)
        if not torch.is_grad_enabled():
            self.layers[index : index + 1] = [(key, value)]
        return key, value


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """(examples, heads, length, head_dim), from keys and values (examples, key heads, prefix + length, head_dim).

    More keys than queries: a prefix was read before, and every query sees all of it. No mask: a batch is padded on the
    right, and nothing looks at what follows it.
    """
    if query.is_cpu and key.shape[2] <= LONGEST and torch.is_grad_enabled():
        answer: torch.Tensor = _CausalAttention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
        return answer
    return _by_torch(query, key, value, scaling)


def _by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same through torch's own kernel."""
    length, num_keys = query.shape[2], key.shape[2]
    is_square = length == num_keys
    mask = None if is_square or length == 1 else ~_future(length, num_keys, query.device)
    return functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_square and length > 1, scale=scaling, enable_gqa=True
    )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(query, key, value)
        queries = grouped(query, key)
        probabilities = _probabilities(queries, key.flatten(0, 1), scaling, query.shape[2])
        return (probabilities.to(value.dtype) @ value.flatten(0, 1)).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        queries, keys, values = grouped(query, key), key.flatten(0, 1), value.flatten(0, 1)
        gradient = grouped(gradients[0], key)
        probabilities = _probabilities(queries, keys, ctx.scaling, query.shape[2])
        to_value = probabilities.to(value.dtype).transpose(1, 2) @ gradient
        to_scores = (gradient @ values.transpose(1, 2)).float()
        to_scores -= (to_scores * probabilities).sum(dim=-1, keepdim=True)
        to_scores = to_scores.mul_(probabilities).mul_(ctx.scaling).to(query.dtype)
        to_query = (to_scores @ keys).view(query.shape)
        to_key = to_scores.transpose(1, 2) @ queries
        return to_query, to_key.view(key.shape), to_value.view(value.shape), None


def grouped(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Queries of one key together: (examples * key heads, heads of a key * length, head_dim)."""
    return query.reshape(key.shape[0] * key.shape[1], -1, query.shape[3])


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, scaling: float, length: int) -> torch.Tensor:
    """float32, (batch * key heads, heads of a key * length, prefix + length); zero for what follows."""
    scores = (queries @ keys.transpose(1, 2)).float().mul_(scaling)
    num_keys = keys.shape[1]
    scores.view(len(scores), -1, length, num_keys).masked_fill_(_future(length, num_keys, scores.device), -torch.inf)
    return scores.softmax(dim=-1)


def _future(length: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(length, num_keys): which keys follow a query."""
    return torch.ones(length, num_keys, dtype=torch.bool, device=device).triu_(num_keys - length + 1)
