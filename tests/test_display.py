"""What a person sees: a live display in a terminal, plain lines in a pipe, and commands that can be pasted."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedmini import display
from fedmini.pace import KnownPace, Pace
from fedmini.simulation import Progress

EPSILON = {"example": 1.5}


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def show(to: Console, *steps: Progress) -> str:
    with display.ProgressDisplay(to) as shown:
        for step in steps:
            shown(step)
    return written(to)


def committed(round_num: int, loss_round: int) -> Progress:
    return Progress(
        "round", "", round_num, num_rounds=4, num_devices=5, loss=3.25, loss_round=loss_round, epsilon=EPSILON
    )


def test_a_pipe_gets_one_plain_line_a_round() -> None:
    devices = [
        Progress("round", "", 0, 4, device, 5, loss=4.5, loss_round=0, epsilon={"example": 0.0}) for device in (1, 2, 3)
    ]

    text = show(console(), Progress("base", "loading"), committed(0, 0), *devices, committed(1, 1))

    lines = [line.split("] ", 1)[1] for line in text.splitlines()]
    assert lines[0] == "loading"
    assert lines[1] == "before training:   loss on unseen people 3.250 nats/token   epsilon 1.50 per example"
    assert lines[2].startswith("round 1 of 4:   5 devices   loss on unseen people 3.250 nats/token   epsilon 1.50 per")
    assert lines[2].endswith(" left")
    assert len(lines) == 3
    assert "\x1b" not in text


def test_a_round_without_an_evaluation_shows_no_loss() -> None:
    text = show(console(), committed(2, 2), committed(3, 2))

    second, third = text.splitlines()
    assert "loss on unseen people 3.250" in second
    assert "round 3 of 4" in third
    assert "loss" not in third and "epsilon 1.50" in third


def test_nothing_is_left_to_wait_for_after_the_last_round() -> None:
    assert " left" not in show(console(), committed(3, 3), committed(4, 4)).splitlines()[-1]


def test_a_terminal_shows_round_device_loss_epsilon_and_time_left() -> None:
    to = console(terminal=True)
    with display.ProgressDisplay(to) as shown:
        shown(committed(2, 0))
        shown(Progress("round", "", 2, 4, 3, 5, loss=3.25, loss_round=0, epsilon=EPSILON))
        to.print(shown._render())

    text = written(to)
    assert "round 3 of 4   device 3 of 5" in text
    assert "loss on unseen people 3.250 nats/token (round 0)   epsilon 1.50 per example" in text
    assert "s left" in text


def test_a_terminal_says_what_is_measured_and_that_it_gets_ready() -> None:
    to = console(terminal=True)
    with display.ProgressDisplay(to) as shown:
        shown(Progress("base", "loading the base model"))
        to.print(shown._render())
        shown(Progress("evaluation", "", 2, 4))
        to.print(shown._render())

    text = written(to)
    assert "getting ready" in text
    assert "round 0 of 0" not in text
    assert "after round 2 of 4   measuring the loss" in text


@pytest.mark.parametrize(("seconds", "said"), [(4.2, "4 s"), (300, "5.0 min"), (5 * 3600, "5.0 h")])
def test_a_time_is_said_in_fitting_units(seconds: float, said: str) -> None:
    assert display.duration(seconds) == said
    assert said in display.time_sentence(seconds)


def test_a_time_is_said_with_how_many_trained_at_once_when_it_was_measured() -> None:
    known = KnownPace(Pace(), workers=2, devices_per_batch=8)
    assert display.time_sentence(300, known).endswith("(2 processes, 8 devices at a time in each)")
    alone = KnownPace(Pace(), workers=1, devices_per_batch=1)
    assert display.time_sentence(300, alone).endswith("(1 process, 1 device at a time in each)")


def test_a_time_that_was_never_measured_is_not_made_up() -> None:
    assert display.time_sentence(None) == "not known on this machine before a first run with these settings"


def call(monkeypatch: pytest.MonkeyPatch, executable: Path, search: Path, as_module: bool) -> str:
    """What `program` says where that executable was called, with `search` as PATH."""
    main = SimpleNamespace(__spec__=SimpleNamespace(name="fedmini.__main__") if as_module else None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr(sys, "argv", [str(executable)])
    monkeypatch.setenv("PATH", str(search))
    return display.program()


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    for name in ("fedmini", "python"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_command_on_the_path_is_called_by_its_name(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, bin_folder / "fedmini", bin_folder, as_module=False) == "fedmini"
    assert call(monkeypatch, bin_folder / "python", bin_folder, as_module=True) == "python -m fedmini"


def test_a_command_elsewhere_is_called_by_its_path_quoted(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = bin_folder.parent
    assert call(monkeypatch, bin_folder / "fedmini", elsewhere, as_module=False) == "'my env/bin/fedmini'"
    assert call(monkeypatch, bin_folder / "python", elsewhere, as_module=True) == "'my env/bin/python' -m fedmini"
    monkeypatch.chdir(bin_folder)
    assert call(monkeypatch, bin_folder / "fedmini", elsewhere, as_module=False) == "./fedmini"
