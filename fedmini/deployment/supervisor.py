"""One command, everything that a deployment needs on one machine: the gate and the coordinator, kept alive, logged.

Whatever dies is started again and goes on from what is on the disk; a process that says that somebody has to do
something first ends all of it. Killed itself, its processes end with it, and the same command goes on.
"""

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from fedmini import events, files, server_folder
from fedmini.deployment import run_files
from fedmini.ending import Ending
from fedmini.errors import StateError
from fedmini.events import Emit, Format
from fedmini.flower import gate
from fedmini.flower.gate import GateConfig
from fedmini.server_folder import ServerFolder

LOCK, STATE = "server.lock", "state"
READY_SECONDS = 60.0
FIRST_REST_SECONDS, LONGEST_REST_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0  # a process that lived so long is not in a circle of failures
STOP_SECONDS = 15.0
LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Commands:
    """How the two processes are started. Tests put another coordinator in the place of the real one."""

    gate: Sequence[str] = (sys.executable, "-m", "fedmini.flower.gate")
    coordinator: Sequence[str] = (sys.executable, "-m", "fedmini.deployment.coordinator")


@dataclass(slots=True)
class _Child:
    """A process that is kept alive."""

    name: str
    command: list[str]
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    rest_s: float = FIRST_REST_SECONDS
    readers: list[threading.Thread] = field(default_factory=list)


class Supervisor:
    """The processes of one server. `run` blocks until the run is over, or somebody asks it to stop."""

    def __init__(
        self, folder: ServerFolder, stream: TextIO, log_format: Format, commands: Commands | None = None
    ) -> None:
        self._folder, self._stream, self._format = folder, stream, log_format
        self._commands = commands or Commands()
        self._emit: Emit = events.to_stream(stream, log_format, "server")
        self._printing = threading.Lock()
        self._stopping = Ending()

    def stop(self) -> None:
        """Ask it to stop."""
        self._stopping.ask()

    def stop_on_signals(self) -> None:
        """SIGTERM and Ctrl-C ask it to stop, from now on; a second one ends this process, and with it the others."""
        self._stopping.listen(signal.SIGTERM, signal.SIGINT)

    def run(self, run_name: str, *, insecure: bool = False) -> int:
        """Serve a run to its end: 0 where it came, or where it was asked to stop; 2 where somebody has to act first.

        Raises ConfigError or StateError, before anything is started, where it can't begin.
        """
        path = self._folder.path
        run_files.open_run(self._folder.run_folder(run_name), self._folder.trust)  # what is wrong is said at once
        with _locked(path / STATE / LOCK):
            fingerprint = self._folder.fingerprint()  # before the gate reads its certificate
            started = self._start_gate(self._gate_config(insecure))
            if started is None:
                self._emit("server.stopped")
                return 0
            gate_child, local_port = started
            arguments = str(path), run_name, str(local_port), str(os.getpid())
            coordinator = _Child("coordinator", [*self._commands.coordinator, *arguments])
            self._start(coordinator)
            try:
                return self._watch(gate_child, coordinator, fingerprint)
            finally:
                self._end([coordinator, gate_child])
                self._emit("server.stopped")

    def _gate_config(self, insecure: bool) -> GateConfig:
        server, limits = self._folder.config.server, self._folder.config.limits
        tls = self._folder.tls
        ends = None if insecure else self._folder.check_certificate(datetime.now(UTC))
        config = GateConfig(
            host=server.listen,
            port=server.port,
            local_port=0,
            database=self._folder.path / STATE / "superlink.db",
            certificate=None if insecure else tls.certificate,
            private_key=None if insecure else tls.private_key,
            token=self._folder.token,
            max_body_bytes=limits.max_body_bytes,
            max_connections=limits.max_connections,
        )
        if ends is None:
            self._emit("server.insecure", warning="no TLS: on this machine only")
        else:
            self._emit("server.certificate", valid_until=ends.isoformat(timespec="minutes"))
        return config

    def _start_gate(self, config: GateConfig) -> tuple[_Child, int] | None:
        """Start the gate, and know its port on loopback, the same when it is started again; None where we are to stop."""
        path = self._folder.path / STATE / "gate.json"
        child = _Child("gate", [*self._commands.gate, str(path), str(os.getpid())])
        files.replace_synced(path, gate.config_json(config).encode(), 0o600)
        said: queue.Queue[str] = queue.Queue()
        self._start(child, said.put)
        try:
            ports = json.loads(self._first_line(child, said))
        except ValueError as error:
            self._end([child])
            if self._stopping.is_asked():
                return None
            raise StateError("the gate did not start: its log above says why; mend that, then start again") from error
        config = replace(config, port=ports["port"], local_port=ports["local_port"])
        files.replace_synced(path, gate.config_json(config).encode(), 0o600)
        self._emit("server.listens", host=config.host, port=config.port, tls=config.certificate is not None)
        return child, config.local_port

    def _first_line(self, child: _Child, said: queue.Queue[str]) -> str:
        """What a process says first; empty where it ends before, takes too long, or we are to stop."""
        until = time.monotonic() + READY_SECONDS
        while not self._stopping.is_asked() and time.monotonic() < until:
            has_ended = child.process is None or child.process.poll() is not None  # before we look at what it said
            try:
                return said.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if has_ended:
                    break
        return ""

    def _watch(self, gate_child: _Child, coordinator: _Child, fingerprint: str) -> int:
        while not self._stopping.wait(LOOK_SECONDS):
            for child in (gate_child, coordinator):
                status = child.process.poll() if child.process is not None else 0
                if status is None:
                    continue
                if status == 2:
                    self._emit("server.gives_up", process=child.name)
                    return 2
                if child is coordinator and status == 0:
                    return 0
                self._emit("process.died", process=child.name, status=status)
                self._rest(child)
                self._start(child)
            if (now := self._folder.fingerprint()) != fingerprint:  # perhaps the certificate was renewed
                fingerprint = now
                if gate_child.process is not None:
                    gate_child.process.send_signal(signal.SIGHUP)
        return 0

    def _rest(self, child: _Child) -> None:
        lived = time.monotonic() - child.started
        child.rest_s = FIRST_REST_SECONDS if lived > STEADY_SECONDS else min(2 * child.rest_s, LONGEST_REST_SECONDS)
        self._stopping.wait(child.rest_s if lived < STEADY_SECONDS else 0.0)

    def _start(self, child: _Child, on_line: Callable[[str], None] = lambda line: None) -> None:
        child.started = time.monotonic()
        # The gate inherits this: what tells it to read its certificate anew waits until it can, and doesn't end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            child.process = subprocess.Popen(
                child.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C in the terminal comes to us, and we end them in their order
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert child.process.stdout is not None and child.process.stderr is not None
        child.readers = [
            threading.Thread(target=_read, args=(child.process.stdout, on_line), daemon=True),
            threading.Thread(
                target=_read, args=(child.process.stderr, lambda line: self._relay(line, child.name)), daemon=True
            ),
        ]
        for reader in child.readers:
            reader.start()
        self._emit("process.started", process=child.name, pid=child.process.pid)

    def _relay(self, line: str, source: str) -> None:
        with self._printing:
            try:
                self._stream.write(events.relayed(line, self._format, source) + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                pass

    def _end(self, children: Sequence[_Child]) -> None:
        for child in children:
            if child.process is None:
                continue
            child.process.terminate()
            try:
                child.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            for reader in child.readers:
                reader.join(2.0)


def _read(stream: TextIO, on_line: Callable[[str], None]) -> None:
    for line in stream:
        on_line(line.rstrip("\n"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One server a folder. The kernel lets go of it however the process ends."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(f"another server runs in {path.parent.parent}: stop it first") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def running_pid(folder: Path) -> int | None:
    """The process of the server that runs in a folder; None where none does."""
    path = folder / STATE / LOCK
    try:
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
    except (OSError, ValueError):
        pass
    return None


def stop(folder: Path, timeout_s: float = 60.0) -> bool:
    """Stop the server of a folder, and wait until it has; False where none ran. Raises StateError where it goes on."""
    pid = running_pid(folder)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + timeout_s
    while running_pid(folder) is not None:
        if time.monotonic() > until:
            raise StateError(f"the server (process {pid}) does not stop: kill it, nothing that was committed is lost")
        time.sleep(0.1)
    return True


def start(
    path: Path, run_name: str, log_format: Format | None, *, insecure: bool, commands: Commands | None = None
) -> int:
    """`fedmini server start`: serve a run in the foreground; the exit code."""
    folder = server_folder.opened(path)
    supervisor = Supervisor(folder, sys.stderr, log_format or folder.config.server.log_format, commands)
    supervisor.stop_on_signals()
    return supervisor.run(run_name, insecure=insecure)
