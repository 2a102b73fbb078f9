"""Where and in which number format a base computes: measured, not guessed from a processor's name."""

import statistics
import time
from typing import Literal

import torch

from fedmini.errors import ConfigError

CLEARLY_FASTER = 1.3  # bfloat16 rounds: it must earn that
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_accelerator(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to compute on. Raises ConfigError where CUDA is asked for and there is none."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError('base.accelerator = "cuda", but this torch sees no GPU: say "cpu" or "auto"')
    return torch.device("cuda", torch.cuda.current_device())


def choose_compute_dtype(wanted: Literal["auto", "float32", "bfloat16"], accelerator: torch.device) -> torch.dtype:
    """The configured type, or for "auto" bfloat16 where its matrix products are clearly faster, else float32.

    A measurement of a few hundredths of a second, which may fall differently on a busy machine: store the choice.
    """
    if wanted != "auto":
        return _DTYPES[wanted]
    try:
        seconds = {name: _matmul_seconds(dtype, accelerator) for name, dtype in _DTYPES.items()}
    except RuntimeError:  # a device without bfloat16
        return torch.float32
    faster = seconds["float32"] > CLEARLY_FASTER * seconds["bfloat16"]
    return torch.bfloat16 if faster else torch.float32


def _matmul_seconds(dtype: torch.dtype, accelerator: torch.device, num_repeats: int = 5) -> float:
    left = torch.full((256, 576), 0.5, dtype=dtype, device=accelerator)
    right = torch.full((576, 1536), 0.5, dtype=dtype, device=accelerator)
    times = []
    for _ in range(num_repeats + 1):
        _finish(accelerator)
        start = time.perf_counter()
        left @ right
        _finish(accelerator)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one warms up


def _finish(accelerator: torch.device) -> None:
    if accelerator.type == "cuda":
        torch.cuda.synchronize(accelerator)
