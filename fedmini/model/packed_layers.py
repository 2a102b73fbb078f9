"""Layers over packed weights: frozen, without parameters, dequantised in forward and again in backward."""

from typing import Any

import torch
from torch import nn

from fedmini.model.packing import PackedMatrix, PackedRows


class PackedLinear(nn.Linear):
    """y = x W^T with W packed. A linear layer to PEFT; nothing to train to an optimizer.

    The dense weight is never kept for backward, unless `hold_dense` asks for it.
    """

    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None

    def __init__(self, packed: PackedMatrix) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.register_parameter("bias", None)
        self.quantization = packed.quantization
        self.register_buffer("values", packed.values)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("minimums", packed.minimums)
        self._held: torch.Tensor | None = None

    @property
    def packed(self) -> PackedMatrix:
        return PackedMatrix(self.quantization, self.values, self.scales, self.minimums)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """A dense float32 copy, made at each access: for PEFT, which asks for its type and device."""
        return self.packed.transposed(torch.float32).t().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._held is not None and self._held.dtype == x.dtype:
            return x @ self._held
        result: torch.Tensor = _PackedMatmul.apply(x, self.packed)  # type: ignore[no-untyped-call]
        return result

    def hold_dense(self, dtype: torch.dtype | None) -> None:
        """Keep the dequantised weight from now on, to answer many small batches quickly; None lets it go."""
        self._held = None if dtype is None else self.packed.transposed(dtype).clone()


class _PackedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: PackedMatrix) -> torch.Tensor:
        ctx.packed = packed
        return x @ packed.transposed(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.packed.transposed(gradient.dtype).t(), None


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
        logits = [x @ packed.rows(slice(start, start + chunk_rows)).to(x.dtype).t() for start in starts]
        return torch.cat(logits, dim=-1)

    def hold_dense(self, dtype: torch.dtype | None) -> None:
        """Keep the dequantised weight from now on; None lets it go."""
        self._held = None if dtype is None else self.packed.dense(dtype)
