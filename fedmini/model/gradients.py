"""One gradient for each example, written by the LoRA layer's own backward.

A LoRA gradient is small, since the rank is far below the number of tokens: one batched matrix product for each tensor
writes it where it is wanted, and the gradient of the batch is never formed. Opacus's DPOptimizer works on the result
with `grad_sample_mode="no_op"`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear


@dataclass(slots=True)
class GradientRecorder:
    """Shared by the LoRA layers of one model: while `flat` is set, their backward adds to its rows.

    `check` is called by every layer, forward and backward: what it raises ends the step at once.
    """

    flat: torch.Tensor | None = None  # (num_examples, num_parameters), float32
    check: Callable[[], None] = lambda: None


class RecordingLinear(Linear):
    """PEFT's LoRA layer; while its recorder is on, backward records instead of filling `.grad`.

    Row i of the input is example i; the first dimension is the batch. `place_of_a`, `place_of_b`: where the tensors'
    coordinates begin in a row; None for one that is frozen. What is recorded equals autograd's gradient of each
    example alone, to float rounding, also under checkpointing.
    """

    recorder: GradientRecorder
    place_of_a: int | None
    place_of_b: int | None

    def attach(self, recorder: GradientRecorder, place_of_a: int | None, place_of_b: int | None) -> None:
        self.recorder, self.place_of_a, self.place_of_b = recorder, place_of_a, place_of_b

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.recorder.check()
        if self.recorder.flat is None or not torch.is_grad_enabled():
            plain: torch.Tensor = super().forward(x, *args, **kwargs)
            return plain
        result: torch.Tensor = _RecordedLora.apply(self.base_layer(x), x, self.a, self.b, self)  # type: ignore[no-untyped-call]
        return result

    @property
    def a(self) -> torch.nn.Parameter:
        return cast(torch.nn.Parameter, self.lora_A[self.active_adapters[0]].weight)

    @property
    def b(self) -> torch.nn.Parameter:
        return cast(torch.nn.Parameter, self.lora_B[self.active_adapters[0]].weight)

    def record(self, place: int, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left^T right of each example, times the scaling: (n, t, rows), (n, t, columns) -> (n, rows, columns)."""
        flat = self.recorder.flat
        assert flat is not None, "backward ran after recording had ended"
        rows = flat[:, place : place + weight.numel()].view(len(flat), *weight.shape)
        rows.baddbmm_(left.transpose(1, 2), right, alpha=self.scaling[self.active_adapters[0]])


class _RecordedLora(torch.autograd.Function):
    """base + scaling * x A^T B^T, in float32 and rounded to the base's type as PEFT does it."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.nn.Parameter,
        b: torch.nn.Parameter,  # an argument, so that the lowest adapted layer takes part in backward
        layer: RecordingLinear,
    ) -> torch.Tensor:
        hidden = x.to(a.dtype) @ a.t()  # (num_examples, length, lora_rank)
        # Checkpointing hands back other tensor objects: only what this call computed or was given goes through it.
        ctx.save_for_backward(x if layer.place_of_a is not None else None, hidden)
        ctx.layer = layer
        update = hidden @ (b.t() * layer.scaling[layer.active_adapters[0]])
        result: torch.Tensor = (base + update).to(base.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer: RecordingLinear = ctx.layer
        layer.recorder.check()
        x, hidden = ctx.saved_tensors
        a, b = layer.a, layer.b
        gradient = gradients[0].to(b.dtype)  # (num_examples, length, num_outputs)
        if layer.place_of_b is not None:
            layer.record(layer.place_of_b, b, gradient, hidden)
        to_x = None
        if layer.place_of_a is not None or ctx.needs_input_grad[1]:
            to_hidden = gradient @ b
            if layer.place_of_a is not None:
                layer.record(layer.place_of_a, a, to_hidden, x.to(a.dtype))
            if ctx.needs_input_grad[1]:
                scaling = layer.scaling[layer.active_adapters[0]]
                to_x = (to_hidden @ (a * scaling)).to(gradients[0].dtype)
        return gradients[0] if ctx.needs_input_grad[0] else None, to_x, None, None, None
