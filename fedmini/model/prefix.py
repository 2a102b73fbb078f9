"""A beginning that examples share, a chat template's system turn for the most part: read once, not n times.

Where no gradient is taken, whatever a batch happens to share may be read once. Where one is, only a public constant may.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch

from fedmini.model.adaptation import Causal
from fedmini.model.attention import KeyValueCache
from fedmini.model.gradients import Devices, GradientRecorder, Recording
from fedmini.model.llama import Llama
from fedmini.model.loss import TokenBatch
from fedmini.types import EncodedExample

if TYPE_CHECKING:
    from transformers import DynamicCache

Cache = Union[KeyValueCache, "DynamicCache"]

MIN_LENGTH = 4  # tokens; a shorter beginning is not worth a pass of its own


def shared_length(batch: TokenBatch) -> int:
    """How many tokens all examples begin with alike, before any position that predicts a target."""
    limit = int(batch.columns.min())
    alike = (batch.tokens[:, :limit] == batch.tokens[:1, :limit]).all(dim=0)
    length = int(alike.long().cumprod(0).sum())
    return length if length >= MIN_LENGTH else 0


def begins_with(example: EncodedExample, tokens: Sequence[int]) -> bool:
    """Whether an example begins with these tokens, none of which predicts a target; decided by this example alone."""
    length = len(tokens)
    return (
        0 < length < len(example.tokens)
        and not example.is_target[: length + 1].any()
        and np.array_equal(example.tokens[:length], np.asarray(tokens))
    )


class PrefixReader:
    """Keys and values of a shared beginning, kept until the tokens or the trained tensors change."""

    def __init__(self, model: Causal, trained: Sequence[torch.Tensor]) -> None:
        self._model, self._trained = model, tuple(trained)
        self._body: Any = model.base_model
        self._key: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(self, tokens: torch.Tensor, num_examples: int, recorder: GradientRecorder | None = None) -> Cache:
        """A cache of `tokens` (length,), as if each of `num_examples` examples had read them; no gradient goes through.

        Where the recorder has devices with adapters of their own, each device reads them, for its own examples.
        """
        recording = None if recorder is None else recorder.recording
        if recorder is not None and recording is not None and recording.devices is not None:
            return self._read_by_each(tokens, recording.devices, recorder)
        key = (tuple(tokens.tolist()), tuple(tensor._version for tensor in self._trained))
        if key != self._key:
            self._layers = self._read_anew(tokens[None])  # (1, heads, length, head size)
            self._key = key
        return self._cache_of(
            [
                (keys.expand(num_examples, -1, -1, -1), values.expand(num_examples, -1, -1, -1))
                for keys, values in self._layers
            ]
        )

    def _read_by_each(self, tokens: torch.Tensor, devices: Devices, recorder: GradientRecorder) -> Cache:
        num_devices, outer = len(devices.adapters), recorder.recording
        each = Devices(devices.adapters, torch.arange(num_devices, device=tokens.device), num_each=1)
        try:
            recorder.recording = Recording(devices.adapters, each)  # nothing is recorded without a gradient
            layers = self._read_anew(tokens.expand(num_devices, -1))
        finally:
            recorder.recording = outer
        return self._cache_of([(keys[devices.owners], values[devices.owners]) for keys, values in layers])

    @torch.no_grad()
    def _read_anew(self, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, (rows of tokens, heads, length, head size)."""
        cache = self._cache_of([])
        self._body(input_ids=tokens, use_cache=True, past_key_values=cache)
        if isinstance(cache, KeyValueCache):
            return cache.layers
        return [_read_tensors(layer) for layer in cache.layers]

    def _cache_of(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Cache:
        if isinstance(self._model, Llama):
            return KeyValueCache(layers)
        from transformers import DynamicCache

        fresh = DynamicCache()
        for index, (keys, values) in enumerate(layers):
            fresh.update(keys.contiguous(), values.contiguous(), index)
        return fresh


def _read_tensors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values
