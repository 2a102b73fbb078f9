"""Blocks as numbers in plain torch: on every machine, and what the compiled kernel is held against, bit for bit.

An integer of at most 8 bits times a float16 scale is exact in float32, so only the addition of the minimum rounds, once:
these are the numbers of the GGUF's own dequantisation (gguf.quants.dequantize). A level of NF4 times its scale rounds once.
"""

from collections.abc import Iterator
from functools import cache

import torch

from fedmini.model.blocks import Blocks, Levels
from fedmini.model.scratch import scratch

_TILE_NUMBERS = 1 << 17  # float32, integers and bfloat16 of so many lie in a core's second-level cache
_CHUNK_ROWS = 128  # likewise


def columns(blocks: Blocks, out: torch.Tensor) -> None:
    """Fill `out`, (num_inputs, num_outputs), float32 or rounded from it, from a matrix's columns."""
    values, levels, minimums = blocks.values, blocks.levels, blocks.minimums
    num_blocks, stored, num_outputs = values.shape
    target = out.view(num_blocks, -1, stored, num_outputs)  # its second dimension: the low halves, the high ones
    step = max(1, _TILE_NUMBERS // target[0].numel())
    if values.device.type != "cpu":
        step = num_blocks  # there a launch costs more than a cache holds
    factors = torch.split(blocks.scales.float()[:, None, None], step)
    addends = (None,) * len(factors) if minimums is None else torch.split(minimums.float()[:, None, None], step)
    tiles = zip(torch.split(target, step), _levels(values, levels, step), factors, addends, strict=True)
    for goal, numbers, factor, addend in tiles:
        if addend is None:
            numbers.mul_(factor)
        else:
            torch.addcmul(addend, numbers, factor, out=numbers)
        goal.copy_(numbers)


def rows(blocks: Blocks, out: torch.Tensor) -> None:
    """Fill `out`, (num_rows, num_columns), float32 or rounded from it; some rows exist in float32 at a time."""
    step = _CHUNK_ROWS if out.device.type == "cpu" else len(out)  # as above
    for start in range(0, len(out), step):
        chunk = slice(start, start + step)
        out[chunk] = rows_in_float32(blocks, chunk)


def rows_in_float32(blocks: Blocks, which: torch.Tensor | slice) -> torch.Tensor:
    """The chosen rows, shape (*which, num_columns)."""
    values, scales = blocks.values[which], blocks.scales[which].float().unsqueeze(-1)
    if blocks.levels is None:
        numbers = values.float()
    else:
        halves = torch.cat((values & 15, values >> 4), dim=-1)  # (*which, blocks, 2 * stored)
        table, _ = _tables(blocks.levels, values.device)
        numbers = torch.index_select(table, 0, halves.flatten().int()).view(halves.shape)
    if blocks.minimums is not None:
        return torch.addcmul(blocks.minimums[which].float().unsqueeze(-1), numbers, scales).flatten(-2)
    return numbers.mul_(scales).flatten(-2)


def _levels(values: torch.Tensor, levels: Levels | None, step: int) -> Iterator[torch.Tensor]:
    """What values stand for before they are scaled, `step` blocks at a time: float32 (step, halves, stored, outputs).

    In scratch memory: each is valid until the next.
    """
    if levels is None or levels == _consecutive_from(int(levels[0])):
        for tile in torch.split(values[:, None] if levels is None else _nibbles(values, int(levels[0])), step):
            yield scratch("levels", tile.shape, torch.float32, values.device).copy_(tile)
        return
    tables = _tables(levels, values.device)
    for tile in torch.split(values, step):
        index = scratch("index", tile.shape, torch.int32, values.device).copy_(tile).view(-1)
        found = scratch("levels", (2, *tile.shape), torch.float32, values.device)
        for half, table in zip(found, tables, strict=True):
            torch.index_select(table, 0, index, out=half.view(-1))
        yield found.transpose(0, 1)


def _nibbles(values: torch.Tensor, first: int) -> torch.Tensor:
    """The low and the high halves, (blocks, 2, stored, outputs), as integers from `first` on."""
    num_blocks, stored, num_outputs = values.shape
    nibbles = scratch("nibbles", (num_blocks, 2, stored, num_outputs), torch.uint8, values.device)
    torch.bitwise_and(values, 15, out=nibbles[:, 0])
    torch.bitwise_right_shift(values, 4, out=nibbles[:, 1])
    return nibbles.view(torch.int8).add_(first) if first else nibbles


@cache
def _consecutive_from(first: int) -> Levels:
    return tuple(float(first + index) for index in range(16))


@cache
def _tables(levels: Levels, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each byte the level of its low half, and of its high one."""
    table = torch.tensor(levels, dtype=torch.float32, device=device)
    return table.repeat(16), table.repeat_interleave(16)
