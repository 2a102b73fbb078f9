"""What `--help` says of a command: its arguments and options with their texts, and no markup."""

from pathlib import Path

import pytest

from tests.command_line import a_shell, done


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("plan", ["CONFIG  The run's TOML file.", "--manifest PATH"]),
        ("simulate", ["CONFIG  The run's TOML file; may be left out with --resume.", "[required]", "--secure"]),
        ("report", ["DIRECTORY  A run's directory, finished or running."]),
        ("chat", ["--adapter PATH", "[required]"]),
    ],
)
def test_help_says_what_each_argument_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, texts: list[str]
) -> None:
    said = done(a_shell(tmp_path, capsys, monkeypatch)(command, "--help"))
    assert all(text in said for text in texts)
    assert "\\" not in said
    assert ("Arguments:" in said) == (command != "chat")
