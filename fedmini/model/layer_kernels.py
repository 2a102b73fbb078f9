"""The compiled functions of layers.cpp, as functions over tensors: contiguous, in the CPU's memory, float32 or bfloat16."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16)
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, Sequence[Any]] = {
    "norm_forward": (*(_POINTER,) * 4, *(_INT,) * 2, _FLOAT, _INT),
    "norm_backward": (*(_POINTER,) * 6, *(_INT,) * 3),
    "turn_heads": (*(_POINTER,) * 3, *(_INT,) * 7),
    "softmax_forward": (*(_POINTER,) * 2, *(_INT,) * 3, _FLOAT, _INT),
    "softmax_backward": (*(_POINTER,) * 3, *(_INT,) * 3, _FLOAT, _INT),
    "gate_forward": (*(_POINTER,) * 3, *(_INT,) * 3),
    "gate_backward": (*(_POINTER,) * 5, *(_INT,) * 3),
    "loss_forward": (*(_POINTER,) * 3, *(_INT,) * 3),
    "lora_down": (*(_POINTER,) * 3, *(_INT,) * 3),
    "lora_up": (*(_POINTER,) * 3, _FLOAT, *(_INT,) * 3),
    "lora_outer": (*(_POINTER,) * 3, _INT, _POINTER, *(_INT,) * 3, _FLOAT, *(_INT,) * 3),
}


class _Lora(ctypes.Structure):
    """As in layers.cpp."""

    _fields_ = (
        ("weight", _POINTER),
        ("owner_stride", _INT),
        ("num_owners", _INT),
        ("owners", _POINTER),
        *((name, _INT) for name in ("rank", "size", "is_upright")),
    )


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """One of LoRA's two tensors, as all examples have it, or each its owner's: A is (rank, size), B upright, (size, rank)."""

    values: torch.Tensor  # float32: the tensor, or (num_owners, ...): its coordinates begin at `place` in each row
    owners: torch.Tensor | None  # (num_examples,), int64; None: all have one
    rank: int
    size: int
    is_upright: bool
    place: int = 0

    def _as_structure(self, wide: torch.Tensor) -> _Lora:
        """For what is (examples, length, size). Owners are within the values: gradients.Devices sees to that."""
        is_owned = self.owners is not None
        if self.owners is not None:
            _expect(self.owners, wide.shape[:1], torch.int64)
        room = self.values.shape[1] if is_owned else self.values.numel()
        if wide.dim() != 3 or wide.shape[-1] != self.size or not 0 <= self.place <= room - self.rank * self.size:
            raise ValueError(
                f"{self.rank} x {self.size} numbers at {self.place} of {room} don't fit {tuple(wide.shape)}"
            )
        return _Lora(
            _address(self.values, torch.float32) + 4 * self.place,
            self.values.shape[1] if is_owned else 0,
            len(self.values) if is_owned else 1,
            None if self.owners is None else _address(self.owners, torch.int64),
            *(self.rank, self.size, self.is_upright),
        )


class LayerKernels:
    """What a library computes; AttributeError where it has not all of it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {name: getattr(library, name) for name in _SIGNATURES}
        for name, function in self._functions.items():
            function.argtypes, function.restype = _SIGNATURES[name], _INT

    def norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The RMS norm over the last dimension, and the factor of each row, float32 (num_rows,)."""
        out, size = torch.empty_like(x), x.shape[-1]
        _expect(weight, (size,), x.dtype)
        scales = torch.empty(x.numel() // size)
        self._call("norm_forward", x, weight, out, scales, len(scales), size, epsilon, _is_bfloat16(x))
        return out, scales

    def norm_backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        past: torch.Tensor | None,
    ) -> torch.Tensor:
        """The gradient for x, with `past` added: what came past the norm."""
        out = torch.empty_like(x)
        _expect(weight, x.shape[-1:], x.dtype)
        _expect(scales, (x.numel() // x.shape[-1],), torch.float32)
        for like in (gradient, past):
            if like is not None:
                _expect(like, x.shape, x.dtype)
        place = None if past is None else _address(past)
        shape = (len(scales), x.shape[-1], _is_bfloat16(x))
        self._call("norm_backward", gradient, x, weight, scales, place, out, *shape)
        return out

    def by_head(self, x: torch.Tensor, head_dim: int, table: torch.Tensor | None, first: int) -> torch.Tensor:
        """(examples, length, heads * head_dim) as (examples, heads, length, head_dim), turned by a table of Places."""
        num_examples, length, size = x.shape
        if size % head_dim:
            raise ValueError(f"{size} numbers are no heads of {head_dim}")
        out = x.new_empty(num_examples, size // head_dim, length, head_dim)
        self._turn(x, out, table, first, out, is_back=False)
        return out

    def by_token(self, heads: torch.Tensor, table: torch.Tensor | None, first: int) -> torch.Tensor:
        """The inverse of `by_head`, which is also its backward."""
        num_examples, num_heads, length, head_dim = heads.shape
        out = heads.new_empty(num_examples, length, num_heads * head_dim)
        self._turn(heads, out, table, first, heads, is_back=True)
        return out

    def _turn(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        table: torch.Tensor | None,
        first: int,
        heads: torch.Tensor,
        is_back: bool,
    ) -> None:
        num_examples, num_heads, length, head_dim = heads.shape
        if (
            head_dim % 2
            or first < 0
            or (table is not None and (first + length > len(table) or table.shape[-1] * 2 != head_dim))
        ):
            raise ValueError(f"heads of {head_dim} at places {first} to {first + length} don't fit the table")
        place = None if table is None else _address(table, torch.float32)
        shape = (num_examples, length, num_heads, head_dim)
        self._call("turn_heads", x, out, place, first, *shape, is_back, _is_bfloat16(x))

    def softmax(self, scores: torch.Tensor, length: int, scaling: float) -> torch.Tensor:
        """Causal probabilities over the last dimension; the query of a row is its number modulo `length`."""
        out, size = torch.empty_like(scores), scores.shape[-1]
        _expect_keys(length, size)
        shape = (scores.numel() // size, length, size, scaling, _is_bfloat16(scores))
        self._call("softmax_forward", scores, out, *shape)
        return out

    def softmax_backward(
        self, scores: torch.Tensor, gradient: torch.Tensor, length: int, scaling: float
    ) -> torch.Tensor:
        """The probabilities again; `gradient`, which is about them, becomes that of the scores, in its place."""
        out, size = torch.empty_like(scores), scores.shape[-1]
        _expect_keys(length, size)
        _expect(gradient, scores.shape, scores.dtype)
        shape = (scores.numel() // size, length, size, scaling, _is_bfloat16(scores))
        self._call("softmax_backward", scores, gradient, out, *shape)
        return out

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up"""
        _expect(up, gate.shape, gate.dtype)
        out = torch.empty_like(gate)
        self._call("gate_forward", gate, up, out, *_rows(gate))
        return out

    def gate_backward(
        self, gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients for gate and up."""
        _expect(up, gate.shape, gate.dtype)
        _expect(gradient, gate.shape, gate.dtype)
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        self._call("gate_backward", gradient, gate, up, to_gate, to_up, *_rows(gate))
        return to_gate, to_up

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p(target), float32 (num_rows,); the logits (num_rows, num_words) become their own gradient."""
        if len(targets) != len(logits) or not (0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]):
            raise IndexError(f"targets beyond the {logits.shape[-1]} words of the head")
        losses = torch.empty(len(logits))
        place = _address(targets, torch.int64)
        self._call("loss_forward", logits, place, losses, *_rows(logits))
        return losses

    def lora_down(self, x: torch.Tensor, weight: LoraWeight) -> torch.Tensor:
        """(examples, length, size) times the weight: (examples, length, rank), float32."""
        out = torch.empty(*x.shape[:-1], weight.rank)
        lora = weight._as_structure(x)
        self._call("lora_down", x, ctypes.addressof(lora), out, *x.shape[:2], _is_bfloat16(x))
        return out

    def lora_up(self, y: torch.Tensor, hidden: torch.Tensor, weight: LoraWeight, factor: float) -> None:
        """Add the factor times `hidden` times the weight to y, (examples, length, size)."""
        _expect(hidden, (*y.shape[:2], weight.rank), torch.float32)
        lora = weight._as_structure(y)
        self._call("lora_up", y, hidden, ctypes.addressof(lora), factor, *y.shape[:2], _is_bfloat16(y))

    def lora_outer(
        self,
        wide: torch.Tensor,  # (examples, length, size)
        hidden: torch.Tensor,  # (examples, length, rank), float32
        flat: torch.Tensor,  # (num_rows, num_parameters), float32
        rows: torch.Tensor | None,  # (examples,), int64: the row of each example; None: its own
        place: int,
        is_upright: bool,
        factor: float,
    ) -> None:
        """Add the factor times hidden^T wide of each example to its row of `flat`, from `place` on; upright: (size, rank)."""
        rank, size = hidden.shape[-1], wide.shape[-1]
        _expect(hidden, (*wide.shape[:2], rank), torch.float32)
        if rows is not None:
            _expect(rows, (len(wide),), torch.int64)
        if not 0 <= place <= flat.shape[1] - rank * size or (rows is None and len(flat) < len(wide)):
            raise ValueError(f"no room for {rank} x {size} numbers at {place} of {tuple(flat.shape)}")
        goal, of_each = _address(flat, torch.float32) + 4 * place, None if rows is None else _address(rows, torch.int64)
        shape = (rank, size, is_upright, factor, *wide.shape[:2], _is_bfloat16(wide))
        self._call("lora_outer", wide, hidden, goal, flat.shape[1], of_each, *shape)

    def _call(self, name: str, *arguments: Any) -> None:
        if self._functions[name](*(_address(one) if isinstance(one, torch.Tensor) else one for one in arguments)):
            raise MemoryError(f"no memory left for {name}")


def _expect(tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tensor.shape != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(f"expected {tuple(shape)} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}")


def _expect_keys(length: int, num_keys: int) -> None:
    if not 1 <= length <= num_keys:
        raise ValueError(f"{length} queries need as many keys, got {num_keys}")


def _address(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    if (
        not tensor.is_contiguous()
        or not tensor.is_cpu
        or (tensor.dtype != dtype if dtype else tensor.dtype not in DTYPES)
    ):
        found = f"{tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"expected numbers of {dtype or DTYPES} in one piece on the CPU, got {found}")
    return tensor.data_ptr()


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _rows(tensor: torch.Tensor) -> tuple[int, int, bool]:
    size = tensor.shape[-1]
    return tensor.numel() // size, size, _is_bfloat16(tensor)
