"""The daemons as processes: started, stopped, killed, started twice; and examples that are put in beside them."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmini.config import StoreSection
from fedmini.store import ExampleStore, StoredExample
from tests.command_line import Shell, a_shell, done
from tests.device_service import serving
from tests.device_service.serving import Client, Daemon, refused

SECRET = "thesecretword"


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return a_shell(tmp_path, capsys, monkeypatch)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A command that is called in this process changes what its signals do."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, do in before.items():
        signal.signal(number, do)


def kept(folder: Path) -> list[StoredExample]:
    with ExampleStore.open(folder / "examples", StoreSection(), find_keyring=lambda: None) as store:
        return store.examples()


def test_two_daemons_do_not_share_a_folder_and_a_killed_one_can_be_started_again(tmp_path: Path) -> None:
    folder = serving.a_folder(tmp_path / "one")
    path = tmp_path / "device.sock"
    with serving.serving(folder, "--socket", path) as daemon, Client(path) as client:
        assert client.add((None, "a")) == 1
        (said,) = serving.complaints(("device", "serve", folder, "--socket", tmp_path / "s"))
        assert "is open in another" in said
        assert client.call("Status").num_examples == 1
        daemon.kill()
        assert path.exists(), "a killed process leaves its socket"
    with serving.serving(folder, "--socket", path) as daemon, Client(path) as client:
        assert client.call("Status").num_examples == 1
        assert daemon.end() == 0
    assert not path.exists()
    assert daemon.wait_for("device.stopped")["source"] == "device"


def test_a_loopback_address_takes_the_token_of_the_folder(tmp_path: Path) -> None:
    folder = serving.a_folder(tmp_path / "one")
    with serving.serving(folder, "--listen", "127.0.0.1:0") as daemon:
        address = daemon.wait_for("service.listens")["address"]
        token = (folder / "service.token").read_text()
        assert (folder / "service.token").stat().st_mode & 0o777 == 0o600
        with Client(address, token) as client, Client(address, "wrong" * 10) as stranger, Client(address) as nobody:
            assert client.add((None, SECRET)) == 1
            assert refused(stranger.call, "Status")[0] == "UNAUTHENTICATED"
            assert refused(nobody.call, "Status")[0] == "UNAUTHENTICATED"
        assert token not in daemon.log.read_text() and SECRET not in daemon.log.read_text()
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(60) == 0


def test_a_device_runs_without_any_socket_looks_for_its_server_and_takes_examples_from_beside(tmp_path: Path) -> None:
    server = (
        '[device]\nserver = "http://127.0.0.1:1"\n[conditions]\non_power = false\nidle = false\nunmetered = false\n'
    )
    folder = serving.a_folder(tmp_path / "one", server)
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "tea?", "response": SECRET}) + "\n")
    daemon = Daemon(("run", folder), tmp_path / "log").start()
    try:
        ended = serving.fedmini("device", "add", folder, tmp_path / "more.jsonl")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout == f"Added 1 example to {folder}: it keeps 1.\n"
        assert daemon.end() == 0
    finally:
        daemon.kill()
    assert not list(folder.glob("*.sock"))
    assert SECRET not in daemon.log.read_text()
    assert kept(folder) == [StoredExample(SECRET, "tea?")]


def test_a_daemon_that_can_not_begin_says_what_to_do(tmp_path: Path, shell: Shell) -> None:
    folder = serving.a_folder(tmp_path / "one")
    socket = ("--socket", str(tmp_path / "s"))
    serve = lambda *arguments: shell("device", "serve", str(folder), *arguments).complaint  # noqa: E731
    assert "give --socket PATH or --listen 127.0.0.1:PORT, one of them" in serve()
    assert "one of them" in serve(*socket, "--listen", "127.0.0.1:0")
    assert "--token-file goes with --listen" in serve(*socket, "--token-file", "t")
    assert "nothing but this machine may reach it" in serve("--listen", "0.0.0.0:7000")
    assert "--log-format: expected text or json, got 'xml'" in serve(*socket, "--log-format", "xml")
    nowhere = shell("device", "serve", str(tmp_path / "none"), *socket).complaint
    assert "is no device's folder: make one with `fedmini device init" in nowhere
    assert not (tmp_path / "none").exists()
    # What begins to work changes the process it is in, so it is one of its own from here on.
    (tmp_path / "s").touch()
    other = serving.a_folder(tmp_path / "two")
    no_server, no_socket = serving.complaints(("device", "run", other), ("device", "serve", folder, *socket))
    assert "which server?" in no_server and "is there, and no socket" in no_socket
    (folder / "device.toml").write_text("[device]\nlifetime_epsilom = 1.0\n")
    assert "did you mean lifetime_epsilon?" in serve("--socket", str(tmp_path / "t"))


def test_examples_come_from_a_file_all_or_none(tmp_path: Path, shell: Shell) -> None:
    folder, file = serving.a_folder(tmp_path / "one"), tmp_path / "more.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n\n{"text": "c", "client": "ignored"}\n')
    assert done(shell("device", "add", "one", "more.jsonl")) == "Added 2 examples to one: it keeps 2.\n"
    assert kept(folder) == [StoredExample("b", "a"), StoredExample("c", None)]
    file.write_text('{"text": "d"}\n{"prompt": "x", "text": "' + SECRET + '"}\n')
    answer = shell("device", "add", "one", "more.jsonl")
    assert "more.jsonl, line 2" in answer.complaint and SECRET not in answer.err + answer.out
    assert len(kept(folder)) == 2


def test_more_examples_than_the_store_takes_leave_the_newest(tmp_path: Path, shell: Shell) -> None:
    folder = serving.a_folder(tmp_path / "one", "[store]\nmax_examples = 3\n")
    (tmp_path / "more.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(5)))
    assert done(shell("device", "add", "one", "more.jsonl")) == "Added 5 examples to one: it keeps 3.\n"
    assert [one.response for one in kept(folder)] == ["2", "3", "4"]


def test_examples_for_what_is_no_device_or_from_nothing_are_refused(tmp_path: Path, shell: Shell) -> None:
    serving.a_folder(tmp_path / "one")
    (tmp_path / "empty.jsonl").touch()
    assert "can't read the data file" in shell("device", "add", "one", "none.jsonl").complaint
    assert "is no device's folder" in shell("device", "add", "two", "empty.jsonl").complaint
    assert "holds no example" in shell("device", "add", "one", "empty.jsonl").complaint
