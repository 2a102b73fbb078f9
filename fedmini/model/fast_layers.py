"""A Llama layer through compiled kernels: forward and backward by hand, each small step one pass over its numbers.

What a layer keeps for backward: its two inputs to a norm, turned queries and keys, values, gate and up, and of each LoRA
layer the product with A. LoRA's gradients are recorded as gradients.py says, also where all examples have one row.
"""

from typing import Any, cast

import torch
from torch import nn

from fedmini.model import attention, native
from fedmini.model.gradients import LoraLayer
from fedmini.model.layer_kernels import LayerKernels, LoraWeight
from fedmini.model.llama_parts import Attention, GatedNetwork, RmsNorm
from fedmini.model.packed_layers import PackedLinear


def can_do(hidden: torch.Tensor) -> bool:
    """Whether there are kernels for these numbers."""
    return native.kernel_for(hidden) is not None


def layer(
    norms: tuple[RmsNorm, RmsNorm],
    parts: tuple[Attention, GatedNetwork],
    hidden: torch.Tensor,
    places: attention.Places,
    cache: attention.KeyValueCache | None,
) -> torch.Tensor:
    """What a layer of a Llama gives, to float rounding."""
    hidden, normed = norm(norms[0], hidden)
    hidden = _attention(parts[0], normed, hidden, places, cache)
    hidden, normed = norm(norms[1], hidden)
    return _network(parts[1], normed, hidden)


def norm(module: RmsNorm, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, its norm): a gradient that comes back through both is summed in one pass."""
    found: tuple[torch.Tensor, torch.Tensor] = _Norm.apply(hidden, module)  # type: ignore[no-untyped-call]
    return found


def _attention(
    module: Attention,
    x: torch.Tensor,
    residual: torch.Tensor,
    places: attention.Places,
    cache: attention.KeyValueCache | None,
) -> torch.Tensor:
    flat = _project(x, (module.q_proj, module.k_proj, module.v_proj))
    num_keys = places.first + places.length
    if cache is not None or num_keys > attention.LONGEST or not torch.is_grad_enabled():
        query, key, value = (
            _Heads.apply(one, module.head_dim, places if turned else None)  # type: ignore[no-untyped-call]
            for one, turned in zip(flat, (True, True, False), strict=True)
        )
        if cache is not None:
            key, value = cache.extended(module.index, key, value)
        heads = attention.attend(query, key, value, module.scaling).transpose(1, 2).flatten(2)
    else:
        heads = _Attention.apply(*flat, module.head_dim, places, module.scaling)  # type: ignore[no-untyped-call]
    (answer,) = _project(heads, (module.o_proj,), residual)
    return answer


def _network(module: GatedNetwork, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    gate, up = _project(x, (module.gate_proj, module.up_proj))
    gated: torch.Tensor = _Gate.apply(gate, up)  # type: ignore[no-untyped-call]
    (answer,) = _project(gated, (module.down_proj,), residual)
    return answer


def _project(
    x: torch.Tensor, layers: tuple[nn.Module, ...], residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """What linear layers say of one input, added to `residual` where there is one layer and that."""
    adapted = [one for one in layers if isinstance(one, LoraLayer)]
    for one in adapted:
        one.recorder.check()
    records = all(one.recorder.recording is not None for one in adapted)
    if not records and torch.is_grad_enabled():  # autograd itself is to find the gradient
        answers = tuple(one(x) for one in layers)
        return answers if residual is None else tuple(residual + answer for answer in answers)
    trained = (one.b for one in adapted)  # arguments, so that the lowest adapted layer takes part in backward
    found: tuple[torch.Tensor, ...] = _Projection.apply(x, residual, layers, *trained)  # type: ignore[no-untyped-call]
    return found


def _kernels() -> LayerKernels:
    kernel = native.current()
    assert kernel is not None, "the kernels went away"
    return kernel.layers


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, module: RmsNorm) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.module = module
        hidden = hidden.contiguous()
        normed, scales = _kernels().norm(hidden, module.weight, module.epsilon)
        ctx.save_for_backward(hidden, scales)
        return hidden, normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        hidden, scales = ctx.saved_tensors
        past, gradient = (None if one is None else one.contiguous() for one in gradients)
        if gradient is None:
            return past, None
        return _kernels().norm_backward(gradient, hidden, ctx.module.weight, scales, past), None


class _Projection(torch.autograd.Function):
    """Linear layers over one input, with LoRA where they carry it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, layers: tuple[nn.Module, ...], *trained: nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.has_residual = layers, residual is not None
        x = x.contiguous()
        kernels, answers, hiddens, needs_x = _kernels(), [], [], False
        for one in layers:
            weight = _transposed(one.frozen if isinstance(one, LoraLayer) else one, x.dtype)
            if residual is None:
                answer = x @ weight
            else:
                answer = torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight).view(residual.shape)
            hidden = None
            if isinstance(one, LoraLayer):
                hidden = kernels.lora_down(x, _weight_of_a(one))
                kernels.lora_up(answer, hidden, _weight_of_b(one), one.factor)
                needs_x = needs_x or one.place_of_a is not None
            answers.append(answer)
            hiddens.append(hidden)
        ctx.save_for_backward(x if needs_x else None, *hiddens)
        return tuple(answers)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *hiddens = ctx.saved_tensors
        kernels = _kernels()
        to_x: torch.Tensor | None = None
        for one, hidden, gradient in zip(ctx.layers, hiddens, gradients, strict=True):
            if gradient is None:
                continue
            gradient = gradient.contiguous()
            if ctx.needs_input_grad[0]:
                to_x = _times_weight(gradient, one.frozen if isinstance(one, LoraLayer) else one, to_x)
            if not isinstance(one, LoraLayer):
                continue
            one.recorder.check()
            recording = one.recorder.recording
            assert recording is not None, "backward ran after recording had ended"
            if one.place_of_b is not None:
                kernels.lora_outer(gradient, hidden, recording.flat, recording.rows, one.place_of_b, True, one.factor)
            if one.place_of_a is None and to_x is None:
                continue
            to_hidden = kernels.lora_down(gradient, _weight_of_b(one))
            if one.place_of_a is not None:
                kernels.lora_outer(x, to_hidden, recording.flat, recording.rows, one.place_of_a, False, one.factor)
            if to_x is not None:
                kernels.lora_up(to_x, to_hidden, _weight_of_a(one), one.factor)
        past = gradients[0] if ctx.has_residual else None
        return to_x, past, None, *(None for hidden in hiddens if hidden is not None)


class _Heads(torch.autograd.Function):
    """A layer's answer head by head, turned where `places` are given."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, head_dim: int, places: attention.Places | None) -> torch.Tensor:
        ctx.places = places
        return _kernels().by_head(flat, head_dim, *_turning(places))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _kernels().by_token(gradients[0].contiguous(), *_turning(ctx.places)), None, None


class _Attention(torch.autograd.Function):
    """Heads formed, turned, attended to and put together again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,  # (examples, length, heads * head_dim); key and value with their own number of heads
        key: torch.Tensor,
        value: torch.Tensor,
        head_dim: int,
        places: attention.Places,
        scaling: float,
    ) -> torch.Tensor:
        kernels = _kernels()
        queries, keys = (kernels.by_head(one, head_dim, *_turning(places)) for one in (query, key))
        values = kernels.by_head(value, head_dim, None, 0)
        grouped, flat_keys = attention.grouped(queries, keys), keys.flatten(0, 1)
        probabilities = kernels.softmax(grouped @ flat_keys.transpose(1, 2), places.length, scaling)
        heads = probabilities @ values.flatten(0, 1)
        ctx.save_for_backward(queries, keys, values)
        ctx.places, ctx.scaling = places, scaling
        return kernels.by_token(heads.view(queries.shape), None, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        kernels, head_dim = _kernels(), queries.shape[-1]
        grouped, flat_keys = attention.grouped(queries, keys), keys.flatten(0, 1)
        gradient = attention.grouped(kernels.by_head(gradients[0].contiguous(), head_dim, None, 0), keys)
        scores = grouped @ flat_keys.transpose(1, 2)
        to_scores = gradient @ values.flatten(0, 1).transpose(1, 2)
        probabilities = kernels.softmax_backward(scores, to_scores, ctx.places.length, ctx.scaling)
        to_value = (probabilities.transpose(1, 2) @ gradient).view(values.shape)
        to_query = (to_scores @ flat_keys).view(queries.shape)
        to_key = (to_scores.transpose(1, 2) @ grouped).view(keys.shape)
        turned = (kernels.by_token(one, *_turning(ctx.places)) for one in (to_query, to_key))
        return *turned, kernels.by_token(to_value, None, 0), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _kernels().gate(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _kernels().gate_backward(gradients[0].contiguous(), *ctx.saved_tensors)


def _turning(places: attention.Places | None) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if places is None else (places.table, places.first)


def _transposed(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """A frozen layer's weight, (num_inputs, num_outputs); valid until the next one is asked for."""
    assert linear.bias is None, "a Llama's layers have no bias"
    if isinstance(linear, PackedLinear):
        return linear.transposed(dtype)
    return cast(torch.Tensor, linear.weight).t()


def _times_weight(gradient: torch.Tensor, linear: nn.Module, added: torch.Tensor | None) -> torch.Tensor:
    """The gradient for a layer's input; in place, where there is one to be added to."""
    weight = _transposed(linear, gradient.dtype).t()
    if added is None:
        return gradient @ weight
    added.flatten(0, 1).addmm_(gradient.flatten(0, 1), weight)
    return added


def _weight_of_a(layer: LoraLayer) -> LoraWeight:
    rank, size = layer.a.shape
    return _weight(layer, layer.a, layer.place_of_a, rank, size, is_upright=False)


def _weight_of_b(layer: LoraLayer) -> LoraWeight:
    size, rank = layer.b.shape
    return _weight(layer, layer.b, layer.place_of_b, rank, size, is_upright=True)


def _weight(
    layer: LoraLayer, tensor: nn.Parameter, place: int | None, rank: int, size: int, is_upright: bool
) -> LoraWeight:
    recording = layer.recorder.recording
    if recording is None or recording.devices is None or place is None:
        return LoraWeight(tensor.detach(), None, rank, size, is_upright)
    devices = recording.devices
    return LoraWeight(devices.adapters, devices.owners, rank, size, is_upright, place)
