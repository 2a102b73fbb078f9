"""How this process uses the machine: threads, memory, and where caches lie. Imports torch only when it must."""

import ctypes
import os
import resource
from pathlib import Path

# What is held of the loss at once: positions whose logits exist, words of a packed head whose weights do.
LOGITS_TOKENS, PIECE_WORDS = 512, 4096

# <malloc.h>: M_ARENA_MAX; M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, which else grow with what is freed. A larger threshold
# leaves the heap in pieces: 512 KiB costs a training step of 4 x 128 tokens 24 MB more, 1 MiB 160.
_SMALL_HEAP = ((-8, 1), (-3, 2**17), (-1, 2**20))


def default_cache_dir() -> Path:
    """Where repacked bases and calibrations are kept: the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"  # the desktop standard's one variable
    return Path(root).expanduser() / "fedmini"


def limit_threads(num_threads: int) -> int:
    """Let torch compute on that many threads, 0 for one per core this process may use, and give their number.

    Waiting threads sleep: on a busy machine, spinning ones can stall each other by a factor of twenty.
    """
    chosen = num_threads or len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch loads OpenMP
    import torch

    torch.set_num_threads(chosen)
    return chosen


def keep_heap_small() -> bool:
    """Let this process's allocator (glibc's) hold less: one arena for all threads, and large pieces given back at once.

    For good, and for all code of the process: only whose process it is may choose that. It costs page faults, 6 to 8 % of
    a step. Whether it could be done: with another C library nothing happens. What threads have taken before stays so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in _SMALL_HEAP)


def give_back_memory() -> None:
    """Let the system have the pages that were freed and are still this process's: some milliseconds. Changes no setting."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int:
    """The most memory this process has held resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
