"""What a deployment's rounds cost beyond training, as a table in Markdown: python simulations/bench_deployment.py."""

import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import deployment_rounds as measures

SIZES = (2, 5, 10, 20, 50)
IDLE_SECONDS = 20.0


def main(
    repeats: int = 5,
    devices: Annotated[list[int] | None, typer.Option(help="Sizes of cohorts; the first is held against.")] = None,
    idle: Annotated[int, typer.Option(help="Devices that only wait, at the end; 0: none.")] = 50,
    save: Annotated[Path | None, typer.Option(help="Where to write the numbers as JSON.")] = None,
) -> None:
    """Measure a real gate with TLS, a real link and devices in two processes, all on this machine.

    Two devices REPEATS times, more of them less often, but once at least: the time grows with their number.
    """
    costs = {number: measures.measure(number, max(1, 2 * repeats // number)) for number in devices or SIZES}
    shares = {idle: measures.idle_share(idle, IDLE_SECONDS)} if idle else {}
    print(f"{platform.machine()}, Python {platform.python_version()}, flwr {version('flwr')}\n")
    print("| what | measured | beside it | to reach |\n|---|---|---|---|")
    for row in measures.rows(costs, shares):
        print(f"| {' | '.join(row)} |")
    if save is not None:
        found = {"costs": [asdict(cost) for cost in costs.values()], "idle": shares}
        save.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
