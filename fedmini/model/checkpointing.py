"""Layers whose activations are computed again in backward instead of kept: less memory, a third more time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedmini.errors import ConfigError
from fedmini.model.adaptation import Causal
from fedmini.model.llama import Llama, LlamaBody

if TYPE_CHECKING:
    from transformers.modeling_layers import GradientCheckpointingLayer


class Checkpointing:
    """A model's layers, made ready to be checkpointed; of no model, nothing. Raises ConfigError where it has none."""

    def __init__(self, model: Causal | None) -> None:
        self._ours: LlamaBody | None = model.model if isinstance(model, Llama) else None
        self._layers: list[nn.Module] = []
        if model is None or self._ours is not None:
            return
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in (layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(_recompute, layer)  # type: ignore[assignment]
            self._layers.append(layer)
        if not self._layers:
            raise ConfigError(f"local.checkpointing: {type(model).__name__} doesn't support it; say false")

    @contextmanager
    def on(self) -> Iterator[None]:
        """Checkpoint what is computed in the block."""
        if self._ours is not None:
            self._ours.checkpoints_layers = True
        # transformers checkpoints a layer that is in training mode; what is inside it stays in eval mode.
        for layer in self._layers:
            layer.training = True
        try:
            yield
        finally:
            if self._ours is not None:
                self._ours.checkpoints_layers = False
            for layer in self._layers:
                layer.training = False


def _recompute(layer: "GradientCheckpointingLayer", compute: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a layer's forward. Some layers call dropout themselves and look at their own mode: it is eval mode here."""

    def evaluated(*inputs: Any) -> Any:
        layer.training = False
        try:
            return compute(*inputs)
        finally:
            layer.training = True

    return checkpoint(evaluated, *inputs, use_reentrant=False, preserve_rng_state=False)
