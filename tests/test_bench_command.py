"""`fedmini bench`: finds what it measures with, measures what is asked for, and says what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmini import bench_commands
from tests import command_line

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> command_line.Shell:
    return command_line.a_shell(tmp_path, capsys, monkeypatch)


def test_a_quick_row_is_measured_printed_and_saved(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fedmini",
        "bench",
        "--quick",
        "--repeats",
        "2",
        "--rows",
        "toy",
        "--output",
        "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    saved = json.loads((tmp_path / "out" / "bench.json").read_text())
    own, bare, accountant = saved["lines"]
    assert own["unit"] == bare["unit"] == "ms" and accountant["unit"] == "s"
    assert bare["cpu"][0] > 0 and len(bare["cpu"]) == 3
    assert own["is_reached"] is (own["cpu"][0] <= own["to_reach"] == 0.3)
    assert f"| toy | {own['what']} |" in done.stdout
    assert (tmp_path / "out" / "bench.md").read_text().count("\n| toy |") == 3


def test_an_unknown_row_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedmini", "bench", "--rows", "toy,swiftness"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "fedmini: no row swiftness; there are step, linear, device, cohort, toy, start, growth, demo, peers\n"
    )


def test_without_the_repository_the_command_says_that_it_needs_it(
    shell: command_line.Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_commands, "__file__", str(tmp_path / "site-packages" / "fedmini" / "bench_commands.py"))
    assert "needs the repository" in shell("bench").complaint


def test_the_rows_that_the_help_names_are_those_that_there_are(shell: command_line.Shell) -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "import bench_rows; print(*bench_rows.ROWS, sep=', ')"],
        capture_output=True,
        text=True,
        cwd=ROOT / "simulations" / "benchmarks",
    )
    assert listed.stdout.strip() in " ".join(command_line.done(shell("bench", "--help")).replace("|", " ").split())
