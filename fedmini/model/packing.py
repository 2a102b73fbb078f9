"""Quantised weights as they stay in memory: blocks of numbers with a scale, dequantised when they are needed.

The numbers are those of the GGUF's own dequantisation, bit for bit in float32 (plain.py says why), and those of
bitsandbytes for NF4. The compiled kernel makes them where there is one (native.py), else plain torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmini.model import native, plain
from fedmini.model.blocks import Blocks, Levels
from fedmini.model.scratch import scratch


@dataclass(frozen=True, slots=True)
class Quantization:
    """How many numbers share a scale, and what a 4-bit value stands for; without levels the values are int8."""

    block: int
    levels: Levels | None

    @property
    def stored(self) -> int:
        """Bytes that a block's values take."""
        return self.block if self.levels is None else self.block // 2


QUANTIZATIONS: Mapping[str, Quantization] = {
    "Q4_0": Quantization(32, tuple(float(level) for level in range(-8, 8))),
    "Q4_1": Quantization(32, tuple(float(level) for level in range(16))),
    "Q8_0": Quantization(32, None),
    # arXiv:2305.14314, appendix E; the decimals are those of float32
    "NF4": Quantization(
        64,
        (
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A frozen weight of shape (num_outputs, num_inputs), stored so that its transpose comes out in one piece.

    `values`: (blocks, stored, outputs), uint8 with two numbers a byte, the low halves first, or int8 for Q8_0.
    `scales`, `minimums`: (blocks, outputs), float16, but for NF4's scales float32; minimums only for Q4_1.
    """

    quantization: str
    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None
    _fills: dict[native.Kernel | None, native.Fill] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[2], self.values.shape[0] * QUANTIZATIONS[self.quantization].block

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is of the weight alone: what fills from this one's memory is no part of it."""
        return PackedMatrix, (self.quantization, self.values, self.scales, self.minimums)

    def transposed(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as (num_inputs, num_outputs), rounded once from float32 to `dtype`, float32 or bfloat16.

        Lives in this thread's scratch memory: valid until the next call in the same thread.
        """
        num_outputs, num_inputs = self.shape
        out = scratch("weight", (num_inputs, num_outputs), dtype, self.values.device)
        kernel = native.kernel_for(out)
        fill = self._fills.get(kernel)
        if fill is None:
            blocks = Blocks(self.values, self.scales, self.minimums, QUANTIZATIONS[self.quantization].levels)
            fill = self._fills[kernel] = partial(plain.columns, blocks) if kernel is None else kernel.columns(blocks)
        fill(out)
        return out


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A frozen weight of shape (num_rows, num_columns) whose rows are dequantised one by one: an embedding.

    `values`: (rows, blocks, stored), as in a PackedMatrix; `scales`, `minimums`: float16 (rows, blocks).
    """

    quantization: str
    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] * QUANTIZATIONS[self.quantization].block

    @property
    def _blocks(self) -> Blocks:
        return Blocks(self.values, self.scales, self.minimums, QUANTIZATIONS[self.quantization].levels)

    def rows(self, which: torch.Tensor) -> torch.Tensor:
        """The chosen rows in float32, shape (*which, num_columns)."""
        return plain.rows_in_float32(self._blocks, which)

    def part(self, chosen: slice) -> "PackedRows":
        """Some rows, still packed, in the same memory."""
        minimums = None if self.minimums is None else self.minimums[chosen]
        return PackedRows(self.quantization, self.values[chosen], self.scales[chosen], minimums)

    def dense(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """All rows, rounded once from float32 to `dtype`; in `out`, of that type, or in memory of their own."""
        out = torch.empty(self.shape, dtype=dtype, device=self.values.device) if out is None else out
        kernel = native.kernel_for(out)
        fill = partial(plain.rows, self._blocks) if kernel is None else kernel.rows(self._blocks)
        fill(out)
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
    num_heads = 2 if quantization == "Q4_1" else 1  # float16 numbers in front of the values
    blocks = rows.reshape(rows.shape[0], -1, 2 * num_heads + QUANTIZATIONS[quantization].stored)
    heads = np.ascontiguousarray(blocks[:, :, : 2 * num_heads]).view(np.float16)  # (rows, blocks, num_heads)
    values = np.ascontiguousarray(blocks[:, :, 2 * num_heads :])
    parts = [torch.from_numpy(heads[:, :, index].copy()) for index in range(num_heads)]
    return PackedRows(
        quantization,
        torch.from_numpy(values.view(np.int8) if quantization == "Q8_0" else values),
        parts[0],
        parts[1] if num_heads == 2 else None,
    )
