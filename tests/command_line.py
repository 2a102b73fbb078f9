"""The real command line, called in this process: what it printed, and how it ended."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedmini import cli


@dataclass(frozen=True)
class Answer:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that an error is."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.startswith("fedmini: ") and self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.removeprefix("fedmini: ").rstrip("\n")


Shell = Callable[..., Answer]


def done(answer: Answer) -> str:
    """What a command printed that ended well."""
    assert (answer.code, answer.err) == (0, ""), answer
    return answer.out


def call(arguments: Sequence[str], capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> Answer:
    """One command, with the arguments that a terminal would hand it."""
    patch.setattr(sys, "argv", ["fedmini", *arguments])
    capture.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as error:
        code = int(error.code or 0)
    said = capture.readouterr()
    return Answer(code, said.out, said.err)


def a_shell(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Calls commands in a folder of their own, where nobody sits at the terminal."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return lambda *arguments: call(arguments, capsys, monkeypatch)
