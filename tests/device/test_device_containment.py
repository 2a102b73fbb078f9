"""Whatever a server, an app's code or a library does: the device goes on, and the process that it is in is left alone."""

import contextlib
import itertools
import os
import pickle
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.proto import fleet_pb2, message_pb2

from fedmini.device import worker
from fedmini.flower import codec, fleet
from fedmini.flower.codec import Envelope
from fedmini.secagg import device_keys
from tests.device import certificates, world
from tests.device.gate_server import gate_server
from tests.device.hostile_server import Answer, HostileServer
from tests.device.world import Round, a_run, offered, wait_for_status


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that was refused waits from half a second to a minute."""
    monkeypatch.setattr(worker, "LONGEST_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(worker, "REST_SECONDS", 0.5)


class Signalled:
    """Signals that this process has received."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[object] = []
        monkeypatch.setattr(os, "_exit", lambda code: self.found.append(("_exit", code)))
        monkeypatch.setattr(os, "kill", lambda pid, number: self.found.append(("kill", number)))
        monkeypatch.setattr(signal, "raise_signal", lambda number: self.found.append(("raise_signal", number)))


def is_ready_again(server: HostileServer, manifest) -> None:
    server.acts.clear()
    server.run += 1
    assert server.offer(offered(manifest)).kind == "ready"


def still_serves(server: HostileServer, owned, manifest) -> None:
    """It takes part in a round, as if nothing had been."""
    is_ready_again(server, manifest)
    work = Round(manifest, server.ask)
    work.run(1)
    assert [answer.kind for answer in work.answers.values()] == ["answer"] * 5


def cut_in_the_middle(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf of")


def hang_up(handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def headers_without_end(handler) -> None:
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000)


GARBAGE = [
    ("401", {"pull-messages": lambda body: Answer(401)}),
    ("401 at login", {"activate-node": lambda body: Answer(401)}),
    ("500", {"*": lambda body: Answer(500, b"<html>oops")}),
    ("302", {"pull-messages": lambda body: Answer(302)}),
    ("no protobuf", {"pull-messages": lambda body: Answer(200, b"\xff" * 99)}),
    ("no protobuf at login", {"activate-node": lambda body: Answer(200, b"\xff" * 99)}),
    ("half an answer", {"pull-messages": lambda body: Answer(then=cut_in_the_middle)}),
    ("hung up", {"*": lambda body: Answer(then=hang_up)}),
    ("endless headers", {"pull-messages": lambda body: Answer(then=headers_without_end)}),
    (
        "a head without a tree",
        {
            "pull-messages": lambda body: Answer(
                200, fleet_pb2.PullMessagesResponse(messages_list=[message_pb2.Message()]).SerializeToString()
            )
        },
    ),
]


@pytest.mark.parametrize(("kind", "acts"), GARBAGE, ids=[kind for kind, _ in GARBAGE])
def test_a_server_that_answers_garbage_is_left_and_tried_again(base, server, devices, monkeypatch, kind, acts) -> None:
    signalled, manifest = Signalled(monkeypatch), a_run(base)
    owned = devices(manifest)
    server.acts.update(acts)
    owned.device.start()
    status = wait_for_status(owned.device, lambda found: found.problem is not None, "a problem")
    assert status.is_running and "not connected" in str(status.why_not_training)
    assert "Traceback" not in status.problem and "\n" not in status.problem
    if kind.startswith("401"):
        assert "does not know this device" in status.problem
    is_ready_again(server, manifest)
    assert owned.device.status().problem is None
    assert signalled.found == []


def test_an_answer_of_two_gigabytes_is_refused_at_the_cap(base, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "ready"  # what it needs in memory is there
    sent = [0]

    def flood(handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2147483648\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(2048):
                handler.wfile.write(bytes(2**20))
                sent[0] += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    server.acts["pull-messages"] = lambda body: Answer(then=flood)
    server.send(Envelope("greeting"))  # the poll that waits now is answered; the next is flooded
    wait_for_status(owned.device, lambda status: "more than 8388608 bytes" in str(status.problem), "the refusal")
    assert sent[0] < 100, "it stopped reading"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10
    still_serves(server, owned, manifest)


def test_a_message_larger_than_any_run_needs_is_refused_before_it_is_in_memory(base, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    server.send(Envelope("offer", {}, os.urandom(12 * 2**20)))
    status = wait_for_status(owned.device, lambda found: found.problem is not None, "a problem")
    assert "larger than expected" in status.problem or "more than" in status.problem
    assert server.calls.count("pull-object") <= 4, "of the seven that it would take"
    still_serves(server, owned, manifest)


class Planted:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


def test_nothing_that_a_server_sends_is_executed(base, server, devices, tmp_path) -> None:
    manifest, planted = a_run(base), tmp_path / "planted"
    owned = devices(manifest)
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "ready"
    pickled = pickle.dumps(Planted(planted))
    python = f"open({str(planted)!r}, 'w').write('executed')".encode()
    for payload, kind in itertools.product((pickled, python, b""), ("offer", "request", "adapter")):
        answer = server.ask(Envelope(kind, {"manifest": manifest.hash, "round": 1, "stage": "ADVERTISE"}, payload))
        assert answer.kind == "refusal" and answer.fields["code"] == "protocol"
    for kind in ("execute", "", "__reduce__", "answer"):
        answer = server.ask(Envelope(kind, {"manifest": manifest.hash, "code": python.decode()}, pickled))
        assert (answer.kind, answer.fields["code"]) == ("refusal", "unknown")
    assert not planted.exists()
    still_serves(server, owned, manifest)


def test_messages_that_are_none_of_ours_are_passed_over(base, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    for content in (
        RecordDict(),
        RecordDict({"config": ConfigRecord({"code": b"import os"})}),
        RecordDict({"metrics": MetricRecord({"loss": 0.5})}),
        RecordDict({codec.HEAD: ConfigRecord({"head": "[" * 60_000, "bytes": b""})}),
        RecordDict({codec.HEAD: ConfigRecord({"head": '{"version": 1}', "bytes": b""})}),
    ):
        server.send_message(content)
    answer = server.ask(Envelope("request", {"stage": "\x1b[2J" * 20}))
    assert answer.kind == "refusal"
    assert "expected a message of fedmini's" in owned.device.status().problem or owned.device.status().problem is None
    still_serves(server, owned, manifest)


def test_a_failure_in_a_library_that_is_no_exception_costs_one_answer(base, server, devices, monkeypatch) -> None:
    """Some of Flower's are BaseExceptions: they pass every `except Exception`."""
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "ready"
    failures = iter([SystemExit(3), KeyboardInterrupt(), GeneratorExit(), MemoryError()])

    class Failing:
        """A library's function that fails as it should not."""

        def __init__(self, found: object) -> None:
            self._found = found

        def __call__(self, *arguments: object) -> object:
            failure = next(failures, None)
            if failure is not None:
                raise failure
            return self._found(*arguments)

    run = owned.device._membership._ready[manifest.hash]
    member = run._members[False]
    monkeypatch.setattr(member, "answer", Failing(member.answer))
    for name in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "MemoryError"):
        answer = server.ask(Envelope("request", {"manifest": manifest.hash, "stage": "ADVERTISE"}))
        assert answer.fields["reason"] == name and answer.fields["code"] == "failure"
        assert owned.device.status().problem == f"a failure inside: {name}"
    still_serves(server, owned, manifest)


@pytest.mark.parametrize("failure", [RuntimeError("secret"), SystemExit(1), KeyboardInterrupt()])
def test_an_apps_conditions_that_fail_hold_training_back_and_end_nothing(base, server, devices, failure) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "ready"
    owned.conditions.failure = failure
    status = wait_for_status(
        owned.device, lambda found: not found.is_connected and "failed" in str(found.why_not_training), "the end"
    )
    assert type(failure).__name__ in status.why_not_training and "secret" not in status.why_not_training
    owned.conditions.failure = None
    still_serves(server, owned, manifest)


def test_an_apps_log_that_fails_ends_nothing(base, server, devices) -> None:
    manifest = a_run(base)

    def fail(event: str, **fields: object) -> None:
        raise SystemExit(event)

    owned = devices(manifest, heard=world.Heard(also=fail))
    owned.device.start()
    still_serves(server, owned, manifest)


# Whom it trusts, and when.


@pytest.mark.parametrize(("days", "reason"), [(1.0, "certificate"), (-1.0, "certificate has expired")])
def test_a_wrong_or_expired_certificate_is_said_clearly_and_nothing_is_sent(
    base, devices, tmp_path, days, reason
) -> None:
    """The first is by another authority than the device's, the second by its own."""
    ca, files = certificates.authority(tmp_path / "other", days)
    other = HostileServer(tmp_path, files)
    try:
        owned = devices(a_run(base), url=other.url, ca=ca if days < 0 else None)
        owned.device.start()
        status = wait_for_status(owned.device, lambda found: found.problem is not None, "a problem")
        assert "its certificate is not to be trusted here" in status.problem and reason in status.problem
        assert other.calls == [] and not status.is_connected
    finally:
        owned.device.close()
        other.close()


def test_a_certificate_for_another_name_is_refused(base, server, devices) -> None:
    owned = devices(a_run(base), url=server.url.replace("127.0.0.1", "localhost"))
    owned.device.start()
    status = wait_for_status(owned.device, lambda found: found.problem is not None, "a problem")
    assert "not valid for 'localhost'" in status.problem and server.calls == []


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_off_by_a_day_is_corrected_by_the_servers_for_the_login(base, server, devices, days) -> None:
    server.clock_offset_s = days * 86400.0

    def only_now(body: bytes) -> Answer | None:
        shown = datetime.fromisoformat(server.timestamps[-1]).astimezone(UTC).timestamp()
        return None if abs(shown - time.time() - server.clock_offset_s) < 60 else Answer(401)

    server.acts["*"] = only_now
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "ready"
    assert server.calls.count("activate-node") == 2, "refused once, and told the time"
    assert owned.device.status().problem is None


def test_a_date_is_from_some_time_in_its_call_and_moves_a_clock_that_fits_no_time_of_it(monkeypatch) -> None:
    """A SuperLink's is from when the call came, others' from when the answer left: a poll's may be half a minute old."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(fleet, "time", SimpleNamespace(time=lambda: now[0]))
    connection = fleet.FleetConnection("https://127.0.0.1:1", None, device_keys.draw_login(), 2**20)

    def shown_after(date: float, passed_s: float) -> float:
        """The device's idea of the server's clock, less its own, after a call that took so long."""
        connection._signed()
        now[0] += passed_s
        connection._note_date(formatdate(date, usegmt=True))
        return connection._server_time() - now[0]

    assert shown_after(now[0], 30) == 0.0, "it is right, and the date half a minute old"
    assert shown_after(now[0] - 20, 0) == -20.0, "it is 20 s ahead"
    assert shown_after(now[0] - 20, 30) == shown_after(now[0] + 10, 30) == -20.0, "it is, by either date of a poll"
    assert shown_after(now[0], 0) == 0.0, "its owner has set it right"
    for nonsense in ("", "yesterday", "Mon, 99 Foo 2026 00:00:00 GMT"):
        connection._note_date(nonsense)
    assert connection._server_time() == now[0]
    connection.close()


# Its end.


def drip(handler) -> None:
    """An answer that never ends and never stops."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"x")
            handler.wfile.flush()
            if handler.server.outer_is_ending.wait(0.1):
                return


@pytest.mark.parametrize("call", ["pull-messages", "push-messages", "deactivate-node", "activate-node"])
def test_it_ends_within_seconds_whatever_the_server_holds(base, server, devices, call) -> None:
    server._server.outer_is_ending = server.is_ending
    server.acts[call] = lambda body: Answer(then=drip)
    owned = devices(a_run(base))
    owned.device.start()
    server.send(offered(a_run(base)))
    world.wait_until(lambda: call in server.calls or call == "deactivate-node", "the call")
    began = time.monotonic()
    owned.device.close()
    assert time.monotonic() - began < 5, "about a second, on a machine that is not busy"
    world.wait_until(
        lambda: not any(one.name.startswith("fedmini") for one in threading.enumerate()), "its threads' end"
    )


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port at which a connection never begins, and is never refused: its queue is full."""
    with contextlib.ExitStack() as held:
        listening = held.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            filling = held.enter_context(socket.socket())
            filling.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filling.connect(listening.getsockname())
        yield listening.getsockname()[1]


def assert_prompt(call: Callable[[], None], otherwise: str) -> None:
    """About a second, on a machine that is not busy; it waits for six at most, whatever happens."""
    began = time.monotonic()
    call()
    assert time.monotonic() - began < 4, otherwise


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_it_stops_at_once_while_it_connects_to_a_server_that_never_answers(base, devices, scheme) -> None:
    with black_hole() as port:
        device = devices(a_run(base), url=f"{scheme}://127.0.0.1:{port}").device
        for call in (device.stop, device.forget, device.close):
            device.start()
            wait_for_status(device, lambda found: "is connecting" in str(found.why_not_training), "the connection")
            assert_prompt(call, "a connection is waited for ten seconds")


def test_it_stops_at_once_while_the_servers_name_is_looked_up(base, devices, monkeypatch) -> None:
    is_asked, may_answer = threading.Event(), threading.Event()

    def look_up(*arguments: object) -> list[object]:
        is_asked.set()
        may_answer.wait(world.WAIT_S)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    device = devices(a_run(base), url="https://fedmini.invalid:1").device
    device.start()
    assert is_asked.wait(world.WAIT_S)
    try:
        assert_prompt(device.stop, "nobody can end that")
    finally:
        may_answer.set()


def test_a_poll_without_tls_on_this_machine_is_ended_at_once_too(base, devices, tmp_path) -> None:
    with gate_server(tmp_path, certificate=None, private_key=None) as gate:
        owned = devices(a_run(base), url=f"http://127.0.0.1:{gate.gate.port}")
        device = owned.device
        gate.register(owned.login_key_pem)
        device.start()
        for call in (device.forget, device.stop):
            gate.wait_for_device()
            wait_for_status(device, lambda found: found.is_connected, "the poll")
            assert_prompt(call, "the poll is held for longer")
        assert gate.node not in gate.link.nodes(), "and it has logged out"


def test_a_socket_that_is_ended_is_not_closed_under_who_reads_it(base, server, devices) -> None:
    """Its number could become another file of the host's, which the device would read from."""
    owned = devices(a_run(base))
    owned.device.start()
    owned.heard.wait_for("device.connected")
    world.wait_until(lambda: server.calls[-1] == "pull-messages", "a poll")
    sockets = owned.device._worker._sockets
    numbers = [one.fileno() for one in sockets._sockets]
    sockets.shut()
    assert numbers and all(number >= 0 for number in numbers)
    world.wait_until(lambda: server.calls.count("pull-messages") > 1, "another poll")
    assert owned.heard.count("device.connected") == 1, "over the same login"


def test_a_host_that_ends_without_closing_exits_as_it_would(base, server, devices, tmp_path) -> None:
    """A device in the middle of a poll holds up no interpreter, and changes no exit code."""
    import subprocess
    import sys

    script = f"""
import sys
from fedmini.device import Device
from tests.device import world
device = Device({str(tmp_path / "host")!r}, {server.url!r}, {str(devices.ca)!r}, conditions=world.Turning(),
                config={world.settings(base)!r}, find_keyring=lambda: None)
world.enrol(device, None)
device.start()
world.wait_until(lambda: device.status().is_connected, "the connection")
sys.exit(5)
"""
    root = Path(__file__).parent.parent.parent
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 5, ended.stderr
