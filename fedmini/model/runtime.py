"""How this process uses the machine: threads, memory, and where caches lie. Imports torch only when it must."""

import os
import resource
from pathlib import Path


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


def peak_memory_bytes() -> int:
    """The most memory this process has held resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
