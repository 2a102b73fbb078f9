"""What `fedmini server start`, `status` and `stop` say where nothing can be served: one line, exit code 2, nothing begun."""

import fcntl
import re
from pathlib import Path

import pytest
import tomli_w

from fedmini.deployment.status import StatusFile
from tests import tiny_run
from tests.command_line import Shell, a_shell, done

UNIT = {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 4.0, "target_delta": 1e-5}


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return a_shell(tmp_path, capsys, monkeypatch)


def a_server(shell: Shell, tmp_path: Path, *, signed: bool) -> None:
    """A server's folder srv with the run tiny, planned from run.toml."""
    write_run(tmp_path)
    done(shell("operator", "init", "op"))
    made = shell("server", "init", "srv", "--host", "127.0.0.1", "--operator", "op/operator.pub", "--run", "run.toml")
    assert made.code == 0, made.err
    if signed:
        place = "srv/runs/tiny"
        done(
            shell(
                "operator", "sign-manifest", "op", f"{place}/manifest.json", "--output", f"{place}/manifest.signed.json"
            )
        )


def write_run(tmp_path: Path, name: str = "run.toml", **changes: object) -> None:
    sections = {"privacy": {"example": UNIT}, **changes}
    chosen = tiny_run.config(tmp_path, changes=sections)
    values = chosen.model_dump(mode="json", exclude_none=True)
    values["run"].pop("seed")
    (tmp_path / name).write_text(tomli_w.dumps(values))


def test_a_folder_that_is_none_and_one_without_a_run_are_named(shell: Shell) -> None:
    assert "nowhere is no server's folder" in shell("server", "start", "nowhere").complaint
    done(shell("operator", "init", "op"))
    done(shell("server", "init", "srv", "--host", "127.0.0.1", "--operator", "op/operator.pub"))
    assert shell("server", "start", "srv").complaint == "which run? name its RUN.toml; there is none yet"
    assert shell("server", "status", "srv").complaint == "no server has ever run in srv"
    assert shell("server", "stop", "srv").complaint == "no server runs in srv"
    assert (
        "--log-format: expected text or json, got 'xml'"
        in shell("server", "start", "srv", "--log-format", "xml").complaint
    )


def test_a_run_that_nobody_signed_is_not_served_and_the_line_says_what_to_do(shell: Shell, tmp_path: Path) -> None:
    a_server(shell, tmp_path, signed=False)
    complaint = shell("server", "start", "srv").complaint
    assert "is not signed yet" in complaint and "`fedmini operator sign-manifest OPERATOR manifest.json`" in complaint
    assert "srv/runs/tiny/manifest.signed.json" in complaint
    write_run(tmp_path, "another.toml", run={"name": "another"})
    answer = shell("server", "start", "srv", "another.toml")
    assert answer.code == 2 and "Planned another in srv/runs/another." in answer.out and "not signed yet" in answer.err
    assert (tmp_path / "srv/runs/another/manifest.json").exists()


def test_a_signature_by_somebody_else_and_a_changed_setting_are_refused(shell: Shell, tmp_path: Path) -> None:
    a_server(shell, tmp_path, signed=True)
    write_run(tmp_path, rounds={"num_rounds": 9})
    assert "planned with other settings (rounds differ)" in shell("server", "start", "srv", "run.toml").complaint
    settings = tmp_path / "srv/runs/tiny/config.toml"
    settings.write_text(re.sub(r"num_rounds = \d+", "num_rounds = 9", settings.read_text()))
    assert "another manifest than the one that the operator signed" in shell("server", "start", "srv").complaint
    done(shell("operator", "init", "stranger"))
    place = "srv/runs/tiny"
    done(
        shell(
            "operator",
            "sign-manifest",
            "stranger",
            f"{place}/manifest.json",
            "--output",
            f"{place}/manifest.signed.json",
        )
    )
    assert "the manifest is signed with the operator key" in shell("server", "start", "srv").complaint


def test_a_run_with_a_seed_is_not_served(shell: Shell, tmp_path: Path) -> None:
    a_server(shell, tmp_path, signed=True)
    settings = tmp_path / "srv/runs/tiny/config.toml"
    settings.write_text(settings.read_text().replace("[run]\n", "[run]\nseed = 7\n"))
    assert "has a run.seed" in shell("server", "start", "srv").complaint


def test_without_tls_a_server_is_refused_on_any_address_but_loopback(shell: Shell, tmp_path: Path) -> None:
    a_server(shell, tmp_path, signed=True)
    complaint = shell("server", "start", "srv", "--insecure").complaint
    assert "without a certificate a gate listens on loopback only, and 0.0.0.0 is not" in complaint


def test_a_second_server_on_one_folder_is_refused(shell: Shell, tmp_path: Path) -> None:
    a_server(shell, tmp_path, signed=True)
    with (tmp_path / "srv/state/server.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert shell("server", "start", "srv").complaint == "another server runs in srv: stop it first"


def test_the_status_says_how_the_run_stands_and_for_whom_it_waits(shell: Shell) -> None:
    done(shell("operator", "init", "op"))
    done(shell("server", "init", "srv", "--host", "127.0.0.1", "--operator", "op/operator.pub"))
    StatusFile(Path("srv/state")).write(
        {
            "run": "chat-1",
            "phase": "waiting",
            "round": 2,
            "num_rounds": 12,
            "attempt": None,
            "ready": ["anna"],
            "waiting_for": {"ben": "it is not connected", "carl": "consent: its owner has not agreed yet"},
            "epsilon": {"example": 1.2345},
            "eval_loss": 4.1,
            "late_replies": 0,
        }
    )
    said = done(shell("server", "status", "srv")).splitlines()
    assert said == [
        "server       does not run",
        "run          chat-1: 2 of 12 rounds committed",
        "now          waiting when it ended, 0 s ago; 1 device ready",
        "spent        example epsilon 1.235",
        "loss         4.1000 nats a token, on the public file",
        "waits for    ben: it is not connected",
        "waits for    carl: consent: its owner has not agreed yet",
    ]
