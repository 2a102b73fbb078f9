"""A whole deployment on this machine: an operator, a server's processes behind TLS, and devices in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from fedmini import config as configuration
from fedmini import enrolment, manifest_file, operator_keys, planning, server_folder
from fedmini.config import RunConfig
from fedmini.model import loading
from fedmini.model.lora import LoraModel
from fedmini.secagg import device_keys, trust_text
from fedmini.store import ExampleStore, StoredExample
from tests import tiny_run
from tests.deployment.nursery import Forked, Nursery

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 120.0
TIMING = {
    "advertise_s": 20,
    "share_s": 20,
    "contribute_s": 30,
    "agree_s": 20,
    "unmask_s": 20,
    "poll_s": 0.1,
    "wait_s": 60,
}

PRIVATE = {"target_epsilon": 8.0, "target_delta": 1e-5, "clip_norm": 1.0}  # what a device's limits let pass
PRIVACY = {
    "example-shared": {"example": {**PRIVATE, "noise": "shared"}},
    "example-local": {"example": {**PRIVATE, "noise": "local"}},
    "device-shared": {"device": {**PRIVATE, "noise": "shared"}},
    "device-server": {"device": {**PRIVATE, "noise": "server"}},
}


def a_config(folder: Path, privacy: str = "example-shared", changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Two rounds of all of four people, none of whom may be missing, on the tiny model."""
    everybody = {"num_rounds": 2, "cohort_size": 4, "min_survivors": 4, "spare_attempts": 4}
    sections: dict[str, Any] = {"rounds": everybody, "data": {"held_out_devices": 4}, "privacy": PRIVACY[privacy]}
    for section, change in (changes or {}).items():
        sections[section] = sections.get(section, {}) | change
    return tiny_run.config(folder, changes=sections)


def renamed(config: RunConfig, name: str) -> RunConfig:
    """The same run under another name."""
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


@dataclass
class Logged:
    """A process, and the events that it has logged as JSON lines so far."""

    name: str
    process: subprocess.Popen[str] | Forked
    lines: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @classmethod
    def start(cls, name: str, command: list[str], stream: str) -> "Logged":
        pipes = {stream: subprocess.PIPE}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, text=True, errors="replace", cwd=ROOT, env=environment, **pipes
        )
        return cls.of(name, process, getattr(process, stream))

    @classmethod
    def of(cls, name: str, process: "subprocess.Popen[str] | Forked", stream: TextIO) -> "Logged":
        made = cls(name, process)
        threading.Thread(target=made._read, args=(stream,), daemon=True).start()
        return made

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            with self.changed:
                self.lines.append(line.rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.lines.append("")  # the end
            self.changed.notify_all()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def wait_for(self, event: str, since: int = 0, **fields: Any) -> int:
        """The place after the first such event; fails where the process ends before, or it takes too long."""
        until = time.monotonic() + WAIT_S
        place = since
        while True:
            with self.changed:
                while place >= len(self.lines):
                    left = until - time.monotonic()
                    assert left > 0 and self.changed.wait(left), f"{self.name}: no {event} {fields} came\n{self.tail()}"
                line = self.lines[place]
            place += 1
            assert line or self.process.poll() is None, f"{self.name} ended before {event} {fields}\n{self.tail()}"
            if line.startswith("{"):
                found = json.loads(line)
                if found["event"] == event and all(found.get(key) == value for key, value in fields.items()):
                    return place

    def tail(self) -> str:
        return "\n".join(self.lines[-40:])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait(20)


@dataclass
class Deployment:
    """The folders of one deployment, and the processes that run."""

    folder: Path
    config: RunConfig
    port: int
    people: Mapping[str, list[StoredExample]]
    run: str  # the one that is served, of those that were planned
    nursery: Nursery
    server: Logged | None = None
    devices: dict[str, Logged] = field(default_factory=dict)

    @property
    def server_folder(self) -> Path:
        return self.folder / "server"

    @property
    def run_folder(self) -> Path:
        return self.server_folder / "runs" / self.run

    @property
    def address(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def start_server(self, run: str | None = None) -> Logged:
        self.run = run or self.run
        command = [sys.executable, "-m", "tests.deployment.server_process", str(self.server_folder), self.run]
        self.server = Logged.start("server", command, "stderr")
        return self.server

    def start_device(self, name: str, program: str = "device_process", **settings: Any) -> Logged:
        """By the program of tests/deployment that is to be this device."""
        path = self.folder / f"{name}.json"
        values = {
            "name": name,
            "folder": str(self.folder / name),
            "server": self.address,
            "server_key": str(self.server_folder / "tls" / "ca.crt"),
            "seeded": True,
            **settings,
        }
        path.write_text(json.dumps(values))
        self.devices[name] = Logged.of(name, *self.nursery.start(program, path))
        return self.devices[name]

    def start_devices(self, **settings: Any) -> None:
        """All that do not run already."""
        for name in self.people:
            if name not in self.devices or self.devices[name].process.poll() is not None:
                self.start_device(name, **settings)

    def start_daemon(self, name: str, socket: Path) -> Logged:
        """`fedmini device serve`, the real command, in the place of an app with a device inside."""
        command = [sys.executable, "-m", "fedmini", "device", "serve", str(self.folder / name), "--socket", str(socket)]
        server = ["--server", self.address, "--server-key", str(self.server_folder / "tls" / "ca.crt")]
        self.devices[name] = Logged.start(name, [*command, *server, "--log-format", "json"], "stderr")
        return self.devices[name]

    def pid_of(self, process: str) -> int:
        """The newest process of this name under the server."""
        assert self.server is not None
        found = [
            one["pid"] for one in self.server.events if one["event"] == "process.started" and one["process"] == process
        ]
        return int(found[-1])

    def kill(self, process: str) -> None:
        """As a power cut would: the "server" (the supervisor), its "gate" or its "coordinator"."""
        assert self.server is not None
        if process == "server":
            self.server.kill()
            for name in ("gate", "coordinator"):
                wait_until(lambda name=name: not is_alive(self.pid_of(name)), f"{name} to end with its server")
        else:
            with suppress(ProcessLookupError):
                os.kill(self.pid_of(process), signal.SIGKILL)

    def end_devices(self) -> None:
        for device in self.devices.values():
            if device.process.poll() is None:
                device.process.terminate()  # all at once, then wait for each
        for device in self.devices.values():
            device.end()

    def end(self) -> None:
        self.end_devices()
        if self.server is not None:
            self.server.end()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def people_of(config: RunConfig, rows: list[dict[str, str]]) -> dict[str, list[StoredExample]]:
    """The people who would be devices in a simulation of the same configuration."""
    from fedmini import data

    population = data.load_population(config.data, rows)
    return {
        name: [StoredExample(one.response, one.prompt) for one in found] for name, found in population.devices.items()
    }


@contextmanager
def deployment(
    folder: Path,
    config: RunConfig,
    rows: list[dict[str, str]] | None = None,
    num_runs: int = 1,
    timing: Mapping[str, float] = TIMING,
    others: Sequence[RunConfig] = (),
) -> Iterator[Deployment]:
    """All folders made, every device enrolled, its examples stored and the runs agreed to; nothing is started.

    With several runs, alike but for their names, and `others`, on the same base, the devices' processes can serve one
    after the other.
    """
    rows = tiny_run.rows() if rows is None else rows
    alike = [renamed(config, f"{config.run.name}-{number}") for number in range(2, num_runs + 1)]
    with Nursery(ROOT) as nursery:
        made = Deployment(folder, config, free_port(), people_of(config, rows), config.run.name, nursery)
        lay_out(made, [config, *alike, *others], timing)
        try:
            yield made
        finally:
            made.end()


def lay_out(made: Deployment, configs: Sequence[RunConfig], timing: Mapping[str, float]) -> None:
    """Make the folders of an operator, of the server with these runs, and of every device."""
    folder = made.folder
    operator_keys.create(folder / "operator", None)
    operator_key = operator_keys.read_public_key(folder / "operator" / "operator.pub")
    served = configuration.parse_server_config(
        {
            "server": {"host": "127.0.0.1", "listen": "127.0.0.1", "port": made.port, "log_format": "json"},
            "timing": dict(timing),
        }
    )
    manifests = {one.run.name: planned(one, folder) for one in configs}
    runs = {
        one.run.name: {"manifest.json": manifest_file.canonical(manifests[one.run.name]), "config.toml": dump(one)}
        for one in configs
    }
    server = server_folder.create(made.server_folder, served, datetime.now(UTC), operator_key, runs)
    with operator_keys.opened(folder / "operator", lambda: b"") as operator:
        signed = {name: operator.sign_manifest(one) for name, one in manifests.items()}
        for name, one in signed.items():
            place = made.server_folder / "runs" / name / "manifest.signed.json"
            place.write_bytes(trust_text.write_signed_manifest(one))
        for name, examples in made.people.items():
            operator_keys.create_device(folder / name)
            keys = device_keys.read((folder / name / "device.pub").read_bytes())
            certificate = operator.certify(keys.device_key, name)
            server.enroll(keys, certificate)
            enrolment.enrol(folder / name, certificate, operator_key)
            write_device_toml(folder / name, made.config)
            with enrolment.opened(folder / name) as own:
                for one in signed.values():
                    own.accept(one)
            limits = configuration.StoreSection()
            with ExampleStore.open(folder / name / "examples", limits, find_keyring=lambda: None) as store:
                store.add_many(examples)


def planned(config: RunConfig, folder: Path):
    """The run's manifest, as `fedmini server init --run` plans it."""
    model = LoraModel(loading.load_base(config.base, cache_dir(folder), lambda note: None), planning.lora_shape(config))
    base = planning.Base(model.fingerprint, model.template)
    return planning.make_manifest(config, f"{config.run.name}-1", base, cache_dir(folder))


def cache_dir(folder: Path) -> Path:
    return folder / "cache"


def dump(config: RunConfig) -> bytes:
    """The run's settings as the server keeps them: no seed, which no deployment may have."""
    served = config.model_copy(update={"run": config.run.model_copy(update={"seed": None})})
    return configuration.dump_run_config(served).encode()


def write_device_toml(folder: Path, config: RunConfig, physical_batch_size: int = 16) -> None:
    """Whatever the machine is doing that these tests run on, the device may train."""
    (folder / "device.toml").write_text(
        f"""[device]
lifetime_epsilon = 1000.0
lifetime_delta = 1e-3
[base]
path = {json.dumps(str(config.base.path))}
compute_dtype = "float32"
[training]
physical_batch_size = {physical_batch_size}
max_memory_bytes = {2**33}
[conditions]
on_power = false
idle = false
unmetered = false
max_temperature_c = 1000.0
min_free_memory_bytes = 0
max_minutes_per_day = 1000
"""
    )
