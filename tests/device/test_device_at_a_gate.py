"""A device at a real gate: TLS, Flower's own database, connections that break, and processes that are killed."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app.message import message

from fedmini.device import worker
from fedmini.flower import fleet
from fedmini.privacy.device_ledger import DeviceLedger
from fedmini.secagg.messages import Stage
from tests.device import world
from tests.device.gate_server import GateServer, Wire, gate_server
from tests.device.hostile_server import Answer
from tests.device.world import Round, a_run, offered, wait_for_status

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GateServer]:
    with gate_server(tmp_path_factory.mktemp("gate")) as made:
        yield made


def join(gate: GateServer, owned) -> None:
    gate.register(owned.login_key_pem)
    owned.device.start()
    gate.wait_for_device()


def test_a_device_takes_part_in_rounds_over_a_real_gate_and_leaves_at_once(base, devices, gate) -> None:
    manifest = a_run(base)
    owned = devices(manifest, url=gate.url, ca=gate.gate.ca)
    join(gate, owned)
    assert gate.ask(offered(manifest)).kind == "ready"
    work = Round(manifest, gate.ask)
    assert [work.run(round_num).num_devices for round_num in (1, 2)] == [4, 4]
    began = time.monotonic()
    owned.device.close()
    assert time.monotonic() - began < 5, "its poll is held for 15 seconds"
    assert gate.node not in gate.link.nodes(), "and it has logged out"


@pytest.mark.parametrize("ahead_s", [20.0, 50.0, 200.0, 86400.0, -86400.0])
def test_a_device_whose_clock_is_wrong_takes_part_by_the_servers(base, devices, gate, monkeypatch, ahead_s) -> None:
    """Flower takes a login from up to 5 s ahead, and no answer whose time is over by its own account."""
    real_now = message.now

    def now() -> datetime:  # the server's side makes messages in this process too
        is_device = threading.current_thread().name.startswith("fedmini-")
        return real_now() + timedelta(seconds=ahead_s if is_device else 0.0)

    monkeypatch.setattr(message, "now", now)
    clock = SimpleNamespace(time=lambda: time.time() + ahead_s, monotonic=time.monotonic)
    monkeypatch.setattr(fleet, "time", clock)
    manifest = a_run(base)
    owned = devices(manifest, url=gate.url, ca=gate.gate.ca)
    join(gate, owned)
    assert gate.ask(offered(manifest), 10).kind == "ready"
    assert Round(manifest, gate.ask).run(1).num_devices == 4
    assert owned.heard.count("device.connected") == 1 and owned.heard.count("device.problem") == 0


def test_an_answer_that_a_broken_connection_swallows_is_given_again_and_answered_once(base, devices, gate) -> None:
    wire = Wire(gate.gate.port)
    manifest = a_run(base)
    owned = devices(manifest, url=f"https://127.0.0.1:{wire.port}", ca=gate.gate.ca)
    try:
        join(gate, owned)
        assert gate.ask(offered(manifest)).kind == "ready"
        work = Round(manifest, gate.ask)
        work.before = lambda stage: wire.break_at_next_answer() if stage is Stage.ADVERTISE else None
        assert work.run(1).num_devices == 4
        assert wire.num_broken == 1 and len(owned.device.receipts()) == 1
    finally:
        owned.device.close()
        wire.close()


def test_a_device_that_is_cut_off_says_so_and_ends_nothing(base, devices, gate, monkeypatch) -> None:
    monkeypatch.setattr(worker, "LONGEST_WAIT_SECONDS", 0.5)
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        owned = devices(a_run(base), url=gate.url, ca=gate.gate.ca)
        owned.device.start()
        status = wait_for_status(owned.device, lambda found: found.problem is not None, "a refused login")
        assert "does not know this device" in status.problem
        join(gate, owned)
        gate.unregister()
        wait_for_status(owned.device, lambda found: not found.is_connected and found.problem is not None, "the end")
        assert owned.device.status().is_running and received == []
        owned.device.close()
    finally:
        signal.signal(signal.SIGINT, before)


HOST = """
import json, os, signal, sys, threading
from fedmini.device import Device
from tests.device import world
values = json.loads(sys.argv[1])
def emit(event, **fields):
    if event == values["die_at"]:
        os.kill(os.getpid(), signal.SIGKILL)
device = Device(values["folder"], values["url"], values["ca"], conditions=world.Turning(), config=values["config"],
                emit=emit, find_keyring=lambda: None)
device.start()
threading.Event().wait()
"""


def test_a_device_killed_between_its_debit_and_its_answer_refuses_the_round_ever_after(
    base, devices, gate, server
) -> None:
    manifest = a_run(base)
    owned = devices(manifest, url=gate.url, ca=gate.gate.ca)
    gate.register(owned.login_key_pem)
    owned.device.close()
    values = {
        "folder": str(owned.folder),
        "url": gate.url,
        "ca": str(gate.gate.ca),
        "config": world.settings(base, consent={"manifests": [manifest.hash]}),
        "die_at": "device.contributed",  # the debit and the receipt are on the disk, and nothing has left
    }
    host = subprocess.Popen([sys.executable, "-c", HOST, json.dumps(values)], cwd=ROOT)
    try:
        gate.wait_for_device()
        assert gate.ask(offered(manifest)).kind == "ready"
        work = Round(
            manifest, lambda envelope: gate.ask(envelope, 2 if envelope.fields["stage"] == "CONTRIBUTE" else 60)
        )
        assert work.run(1).num_devices == 3
        assert work.answers[Stage.CONTRIBUTE] is None
        assert host.wait(20) == -signal.SIGKILL
    finally:
        host.kill()
        host.wait(20)
    owned = devices(manifest, examples=[])  # at another server: the gate waits long for what it thinks is online
    with DeviceLedger.open(owned.folder / "ledger.jsonl") as ledger:
        assert [(one.round_num, one.attempt) for one in ledger.releases()] == [(1, 0)]
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "ready"
    work = Round(manifest, server.ask)
    assert work.run(1).num_devices == 3
    assert work.reason(Stage.ADVERTISE) == ("replayed", "replayed")
    assert work.run(1, attempt=1).num_devices == 4, "a later attempt is another release, and paid for"
    assert owned.device.status().rounds_joined == 2 and len(owned.device.receipts()) == 2


def test_a_login_that_has_to_wait_for_the_one_before_is_tried_every_few_seconds(
    base, devices, server, monkeypatch
) -> None:
    """The SuperLink holds a device that was killed for online until it misses its heartbeats."""
    assert worker.STILL_ONLINE_SECONDS <= 5
    monkeypatch.setattr(worker, "STILL_ONLINE_SECONDS", 0.05)
    refusals = iter([412] * 8)  # with waits that double, a minute's
    server.acts["activate-node"] = lambda body: Answer(status) if (status := next(refusals, None)) else None
    owned = devices(a_run(base))
    owned.device.start()
    owned.heard.wait_for("device.connected")
    assert server.calls.count("activate-node") == 9


def test_a_device_survives_a_gate_that_is_killed(base, devices, gate, monkeypatch) -> None:
    monkeypatch.setattr(worker, "LONGEST_WAIT_SECONDS", 0.5)
    manifest = a_run(base)
    owned = devices(manifest, url=gate.url, ca=gate.gate.ca)
    join(gate, owned)
    assert gate.ask(offered(manifest)).kind == "ready"
    gate.gate.kill()
    wait_for_status(owned.device, lambda found: "can't reach" in str(found.problem), "the loss")
    assert "not connected" in owned.device.status().why_not_training
    gate.gate.start()
    gate.link.begin(gate.link.run)
    gate.wait_for_device()
    assert gate.ask(offered(manifest)).kind == "ready"
    assert Round(manifest, gate.ask).run(1).num_devices == 4
    assert owned.heard.count("device.connected") == 1, "without another login"
    assert owned.device.status().is_connected and owned.device.status().problem is None


def test_a_connection_that_breaks_between_two_stages_costs_no_round(base, devices, gate) -> None:
    wire = Wire(gate.gate.port)
    manifest = a_run(base)
    owned = devices(manifest, url=f"https://127.0.0.1:{wire.port}", ca=gate.gate.ca)
    try:
        join(gate, owned)
        assert gate.ask(offered(manifest)).kind == "ready"
        work = Round(manifest, gate.ask)
        work.before = lambda stage: wire.break_all() if stage in (Stage.SHARE, Stage.AGREE) else None
        assert work.run(1).num_devices == 4
        assert [answer.kind for answer in work.answers.values()] == ["answer"] * 5
    finally:
        owned.device.close()
        wire.close()
