"""Numbers in blocks that share a scale, as they are stored: what is dequantised."""

from dataclasses import dataclass

import torch

Levels = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A stored value stands for a level, and a number is level * scale + minimum, in float32.

    Either a byte holds two values, an index among the sixteen `levels` in each half: a block's first half in the low ones,
    its second half in the high ones. Or, without `levels`, it holds one, which is its own level. A matrix is stored in
    columns, one for each output; an embedding in rows, one for each word.
    """

    values: torch.Tensor  # uint8, or int8 without levels; (blocks, stored, outputs) or (rows, blocks, stored)
    scales: torch.Tensor  # float16 or float32; (blocks, outputs) or (rows, blocks)
    minimums: torch.Tensor | None  # float16, as many; then the levels are small integers and the scales float16
    levels: Levels | None
