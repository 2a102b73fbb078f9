"""A gate as a process: it says when it listens, outlives a kill by its database, and never runs twice on one."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gate_process import GateProcess, running_gate, spawn
from wire import Device, Server, hold_a_poll

from fedmini.errors import ConfigError, StateError
from fedmini.flower import gate, registry


@pytest.fixture
def door(tmp_path: Path) -> Iterator[GateProcess]:
    with running_gate(tmp_path) as running:
        yield running


def test_devices_stay_registered_and_go_on_when_a_gate_was_killed(door: GateProcess):
    device = Device(door).activate()
    server = Server(door)
    message_id = server.send(device)
    door.kill()
    door.start()
    assert [node.node_id for node in registry.list_nodes(door.local_port, door.token)] == [device.node_id]
    device.client = device.connect()
    found = device.pull()
    assert found.messages_list[0].metadata.message_id == message_id
    device.confirm(found)
    assert device.reply(found).status_code == 200
    assert len(server.pull(message_id).messages_list) == 1  # the run goes on too


def test_a_second_gate_on_a_database_or_a_port_says_so_and_ends(door: GateProcess, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for config, wanted in (
        (replace(door.config, port=0, local_port=0), "another server is running"),
        (replace(door.config, database=other / "db", local_port=0), f"can't listen on 127.0.0.1:{door.port}"),
        (replace(door.config, database=other / "db", port=0), f"can't listen on 127.0.0.1:{door.local_port}"),
    ):
        second = spawn(config, other)
        assert second.wait(60) == 2
        assert second.stdout is not None and second.stdout.read() == ""
        second.stdout.close()
        assert wanted in (other / "gate.log").read_text().splitlines()[-1]


def test_a_database_that_is_none_is_refused_in_a_sentence(tmp_path: Path):
    database = tmp_path / "superlink.db"
    database.write_bytes(b"not a database, and longer than a header of one" * 100)
    config = gate.GateConfig("127.0.0.1", 0, 0, database, None, None, "x" * 64)
    refused = spawn(config, tmp_path)
    assert refused.wait(30) == 2
    assert refused.stdout is not None
    refused.stdout.close()
    assert "can't use the database" in (tmp_path / "gate.log").read_text().splitlines()[-1]


def test_a_gate_ends_soon_after_it_was_asked_also_with_polls_held(door: GateProcess):
    device = Device(door).activate()
    with hold_a_poll(device) as held:
        assert door.stop() == 0
        assert b"200 OK" in held.recv(65536)


def test_a_gate_ends_with_its_parent(tmp_path: Path):
    with running_gate(tmp_path) as running:
        assert running.stop() == 0
        program = (
            "import subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'fedmini.flower.gate', sys.argv[1]], "
            "stdout=subprocess.PIPE, text=True); p.stdout.readline(); print(p.pid, flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "gate.json")]
        parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert parent.stdin is not None and parent.stdout is not None
        with parent.stdin, parent.stdout:
            handle = os.pidfd_open(int(parent.stdout.readline()))
            parent.kill()
            parent.wait(20)
            assert readable(handle, 20)  # a pidfd is, once its process has ended


def test_a_gate_whose_parent_died_before_it_could_look_never_listens(tmp_path: Path):
    config = gate.GateConfig("127.0.0.1", 0, 0, tmp_path / "superlink.db", None, None, "x" * 64)
    path = tmp_path / "gate.json"
    path.touch(mode=0o600)
    path.write_text(gate.config_json(config))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    command = [sys.executable, "-m", "fedmini.flower.gate", str(path), str(dead.pid)]
    orphan = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (orphan.returncode, orphan.stdout) == (-signal.SIGTERM, "")
    assert not config.database.exists()


def test_a_gate_without_tls_has_nothing_to_read_anew_and_lives_on(tmp_path: Path):
    with running_gate(tmp_path, certificate=None, private_key=None) as door:
        os.kill(door.process.pid, signal.SIGHUP)
        assert registry.list_nodes(door.local_port, door.token) == ()
        assert door.stop() == 0


def test_a_change_while_a_gate_starts_is_read_when_it_listens(tmp_path: Path):
    with running_gate(tmp_path) as door:
        assert door.stop() == 0
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # as a supervisor does
        try:
            process = spawn(door.config, tmp_path)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with process.stdout:
            process.send_signal(signal.SIGHUP)
            assert json.loads(process.stdout.readline())["ready"]
            process.terminate()
            assert process.wait(20) == 0
    assert "gate.certificate_read" in door.log


def test_a_gate_logs_no_secret_and_no_content(door: GateProcess):
    device = Device(door).activate()
    server = Server(door)
    server.send(device)
    device.confirm(device.pull())
    signed = device.signed()
    marked = b"MARKED-CONTENT"
    device.client.post(
        "/v1/fleet/push-messages", content=marked, headers={**signed, "content-type": "application/protobuf"}
    )
    device.client.post("/v1/fleet/pull-object", content=marked, headers={**signed, "content-type": "MARKED-TYPE"})
    assert door.stop() == 0
    for secret in (door.token, *signed.values(), "MARKED", server.headers["flwr-task-token"]):
        assert secret not in door.log
    events = [json.loads(line) for line in door.log.splitlines()]
    assert {event["event"] for event in events} <= {"gate.ready", "gate.stopped", "superlink.log"}
    assert all(set(event) <= FIELDS for event in events)


FIELDS = {
    "time", "source", "event", "port", "local_port", "tls", "level", "place", "error", "refused_connections",
}  # fmt: skip


def test_a_configuration_that_others_can_read_or_that_is_not_one_is_refused(tmp_path: Path):
    path = tmp_path / "gate.json"
    config = gate.GateConfig("127.0.0.1", 0, 0, tmp_path / "db", None, None, "x" * 64)
    path.write_text(gate.config_json(config))
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        gate.read_config(path)
    path.chmod(0o600)
    assert gate.read_config(path) == config
    for spoilt in ("", "[]", "{}", '{"host": 1}', path.read_text().replace("x" * 64, "short")):
        path.write_text(spoilt)
        with pytest.raises(ConfigError):
            gate.read_config(path)
    assert gate.main([str(tmp_path / "nowhere.json")]) == 2


def test_a_database_is_held_by_one_at_a_time_and_given_back(tmp_path: Path):
    database = tmp_path / "superlink.db"
    with gate.locked(database), pytest.raises(StateError, match="another server"), gate.locked(database):
        pass
    with gate.locked(database):
        pass


def test_a_database_that_is_held_a_moment_longer_is_waited_for(tmp_path: Path):
    database, is_given_back = tmp_path / "superlink.db", threading.Event()
    with contextlib.ExitStack() as held:
        held.enter_context(gate.locked(database))
        timer = threading.Timer(0.3, lambda: (is_given_back.set(), held.close()))
        timer.start()
        with gate.locked(database, wait_s=20.0):
            assert is_given_back.is_set()
        timer.join()


def test_importing_the_gate_loads_no_flower_and_changes_no_environment():
    program = (
        "import os, sys; before = dict(os.environ); import fedmini.flower.gate; "
        "assert dict(os.environ) == before; assert not {'flwr', 'uvicorn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_a_gate_writes_is_for_its_owner_only(door: GateProcess):
    for path in (door.config.database, door.config.database.with_name("superlink.db.lock")):
        assert path.stat().st_mode & 0o077 == 0


def readable(descriptor: int, within_s: float) -> bool:
    """Whether a descriptor can be read from within some seconds; it is closed afterwards."""
    try:
        return bool(select.select([descriptor], [], [], within_s)[0])
    finally:
        os.close(descriptor)
