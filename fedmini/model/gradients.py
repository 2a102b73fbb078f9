"""One gradient for each example, written by the LoRA layer's own backward.

A LoRA gradient is small, since the rank is far below the number of tokens: one batched matrix product for each tensor
writes it where it is wanted, and the gradient of the batch is never formed. Opacus's DPOptimizer works on the result
with `grad_sample_mode="no_op"`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fedmini.errors import ConfigError


def _check_indices(indices: torch.Tensor, limit: int) -> None:
    """Raise IndexError for one beside the rows: a kernel would write there."""
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < limit:
        raise IndexError(f"expected rows from 0 to {limit - 1}, got {int(indices.min())} to {int(indices.max())}")


@dataclass(frozen=True, slots=True)
class Devices:
    """Whose example is whose, where each device computes with an adapter of its own."""

    adapters: torch.Tensor  # (num_devices, num_parameters), float32
    owners: torch.Tensor  # (num_examples,), int64: the device of each example, in order
    # How many examples each device has, where it is as many for all: one matrix product for a device, not for an example.
    num_each: int | None

    def __post_init__(self) -> None:
        _check_indices(self.owners, len(self.adapters))

    def part(self, place: int, weight: torch.Tensor) -> torch.Tensor:
        """The devices' values of a tensor whose coordinates begin at `place`: one for each group of `split`."""
        values = self.adapters[:, place : place + weight.numel()]
        if self.num_each is None:
            values = values[self.owners]
        return values.view(len(values), *weight.shape)

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """Examples, or the examples of a device behind each other: (n, t, size) -> (groups, tokens of a group, size)."""
        return values if self.num_each is None else values.reshape(len(self.adapters), -1, values.shape[-1])


@dataclass(frozen=True, slots=True)
class Recording:
    """Where one backward adds its gradients: to a row for each example, or to the rows that `rows` says."""

    flat: torch.Tensor  # (num_rows, num_parameters), float32
    devices: Devices | None = None  # None: every example is computed with the model's own adapter
    rows: torch.Tensor | None = None  # (num_examples,), int64; where there are devices, an example's is its owner's

    def __post_init__(self) -> None:
        if self.rows is not None:
            _check_indices(self.rows, len(self.flat))

    def add(self, place: int, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
        """Add left^T right of each example, times the factor: (n, t, rows), (n, t, columns) -> (rows, columns) each."""
        goal = self.flat[:, place : place + weight.numel()].view(len(self.flat), *weight.shape)
        if self.rows is None:
            goal.baddbmm_(left.transpose(1, 2), right, alpha=factor)
        elif len(self.flat) == 1:
            goal[0].addmm_(left.flatten(0, 1).t(), right.flatten(0, 1), alpha=factor)
        elif self.devices is not None and self.devices.num_each is not None:
            left, right = self.devices.split(left), self.devices.split(right)
            goal.baddbmm_(left.transpose(1, 2), right, alpha=factor)
        else:
            goal.index_add_(0, self.rows, left.transpose(1, 2) @ right, alpha=factor)


@dataclass(slots=True)
class GradientRecorder:
    """Shared by the LoRA layers of one model: while there is a recording, their backward adds to its rows.

    `check` is called by every layer, forward and backward: what it raises ends the step at once.
    """

    recording: Recording | None = None
    check: Callable[[], None] = lambda: None

    @contextmanager
    def to(self, recording: Recording) -> Iterator[None]:
        """Record there until the end of the block."""
        self.recording = recording
        try:
            yield
        finally:
            self.recording = None


class LoraLayer(ABC):
    """A linear layer that carries LoRA; while its recorder is on, backward records instead of filling `.grad`.

    Row i of the input is example i; the first dimension is the batch. `place_of_a`, `place_of_b`: where the tensors'
    coordinates begin in a row; None for one that is frozen. What is recorded equals autograd's gradient of each
    example alone, to float rounding, also under checkpointing.
    """

    recorder: GradientRecorder
    place_of_a: int | None
    place_of_b: int | None
    lora_A: Any  # as PEFT names them: what holds the tensors
    lora_B: Any

    def attach(self, recorder: GradientRecorder, place_of_a: int | None, place_of_b: int | None) -> None:
        self.recorder, self.place_of_a, self.place_of_b = recorder, place_of_a, place_of_b

    @property
    @abstractmethod
    def frozen(self) -> nn.Module:
        """The layer that is adapted."""

    @property
    @abstractmethod
    def a(self) -> nn.Parameter:
        """(lora_rank, num_inputs)"""

    @property
    @abstractmethod
    def b(self) -> nn.Parameter:
        """(num_outputs, lora_rank)"""

    @property
    @abstractmethod
    def factor(self) -> float:
        """What the product of the two tensors is multiplied with."""

    def recorded(self, x: torch.Tensor) -> torch.Tensor | None:
        """The answer whose backward records; None where nothing is recorded. Ends the step where `check` raises."""
        self.recorder.check()
        if x.dim() != 3:
            raise ConfigError(
                "lora.target_modules: a layer of this base gets the tokens of all examples as one, so that the gradients of "
                "each can't be told apart; choose among its other linear layers"
            )
        recording = self.recorder.recording
        if recording is None or (recording.devices is None and not torch.is_grad_enabled()):
            return None
        result: torch.Tensor = _RecordedLora.apply(self.frozen(x), x, self.a, self.b, self)  # type: ignore[no-untyped-call]
        return result


class LoraLinear(LoraLayer, nn.Module):
    """LoRA on a linear layer of our own Llama, without dropout: what PEFT's layer computes."""

    def __init__(self, frozen: nn.Linear, lora_rank: int, factor: float) -> None:
        nn.Module.__init__(self)
        self.base_layer = frozen
        self.lora_A = nn.Linear(frozen.in_features, lora_rank, bias=False)
        self.lora_B = nn.Linear(lora_rank, frozen.out_features, bias=False)
        self._factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (recorded := self.recorded(x)) is not None:
            return recorded
        base: torch.Tensor = self.base_layer(x)
        update: torch.Tensor = self.lora_B(self.lora_A(x.to(self.a.dtype))) * self._factor
        return (base + update).to(base.dtype)

    @property
    def frozen(self) -> nn.Module:
        return self.base_layer

    @property
    def a(self) -> nn.Parameter:
        return cast(nn.Parameter, self.lora_A.weight)

    @property
    def b(self) -> nn.Parameter:
        return cast(nn.Parameter, self.lora_B.weight)

    @property
    def factor(self) -> float:
        return self._factor


class _RecordedLora(torch.autograd.Function):
    """base + scaling * x A^T B^T, in float32 and rounded to the base's type as PEFT does it."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.nn.Parameter,
        b: torch.nn.Parameter,  # an argument, so that the lowest adapted layer takes part in backward
        layer: LoraLayer,
    ) -> torch.Tensor:
        recording = layer.recorder.recording
        assert recording is not None
        hidden = _times(
            x.to(a.dtype), a, layer.place_of_a, recording.devices, transposed=True
        )  # (n, length, lora_rank)
        # Checkpointing hands back other tensor objects: only what this call computed or was given goes through it.
        ctx.save_for_backward(x if layer.place_of_a is not None else None, hidden)
        ctx.layer = layer
        update = _times(hidden, b, layer.place_of_b, recording.devices, transposed=True, factor=layer.factor)
        result: torch.Tensor = (base + update).to(base.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer: LoraLayer = ctx.layer
        layer.recorder.check()
        recording = layer.recorder.recording
        assert recording is not None, "backward ran after recording had ended"
        x, hidden = ctx.saved_tensors
        a, b = layer.a, layer.b
        gradient = gradients[0].to(b.dtype)  # (num_examples, length, num_outputs)
        if layer.place_of_b is not None:
            recording.add(layer.place_of_b, b, gradient, hidden, layer.factor)
        to_x = None
        if layer.place_of_a is not None or ctx.needs_input_grad[1]:
            to_hidden = _times(gradient, b, layer.place_of_b, recording.devices)
            if layer.place_of_a is not None:
                recording.add(layer.place_of_a, a, to_hidden, x.to(a.dtype), layer.factor)
            if ctx.needs_input_grad[1]:
                to_x = _times(to_hidden, a, layer.place_of_a, recording.devices, factor=layer.factor)
                to_x = to_x.to(gradients[0].dtype)
        return gradients[0] if ctx.needs_input_grad[0] else None, to_x, None, None, None


def _times(
    values: torch.Tensor,  # (num_examples, length, size)
    weight: torch.Tensor,
    place: int | None,
    devices: Devices | None,
    *,
    transposed: bool = False,
    factor: float = 1.0,
) -> torch.Tensor:
    """values @ weight, times a factor; where devices train this tensor, each example with its own device's."""
    if devices is None or place is None:
        weight = weight.t() if transposed else weight
        return values @ (weight if factor == 1.0 else weight * factor)
    own = devices.part(place, weight)
    own = own.transpose(1, 2) if transposed else own
    product = devices.split(values) @ (own if factor == 1.0 else own * factor)
    return product.view(*values.shape[:-1], -1)
