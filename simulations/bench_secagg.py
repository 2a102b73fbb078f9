"""The costs of secure aggregation, as a table in Markdown: python simulations/bench_secagg.py."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import secagg_measures as measures


def main(repeats: int = 5, peers: bool = True) -> None:
    """Measure, REPEATS times where a median is printed. --no-peers leaves out what others' software costs."""
    rows = measures.large_round()  # first: its memory is the growth of this process
    rows += measures.server_memory()
    rows += measures.round_of_a_hundred(repeats)
    if peers:
        rows += [measures.against_flower(num_devices, repeats) for num_devices in (5, 10)]
        rows.append(measures.noise(repeats))
    print(f"{platform.machine()}, Python {platform.python_version()}, {_versions()}\n")
    print("| what | measured | beside it | to reach |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("cryptography", "numpy", "flwr", "opendp"))


if __name__ == "__main__":
    typer.run(main)
