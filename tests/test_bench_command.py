"""`fedmini bench`: finds what it measures with, measures what is asked for, and says what is missing."""

import importlib
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
        "fedmini: no row swiftness; there are step, linear, device, cohort, toy, start, growth, demo, nf4, peers\n"
    )


def test_a_row_whose_peers_are_missing_says_how_to_make_them_and_leaves_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedmini", "bench", "--quick", "--repeats", "2", "--rows", "nf4,toy"]
    done = subprocess.run(
        [*command, "--output", "out", "--peers", "nowhere"], capture_output=True, text=True, cwd=tmp_path
    )
    folder = tmp_path / "nowhere"
    assert (done.returncode, done.stderr) == (
        2,
        f"fedmini: row nf4: no {folder}/torch/bin/python: simulations/benchmarks/make_peers.sh {folder} installs the peers\n",
    )
    assert {line["row"] for line in json.loads((tmp_path / "out" / "bench.json").read_text())["lines"]} == {"toy"}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [("toy", "--against is for the row demo: add it to --rows"), ("toy,demo", "no fedmini is there")],
)
def test_another_checkout_is_refused_where_it_is_none_or_nobody_asks_for_it(
    shell: command_line.Shell, tmp_path: Path, rows: str, complaint: str
) -> None:
    assert complaint in shell("bench", "--rows", rows, "--against", str(tmp_path)).complaint


def test_two_checkouts_run_the_same_demo_in_turn_each_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "simulations" / "benchmarks")
    demo_measures = importlib.import_module("demo_measures")
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    asked = []
    found = demo_measures.in_turn((ROOT, tmp_path), 2, lambda command, tree: asked.append((command, tree)))
    assert [tree for _, tree in asked] == 3 * [ROOT, tmp_path]
    assert asked[1][0][0] == str(own)
    here, there = ([part for part in command[1:] if "fedmini-bench-" not in part] for command, _ in asked[:2])
    assert here == there and str(ROOT / "simulations" / "chat.toml") in here
    assert [(len(cpu), len(wall)) for cpu, wall in found] == [(2, 2), (2, 2)]


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
