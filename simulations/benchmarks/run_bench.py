"""What `fedmini bench` runs: each row in a process of its own on one thread, then the table and the numbers."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_rows import FOLDER, NEEDS_PEERS, REFUSED, ROOT, ROWS, Asked

PACKAGES = ("fedmini", "torch", "transformers", "peft", "opacus", "flwr", "numpy")
HEADER = "| row | what | CPU | wall | to reach | |\n|---|---|---|---|---|---|"


def main(
    output: Path,
    rows: str = "",
    repeats: int = 11,
    quick: bool = False,
    peers: Path = Path(),
    against: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure ROWS, or all of them that need no peer, and write bench.json and bench.md into OUTPUT.

    Ends with 2 where rows could not be measured as this machine is set up, with 1 where one failed.
    """
    chosen = rows.split(",") if rows else [row for row in ROWS if row not in NEEDS_PEERS]
    asked = Asked(repeats, quick, peers, against)
    if unknown := set(chosen) - set(ROWS):
        typer.echo(f"fedmini: no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}", err=True)
        raise typer.Exit(2)
    output.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    print(f"{machine()}\n\n{HEADER}", flush=True)
    failed = []
    for row in chosen:
        done = _measure(row, asked)
        if done.returncode:
            print(f"fedmini: row {row}: {done.stderr.strip()[-1000:]}", file=sys.stderr, flush=True)
            failed.append(done.returncode)
            continue
        lines = [{"row": row, **line} for line in json.loads(done.stdout.splitlines()[-1])]
        print("\n".join(map(as_text, lines)), flush=True)
        found += lines
        _save(output, found, {"repeats": repeats, "quick": quick})
    if failed:
        raise SystemExit(REFUSED if set(failed) == {REFUSED} else 1)


def _measure(row: str, asked: Asked) -> subprocess.CompletedProcess[str]:
    how = [str(asked.repeats), "quick" if asked.quick else "full", str(asked.peers), str(asked.against or "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(FOLDER / "bench_rows.py"), row, *how]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def machine() -> str:
    """What was measured, on what, when."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    processor = cpu.partition(":")[2].strip() or platform.machine()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{now}, {processor}, {cores} cores (load {load:.1f} at the start), Python {platform.python_version()}, {packages}"


def as_text(line: dict[str, Any]) -> str:
    """A line of the table."""
    reach = "" if line["to_reach"] is None else f"<= {line['to_reach']:g} {line['unit']}".rstrip()
    verdict = {True: "reached", False: "missed", None: ""}[line["is_reached"]]
    numbers = (_spread(line["cpu"], line["unit"]), _spread(line["wall"], line["unit"]))
    return f"| {line['row']} | {line['what']} | {numbers[0]} | {numbers[1]} | {reach} | {verdict} |"


def _spread(values: list[float] | None, unit: str) -> str:
    if values is None:
        return ""
    digits = 0 if unit == "MB" else 2
    middle = f"{values[0]:.{digits}f} {unit}".rstrip()
    return middle if len(values) < 3 else f"{middle} ({values[1]:.{digits}f} to {values[2]:.{digits}f})"


def _save(output: Path, found: list[dict[str, Any]], how: dict[str, Any]) -> None:
    (output / "bench.json").write_text(json.dumps({"machine": machine(), **how, "lines": found}, indent=1) + "\n")
    table = "\n".join(map(as_text, found))
    (output / "bench.md").write_text(f"{machine()}\n\n{HEADER}\n{table}\n")


if __name__ == "__main__":
    typer.run(main)
