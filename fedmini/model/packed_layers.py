"""Layers over packed weights: frozen, without parameters, dequantised in forward and again in backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from fedmini.model.packing import PackedMatrix, PackedRows

_IS_DESCRIBED = ContextVar("_IS_DESCRIBED", default=False)


@contextmanager
def only_described() -> Iterator[None]:
    """Inside, in this thread, a packed layer's `weight` has shape, type and device, and no numbers: PEFT asks for no more.

    It asks some twenty times for each layer: with numbers, that took seconds and left hundreds of MB in pieces.
    """
    before = _IS_DESCRIBED.set(True)
    try:
        yield
    finally:
        _IS_DESCRIBED.reset(before)


class PackedLinear(nn.Linear):
    """y = x W^T + bias with W packed. A linear layer to PEFT; nothing to train to an optimizer.

    Answers and gradients are those of a dense layer over the dequantised weight, rounded once to the type of x: in float32
    bit for bit those of one that holds it in the same order, transposed. The dense weight is made in forward and again in
    backward, in memory that all layers share, and never kept, unless `hold_dense` asks for it.
    """

    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None

    def __init__(self, packed: PackedMatrix, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.register_parameter("bias", bias)
        self.quantization = packed.quantization
        self.register_buffer("values", packed.values)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("minimums", packed.minimums)
        self._packed: PackedMatrix | None = packed
        self._held: torch.Tensor | None = None

    @property
    def packed(self) -> PackedMatrix:
        if self._packed is None or self._packed.values is not self._buffers["values"]:  # moved to another device
            self._packed = PackedMatrix(self.quantization, self.values, self.scales, self.minimums)
        return self._packed

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """A dense float32 copy, made at each access; zeros that take no memory inside `only_described`."""
        if _IS_DESCRIBED.get():
            return torch.zeros((), device=self.values.device).expand(self.out_features, self.in_features)
        return self.packed.transposed(torch.float32).t().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._held is not None and self._held.dtype == x.dtype:
            return functional.linear(x, self._held.t(), self.bias)
        packed = self.packed
        weight = packed.transposed(x.dtype)
        with saved_tensors_hooks(partial(_instead_of, weight), partial(_again, packed)):
            # In several pieces x would be multiplied example by example, each with a weight that is kept for it.
            return functional.linear(x.contiguous(), weight.t(), self.bias)

    def transposed(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as (num_inputs, num_outputs): the one held, or valid until this thread dequantises another."""
        held = self._held
        return held if held is not None and held.dtype == dtype else self.packed.transposed(dtype)

    def hold_dense(self, dtype: torch.dtype | None) -> None:
        """Keep the dequantised weight from now on, to answer many small batches quickly; None lets it go."""
        self._held = None if dtype is None else self.packed.transposed(dtype).clone()


def _instead_of(weight: torch.Tensor, saved: torch.Tensor) -> torch.Tensor | torch.dtype:
    """What autograd keeps of a tensor that backward needs: of the dequantised weight no more than its type."""
    if saved.data_ptr() == weight.data_ptr() and saved.shape == weight.shape and saved.is_contiguous():
        return saved.dtype
    return saved.clone()  # another form of it: it would be overwritten


def _again(packed: PackedMatrix, kept: torch.Tensor | torch.dtype) -> torch.Tensor:
    return packed.transposed(kept) if isinstance(kept, torch.dtype) else kept


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows are dequantised as they are looked up, and rounded to `compute_dtype`."""

    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None

    def __init__(self, packed: PackedRows, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = packed.shape
        self.padding_idx = None
        self.compute_dtype = compute_dtype
        self.quantization = packed.quantization
        self.register_buffer("values", packed.values)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("minimums", packed.minimums)

    @property
    def packed(self) -> PackedRows:
        return PackedRows(self.quantization, self.values, self.scales, self.minimums)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.packed.rows(input).to(self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.quantization}"


class PackedHead(nn.Linear):
    """Logits from packed rows, which an embedding may share. Dequantised in chunks of the vocabulary."""

    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None

    def __init__(self, packed: PackedRows) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.register_parameter("bias", None)
        self.quantization = packed.quantization
        self.register_buffer("values", packed.values)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("minimums", packed.minimums)
        self._held: torch.Tensor | None = None

    @property
    def packed(self) -> PackedRows:
        return PackedRows(self.quantization, self.values, self.scales, self.minimums)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._held is not None and self._held.dtype == x.dtype:
            return x @ self._held.t()
        packed, chunk_rows = self.packed, 4096
        starts = range(0, packed.shape[0], chunk_rows)
        logits = [x @ packed.part(slice(start, start + chunk_rows)).dense(x.dtype).t() for start in starts]
        return torch.cat(logits, dim=-1)

    def hold_dense(self, dtype: torch.dtype | None) -> None:
        """Keep the dequantised weight from now on; None lets it go."""
        self._held = None if dtype is None else self.packed.dense(dtype)
