"""What `fedmini server start`, `status` and `stop` say where nothing can be served: one line, exit code 2, nothing begun."""

import fcntl
import io
import json
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
import tomli_w

from fedmini import events, server_folder
from fedmini.deployment import coordinator, supervisor
from fedmini.deployment.run_files import RunFiles
from fedmini.deployment.status import StatusFile
from fedmini.deployment.supervisor import Commands, Supervisor
from fedmini.errors import LinkError, StateError
from fedmini.server_folder import ServerFolder
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


@pytest.mark.parametrize("chosen", ["option", "file"])
def test_a_server_that_logs_json_says_as_json_why_it_refuses(shell: Shell, tmp_path: Path, chosen: str) -> None:
    a_server(shell, tmp_path, signed=True)
    if chosen == "file":
        settings = tmp_path / "srv/server.toml"
        settings.write_text(settings.read_text().replace('log_format = "text"', 'log_format = "json"'))
    option = ("--log-format", "json") if chosen == "option" else ()
    with (tmp_path / "srv/state/server.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answer = shell("server", "start", "srv", *option)
    assert answer.code == 2
    said = json.loads(answer.err)
    assert (said["source"], said["event"]) == ("server", "server.refused")
    assert said["reason"] == "another server runs in srv: stop it first"


def test_a_folder_that_is_none_is_refused_as_json_too(shell: Shell) -> None:
    answer = shell("server", "start", "nowhere", "--log-format", "json")
    assert answer.code == 2 and "nowhere is no server's folder" in json.loads(answer.err)["reason"]


def python(program: str) -> tuple[str, ...]:
    """A process in the place of a gate or a coordinator."""
    return sys.executable, "-c", program


LISTENS = 'print(\'{"port": 1, "local_port": 2}\', flush=True);'
SLEEPS = "import time; time.sleep(60)"


def a_supervisor(shell: Shell, tmp_path: Path, gate: str, coordinator: str = SLEEPS) -> tuple[Supervisor, io.StringIO]:
    a_server(shell, tmp_path, signed=True)
    log = io.StringIO()
    commands = Commands(gate=python(gate), coordinator=python(coordinator))
    return Supervisor(server_folder.opened(Path("srv")), log, "json", commands), log


def test_a_gate_that_ends_before_it_listens_ends_the_server_at_once(shell: Shell, tmp_path: Path) -> None:
    server, _ = a_supervisor(shell, tmp_path, "raise SystemExit(2)")
    began = time.monotonic()
    with pytest.raises(StateError, match="the gate did not start: its log above says why"):
        server.run("tiny")
    assert time.monotonic() - began < supervisor.READY_SECONDS / 2


def test_a_server_that_waits_for_its_gate_stops_when_it_is_asked(shell: Shell, tmp_path: Path) -> None:
    server, log = a_supervisor(shell, tmp_path, SLEEPS)
    threading.Timer(0.5, server.stop).start()
    began = time.monotonic()
    assert server.run("tiny") == 0
    assert time.monotonic() - began < supervisor.READY_SECONDS / 2
    assert json.loads(log.getvalue().splitlines()[-1])["event"] == "server.stopped"


def test_a_folder_that_changes_while_its_gate_starts_is_passed_on_to_it(shell: Shell, tmp_path: Path) -> None:
    """The gate touches the folder as a command would, and ends the server when it is told."""
    hears = "import pathlib, signal; pathlib.Path('srv/operator.pub').touch(); "
    waits = "signal.sigwait({signal.SIGHUP}); pathlib.Path('heard').touch(); raise SystemExit(2)"
    server, _ = a_supervisor(shell, tmp_path, hears + LISTENS + waits)
    assert server.run("tiny") == 2
    assert Path("heard").exists()


def test_a_coordinator_that_somebody_ended_is_started_again(shell: Shell, tmp_path: Path) -> None:
    """The first is sent a SIGTERM, which it answers as the real one does; the second says that the run is over."""
    ends = (
        "import os, pathlib, signal, sys; begun = pathlib.Path('begun'); begun.exists() and sys.exit(0); begun.touch();"
        "from fedmini.deployment import coordinator; signal.signal(signal.SIGTERM, coordinator.end_early);"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    server, log = a_supervisor(shell, tmp_path, LISTENS + SLEEPS, ends)
    assert server.run("tiny") == 0
    events = [json.loads(line) for line in log.getvalue().splitlines()]
    died = [one for one in events if one["event"] == "process.died"]
    assert [(one["process"], one["status"]) for one in died] == [("coordinator", 128 + signal.SIGTERM)]


def test_a_server_that_has_said_nothing_yet_is_not_one_that_never_ran(shell: Shell, tmp_path: Path) -> None:
    a_server(shell, tmp_path, signed=True)
    with (tmp_path / "srv/state/server.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("4242")
        file.flush()
        assert done(shell("server", "status", "srv")).splitlines() == [
            "server       runs as process 4242",
            "now          starting: it has said nothing yet",
        ]
    assert shell("server", "status", "srv").complaint == "no server has ever run in srv"


def test_a_server_says_that_it_is_starting_before_it_reaches_any_device_or_loads_the_base(
    shell: Shell, tmp_path: Path
) -> None:
    a_server(shell, tmp_path, signed=True)

    def unreachable(folder: ServerFolder, files: RunFiles) -> NoReturn:
        raise LinkError("nobody is there")

    with pytest.raises(LinkError, match="nobody is there"):
        coordinator.serve_over(unreachable, Path("srv"), "tiny", events.nowhere)
    said = done(shell("server", "status", "srv")).splitlines()
    assert re.fullmatch(r"run          tiny-[0-9a-f]{8}: 0 of \d+ rounds committed", said[1])
    assert re.fullmatch(r"now          starting when it ended, \d+ s ago; 0 devices ready", said[2])


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
