"""Quantised weights as they stay in memory: blocks of 32 numbers with a scale, dequantised when they are needed.

The numbers are those of the GGUF's own dequantisation, bit for bit in float32 (gguf.quants.dequantize): an integer of
at most 8 bits times a float16 scale is exact in float32, so only the addition of the minimum rounds, once.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 32
_BYTES_IN_BLOCK = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A frozen weight of shape (num_outputs, num_inputs), stored so that its transpose comes out in one piece.

    `values`: uint8 (blocks, 16, outputs), two numbers a byte, the low halves first; int8 (blocks, 32, outputs) for Q8_0.
    `scales`, `minimums`: float16 (blocks, outputs); minimums only for Q4_1.
    """

    quantization: str
    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[0] * BLOCK

    def transposed(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as (num_inputs, num_outputs), rounded from float32 to `dtype`.

        Lives in this thread's scratch memory: valid until the next call in the same thread.
        """
        num_outputs, num_inputs = self.shape
        blocks = (self.values.shape[0], 2, BLOCK // 2, num_outputs)
        numbers = _scratch("float32", blocks, torch.float32, self.values.device)
        numbers.copy_(self._integers(blocks))
        scales = self.scales[:, None, None, :].float()
        if self.minimums is not None:
            torch.addcmul(self.minimums[:, None, None, :].float(), numbers, scales, out=numbers)
        else:
            numbers.mul_(scales)
        if dtype != torch.float32:
            numbers = _scratch("rounded", blocks, dtype, self.values.device).copy_(numbers)
        return numbers.view(num_inputs, num_outputs)

    def _integers(self, blocks: tuple[int, ...]) -> torch.Tensor:
        if self.quantization == "Q8_0":
            return self.values.view(blocks)
        integers = _scratch("integers", blocks, torch.uint8, self.values.device)
        torch.bitwise_and(self.values, 15, out=integers[:, 0])
        torch.bitwise_right_shift(self.values, 4, out=integers[:, 1])
        return integers if self.quantization == "Q4_1" else integers.view(torch.int8).sub_(8)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A frozen weight of shape (num_rows, num_columns) whose rows are dequantised one by one: an embedding.

    `values`: (rows, blocks, 16) uint8 or, for Q8_0, (rows, blocks, 32) int8; `scales`, `minimums`: float16 (rows, blocks).
    """

    quantization: str
    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] * BLOCK

    def rows(self, which: torch.Tensor | slice) -> torch.Tensor:
        """The chosen rows in float32, shape (*which, num_columns)."""
        values, scales = self.values[which], self.scales[which].float().unsqueeze(-1)
        if self.quantization != "Q8_0":
            values = torch.cat((values & 15, values >> 4), dim=-1)  # (*which, blocks, 32)
        if self.quantization == "Q4_0":
            values = values.view(torch.int8) - 8
        if self.minimums is not None:
            numbers = torch.addcmul(self.minimums[which].float().unsqueeze(-1), values.float(), scales)
        else:
            numbers = values.float().mul_(scales)
        return numbers.flatten(-2)

    def dense(self, dtype: torch.dtype, chunk_rows: int = 1024) -> torch.Tensor:
        """All rows rounded from float32 to `dtype`; the float32 form exists for `chunk_rows` rows at a time."""
        out = torch.empty(self.shape, dtype=dtype, device=self.values.device)
        for start in range(0, self.shape[0], chunk_rows):
            out[start : start + chunk_rows] = self.rows(slice(start, start + chunk_rows))
        return out


def pack_matrix(quantization: str, rows: NDArray[Any]) -> PackedMatrix:
    """Repack a GGUF tensor's rows, uint8 (num_outputs, bytes in a row), for PackedMatrix."""
    packed = pack_rows(quantization, rows)
    minimums = None if packed.minimums is None else packed.minimums.t().contiguous()
    return PackedMatrix(
        quantization, packed.values.permute(1, 2, 0).contiguous(), packed.scales.t().contiguous(), minimums
    )


def pack_rows(quantization: str, rows: NDArray[Any]) -> PackedRows:
    """Split a GGUF tensor's rows, uint8 (num_rows, bytes in a row), into values, scales and minimums."""
    blocks = rows.reshape(rows.shape[0], -1, _BYTES_IN_BLOCK[quantization])
    num_heads = 2 if quantization == "Q4_1" else 1  # float16 numbers in front of the values
    heads = np.ascontiguousarray(blocks[:, :, : 2 * num_heads]).view(np.float16)  # (rows, blocks, num_heads)
    values = np.ascontiguousarray(blocks[:, :, 2 * num_heads :])
    parts = [torch.from_numpy(heads[:, :, index].copy()) for index in range(num_heads)]
    return PackedRows(
        quantization,
        torch.from_numpy(values.view(np.int8) if quantization == "Q8_0" else values),
        parts[0],
        parts[1] if num_heads == 2 else None,
    )


class _Scratch(threading.local):
    """Memory that one thread uses again for every layer: fresh pages for each would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}


_SCRATCH = _Scratch()


def _scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    key = (purpose, dtype, device)
    size = int(np.prod(shape))
    if key not in _SCRATCH.held or _SCRATCH.held[key].numel() < size:
        _SCRATCH.held[key] = torch.empty(size, dtype=dtype, device=device)
    return _SCRATCH.held[key][:size].view(shape)
