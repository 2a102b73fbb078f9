"""What simulated devices in one batch save, by how many they are and how long their examples: what automatic.py goes by.

python simulations/benchmarks/batch_measures.py [--repeats 2] [--quick]: ten minutes on one core, or two. A ratio is the CPU
time of a round together over one after the other, the median of the turns' own.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
import typer
from cohort_measures import PEERS_MODEL, Workload, config_of, fedminis_ways, measure, peers_base
from transformers import LlamaConfig, LlamaForCausalLM

from fedmini.config import RunConfig
from fedmini.model import runtime
from fedmini.model.loading import Base, load_base

SIZES, LENGTHS = (1, 2, 4, 8, 16), (16, 32, 64, 128)
STEP = Workload(num_steps=1, batch_size=2)
SMOLLM2 = {"name": "smollm2-135m-q4", "compute_dtype": "bfloat16"}


def main(repeats: int = 2, quick: bool = False) -> None:
    """Print a table for each model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = LENGTHS[::2] if quick else LENGTHS
    small = peers_base(LlamaForCausalLM(LlamaConfig(**PEERS_MODEL, use_cache=False)), torch.float32)
    in_memory = config_of(STEP, {"path": "none.gguf", "compute_dtype": "float32"})
    table("4 layers of 128, float32", small, in_memory, lengths, repeats)
    config = config_of(STEP, SMOLLM2)
    base = load_base(config.base, runtime.default_cache_dir(), print)
    table("SmolLM2-135M, bfloat16", base, config, lengths, repeats)


def table(what: str, base: Base, config: RunConfig, lengths: Sequence[int], repeats: int) -> None:
    """Rows by the length of examples, columns by the number of devices; each takes one step on two examples."""
    print(f"\n{what}, {base.size_bytes / 1e6:.1f} MB; ratios by the number of devices together\n")
    print(f"| tokens | {' | '.join(map(str, SIZES))} | ms a token alone | s a token and byte, {SIZES[-1]} together |")
    print("|---" * (len(SIZES) + 3) + "|")
    for length in lengths:
        found = {
            size: round_seconds(base, config, replace(STEP, num_devices=size, num_tokens=length), repeats)
            for size in SIZES
        }
        ratios = {size: statistics.median(_quotients(each["together"], each["alone"])) for size, each in found.items()}
        alone, together = (
            statistics.median(found[SIZES[-1]][way]) / (STEP.batch_size * length) for way in ("alone", "together")
        )
        numbers = [f"{ratio:.2f}" for ratio in ratios.values()]
        print(
            f"| {length} | {' | '.join(numbers)} | {1e3 * alone:.3f} | {together / base.size_bytes:.1e} |", flush=True
        )


def round_seconds(base: Base, config: RunConfig, workload: Workload, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of a device in a round, "alone" and "together"."""
    own = config_of(workload, config.base.model_dump(exclude_none=True))
    return measure(fedminis_ways(base, own, workload), repeats, ("alone", "together"), workload.num_devices)


def _quotients(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    typer.run(main)
