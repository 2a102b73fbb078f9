"""What the demo costs, cut down to two rounds of four devices on one thread: of this checkout, or of two in turn."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "chat.toml"
SETTINGS = (
    "rounds.num_rounds=2",
    "rounds.cohort_size=4",
    "rounds.over_selection=1.0",
    "rounds.min_survivors=unset",
    "rounds.max_participations=unset",
    "evaluation.max_examples=32",
    "simulation.num_threads=1",
)
Run = Callable[[Sequence[str], Path], object]  # a command with the code of a checkout


def seconds(tree: Path, run: Run) -> tuple[float, float]:
    """CPU and wall seconds of the demo, as it is set here, with the code of `tree`, and its .venv where it has one."""
    own = tree / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    with tempfile.TemporaryDirectory(prefix="fedmini-bench-") as folder:
        command = [python, "-m", "fedmini", "simulate", str(DEMO), "--output", str(Path(folder) / "run")]
        before = os.times()
        run([*command, *(part for one in SETTINGS for part in ("--set", one))], tree)
        after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, after.elapsed - before.elapsed


def in_turn(trees: Sequence[Path], repeats: int, run: Run) -> list[tuple[list[float], list[float]]]:
    """CPU and wall seconds of each checkout's demo, alternating, after a turn that fills the caches."""
    turns = [[seconds(tree, run) for tree in trees] for _ in range(repeats + 1)][1:]
    return [([turn[side][0] for turn in turns], [turn[side][1] for turn in turns]) for side in range(len(trees))]


def revision(tree: Path) -> str:
    """A checkout's commit; its folder's name where git knows none."""
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or tree.name
