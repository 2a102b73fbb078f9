"""What a packed base costs against a dense one, as a table in Markdown: python simulations/bench_linear.py."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from fedmini.model import runtime

HEADER = "| weights | in | CPU, packed / dense | wall, packed / dense | CPU of a step | dequantised once | to reach |"


def main(
    repeats: int = 21,
    threads: int = 1,
    tokens: int = 8 * 128,
    formats: str = "Q4_1,Q4_0,Q8_0,NF4",
    dtype: str = "bfloat16",
) -> None:
    """Steps of TOKENS tokens through all 210 linear layers, packed and dense in turn: medians, and their middle half."""
    runtime.limit_threads(threads)
    import linear_measures as measures
    import torch

    from fedmini.errors import ConfigError
    from fedmini.model import compiling, native

    try:
        kernel = native.Kernel(compiling.library(runtime.default_cache_dir(), print))
    except ConfigError as error:
        print(f"Without the compiled kernel: {error}\n")
        kernel = None
    level, isa = torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", "default")
    print(f"{platform.machine()}, {level}, oneDNN's {isa} instructions, Python {platform.python_version()}, ", end="")
    print(f"torch {version('torch')}, threads: {threads}, tokens: {tokens}, {dtype}, rounds: {repeats}\n")
    print(f"{HEADER}\n|---|---|---|---|---|---|---|")
    for quantization in formats.split(","):
        for row in measures.rows(quantization, tokens, repeats, kernel, getattr(torch, dtype)):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
