"""The compiled kernels: loaded once a process, done without where they can't be had.

What dequantises gives the numbers of plain.py, bit for bit, in a fraction of the time. `layers` is layer_kernels.py.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedmini.errors import ConfigError
from fedmini.model import compiling, kernel_check, plain
from fedmini.model.blocks import Blocks, Levels
from fedmini.model.layer_kernels import DTYPES, LayerKernels

Fill = Callable[[torch.Tensor], None]


class _Packed(ctypes.Structure):
    """As in dequantise.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "scales", "minimums", "levels")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "num_outputs", "stored", "scales_are_half")),
    )


class Kernel:
    """A library, loaded. Its functions run on torch's threads, and take contiguous tensors in the CPU's memory.

    Raises ConfigError for a file that is no such library, or that gives other numbers than plain torch.
    """

    def __init__(self, path: Path) -> None:
        self.revision = path.parent.name  # sources, flags, torch
        try:
            library = ctypes.CDLL(str(path))
            self._columns, self._rows = library.dequantise_columns, library.dequantise_rows
            self.layers = LayerKernels(library)
        except (OSError, AttributeError) as error:
            raise ConfigError(f"can't load {path}: {error}") from error
        for function in (self._columns, self._rows):
            function.argtypes, function.restype = (ctypes.POINTER(_Packed), ctypes.c_void_p, ctypes.c_int64), None
        if not (_agrees_with_plain_torch(self) and kernel_check.agrees_with_plain_torch(self.layers)):
            raise ConfigError(f"{path} gives other numbers than plain torch")

    def columns(self, blocks: Blocks) -> Fill:
        """Fills float32 or bfloat16 as plain.columns does."""
        num_blocks, _, num_outputs = blocks.values.shape
        return _bound(self._columns, blocks, (num_blocks, num_outputs))

    def rows(self, blocks: Blocks) -> Fill:
        """Fills float32 or bfloat16 as plain.rows does."""
        num_rows, num_blocks, _ = blocks.values.shape
        return _bound(self._rows, blocks, (num_blocks, num_rows))


def _bound(function: Any, blocks: Blocks, sizes: tuple[int, int]) -> Fill:
    """The function with all but `out`: a call is made for every layer of every step, and this takes longer than a call."""
    num_scales, num_values = blocks.scales.numel(), blocks.values.numel()
    halves = 1 if blocks.levels is None else 2
    packed = _Packed(
        _address(blocks.values, num_values, (torch.int8 if halves == 1 else torch.uint8,)),
        _address(blocks.scales, sizes[0] * sizes[1], (torch.float16, torch.float32)),
        None if blocks.minimums is None else _address(blocks.minimums, num_scales, (torch.float16,)),
        None if blocks.levels is None else ctypes.addressof(_levels(blocks.levels)),
        *sizes,
        num_values // max(1, num_scales),
        blocks.scales.dtype == torch.float16,
    )

    def fill(out: torch.Tensor, blocks: Blocks = blocks) -> None:  # which keeps the tensors alive
        function(packed, _address(out, halves * num_values, DTYPES), out.dtype == torch.bfloat16)

    return fill


def _address(tensor: torch.Tensor, size: int, dtypes: tuple[torch.dtype, ...]) -> int:
    """Where a tensor begins. Raises ValueError for one beside which something else would be read or written."""
    if tensor.numel() != size or tensor.dtype not in dtypes or not tensor.is_contiguous() or not tensor.is_cpu:
        found = f"{tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"expected {size} numbers of {dtypes} in one piece on the CPU, got {found}")
    return tensor.data_ptr()


@cache  # which also keeps them alive
def _levels(levels: Levels) -> Any:
    return (ctypes.c_float * len(levels))(*levels)


def _agrees_with_plain_torch(kernel: Kernel) -> bool:
    """Whether two blocks of each kind come out the same, in each layout and type."""
    for columns in _samples():
        num_blocks, stored, num_outputs = columns.values.shape
        rows = replace(columns, values=columns.values.view(num_blocks, num_outputs, stored))
        num_numbers = columns.values.numel() * (1 if columns.levels is None else 2)
        for blocks, ours, theirs in ((columns, kernel.columns, plain.columns), (rows, kernel.rows, plain.rows)):
            for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
                shape = (num_numbers // num_outputs, num_outputs) if blocks is columns else (num_blocks, -1)
                expected, found = (torch.empty(num_numbers, dtype=dtype).view(shape) for _ in range(2))
                theirs(blocks, expected)
                ours(blocks)(found)
                if not torch.equal(found.view(bits), expected.view(bits)):
                    return False
    return True


def _samples() -> Iterator[Blocks]:
    """35 outputs: whole vectors of every processor, and a rest."""
    counted = torch.arange(2 * 32 * 35).view(2, 32, 35)
    scales = (counted[:, 0] - 30.3) / 7
    cubes = tuple((index - 7) ** 3 / 4.0 for index in range(16))
    yield Blocks((counted * 37).to(torch.uint8), scales.half(), scales.flip(1).half(), tuple(map(float, range(16))))
    yield Blocks((counted * 59).to(torch.uint8), scales, None, cubes)
    yield Blocks((counted * 83).to(torch.int8), scales.half(), None, None)


class _Process:
    """What this process dequantises with."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_prepared = False
        self.kernel: Kernel | None = None


_PROCESS = _Process()


def prepare(cache_dir: Path, note: Callable[[str], None]) -> None:
    """Use the kernel from now on, built first if it has to be: some seconds, once. Does nothing the second time.

    `note` hears it where there is no kernel, once, and why; then plain torch does the same work.
    """
    with _PROCESS.lock:
        if _PROCESS.is_prepared:
            return
        _PROCESS.is_prepared = True
        try:
            _PROCESS.kernel = Kernel(compiling.library(cache_dir, note))
        except (ConfigError, OSError) as error:
            note(f"packed weights are unpacked, and layers computed, by plain torch, which is slower: {error}")


def current() -> Kernel | None:
    """What this process dequantises with; None: plain torch."""
    return _PROCESS.kernel


def kernel_for(numbers: torch.Tensor) -> Kernel | None:
    """What computes with these numbers; None: plain torch."""
    return _PROCESS.kernel if numbers.is_cpu and numbers.dtype in DTYPES else None


@contextmanager
def using(kernel: Kernel | None) -> Iterator[None]:
    """Dequantise with that kernel, or with plain torch, in all of this process until the block ends."""
    before, _PROCESS.kernel = _PROCESS.kernel, kernel
    try:
        yield
    finally:
        _PROCESS.kernel = before
