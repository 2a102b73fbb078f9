"""`fedmini bench`: the costs of fedmini as ratios, measured here. What it measures with stands in the repository."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedmini.command_help import HelpedCommand
from fedmini.errors import ConfigError

SCRIPT = Path("simulations", "benchmarks", "run_bench.py")


def add_to(app: typer.Typer) -> None:
    """The command, in an app."""
    app.command(cls=HelpedCommand)(bench)


def bench(
    output: Annotated[Path, typer.Option("--output", help="Where bench.json and bench.md go.")] = Path("bench"),
    rows: Annotated[
        str, typer.Option("--rows", help="Some of step, linear, device, cohort, toy, start, growth, demo, nf4, peers.")
    ] = "",
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Turns that a median is taken of.")] = 11,
    quick: Annotated[
        bool, typer.Option("--quick", help="Less of everything: whether it runs, not what it says.")
    ] = False,
    peers: Annotated[
        Path | None, typer.Option("--peers", help="What simulations/benchmarks/make_peers.sh installed.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another checkout, whose demo is measured in turn with this one's.")
    ] = None,
) -> None:
    """Measure what fedmini costs beside its peers, as a table: about half an hour on one core."""
    from fedmini.model import runtime

    script = _script()
    found = peers or runtime.default_cache_dir() / "peers"
    arguments = [str(output), "--rows", rows, "--repeats", str(repeats), "--peers", str(found.absolute())]
    if against is not None:
        arguments += ["--against", str(_checkout(against, rows))]
    command = [sys.executable, str(script), *arguments, *(["--quick"] if quick else [])]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(script.parents[2])}).returncode
    if code:
        raise typer.Exit(code)


def _checkout(against: Path, rows: str) -> Path:
    """The other checkout, where it is one and is asked for. Raises ConfigError."""
    if rows and "demo" not in rows.split(","):
        raise ConfigError("--against is for the row demo: add it to --rows, or leave --against out")
    if not (against / "fedmini" / "__init__.py").exists():
        raise ConfigError(f"--against {against}: no fedmini is there; give a checkout of its repository")
    return against.absolute()


def _script() -> Path:
    """In the repository that this fedmini is installed from, or in the folder that the command is given in."""
    for root in (Path(__file__).parents[1], Path.cwd()):
        if (root / SCRIPT).exists():
            return root / SCRIPT
    raise ConfigError(f"{SCRIPT} is not here: `fedmini bench` needs the repository, give the command in its folder")
