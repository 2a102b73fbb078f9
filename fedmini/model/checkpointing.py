"""Layers whose activations are computed again in backward instead of kept: less memory, a third more time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedmini.errors import ConfigError


class Checkpointing:
    """A model's layers, made ready to be checkpointed; of no model, nothing. Raises ConfigError where it has none."""

    def __init__(self, model: PreTrainedModel | None) -> None:
        self._layers: list[GradientCheckpointingLayer] = []
        if model is None:
            return
        self._layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not self._layers:
            raise ConfigError(f"local.checkpointing: {type(model).__name__} doesn't support it; say false")
        for layer in self._layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(_recompute, layer)  # type: ignore[assignment]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Checkpoint what is computed in the block."""
        # transformers checkpoints a layer that is in training mode; what is inside it stays in eval mode.
        for layer in self._layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.training = False


def _recompute(layer: GradientCheckpointingLayer, compute: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a layer's forward. Some layers call dropout themselves and look at their own mode: it is eval mode here."""

    def evaluated(*inputs: Any) -> Any:
        layer.training = False
        try:
            return compute(*inputs)
        finally:
            layer.training = True

    return checkpoint(evaluated, *inputs, use_reentrant=False, preserve_rng_state=False)
