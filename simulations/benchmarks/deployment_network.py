"""A deployment's network on this machine: a gate's process behind TLS, devices in others, and the server's own link."""

import contextlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from deployment_counter import Counted, cpu_seconds, resident_mb
from deployment_devices import Fleet, serve
from secagg_cohort import make_manifest

from fedmini import config as configuration
from fedmini import server_folder
from fedmini.flower import gate, loopback_token, registry
from fedmini.flower.codec import Envelope
from fedmini.flower.gate import GateConfig
from fedmini.flower.server_link import ServerLink
from fedmini.secagg import signing_keys
from fedmini.secagg.trust import Trust
from fedmini.types import DeviceId, Manifest

NUM_PROCESSES = 2
NUM_COORDINATES = 340  # at 24 bits 1 KB, as what is echoed
MAX_PAYLOAD_BYTES = 2**20
MAX_ROUNDS = 1000
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Used:
    """What the network has taken so far: requests by anybody, and the gate's CPU and memory."""

    num_requests: int
    gate_s: float
    gate_mb: float


@dataclass
class Network:
    """Devices that are connected. `nodes` and `device_keys` are what a server's roll knows of them."""

    link: ServerLink
    manifest: Manifest
    trust: Trust
    nodes: dict[DeviceId, int]
    device_keys: dict[DeviceId, bytes]
    pid: int  # the gate's
    counted: Counted
    pipes: Sequence[Connection]

    def echo(self, payload: bytes) -> float:
        """Seconds of one stage: every device is sent a payload, and sends it back."""
        began = time.monotonic()
        names = list(self.link.send_all(((node, Envelope("echo", {}, payload)) for node in self.nodes.values()), 60.0))
        found = list(self.link.receive([name for name in names if name is not None], began + 60.0))
        took = time.monotonic() - began
        came = [one for one in found if one.envelope is not None and one.envelope.payload == payload]
        if len(came) != len(self.nodes):
            raise RuntimeError(f"{len(came)} of {len(self.nodes)} devices answered")
        return took

    def used(self) -> Used:
        """What was taken up to now."""
        for pipe in self.pipes:
            pipe.send("count")
        others = sum(pipe.recv() for pipe in self.pipes)
        return Used(self.counted.num_requests + others, cpu_seconds(self.pid), resident_mb(self.pid))


@contextlib.contextmanager
def network(num_devices: int) -> Iterator[Network]:
    """A network with so many devices, all of them connected and waiting; everything is ended afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmini-bench-")))
        operator = signing_keys.draw()
        config, pid = stack.enter_context(_gate(folder))
        manifest = replace(make_manifest(num_devices, NUM_COORDINATES, 24), num_rounds=MAX_ROUNDS)
        names = tuple(f"device-{index:03d}" for index in range(num_devices))
        authority = (folder / "server" / "tls" / "ca.crt").read_bytes()
        url = f"https://127.0.0.1:{config.port}"
        nodes, device_keys, pipes = dict[DeviceId, int](), dict[DeviceId, bytes](), []
        for share in (names[start::NUM_PROCESSES] for start in range(NUM_PROCESSES)):
            own = Fleet(url, authority, signing_keys.write_private(operator, None), manifest, share)
            pipes.append(stack.enter_context(_devices(own)))
            for name, device_key, login_key in pipes[-1].recv():
                nodes[name] = registry.register_node(config.local_port, config.token, login_key)
                device_keys[name] = device_key
        counted = stack.enter_context(Counted())
        headers = loopback_token.headers(config.token)
        link = stack.enter_context(contextlib.closing(ServerLink(config.local_port, headers, MAX_PAYLOAD_BYTES)))
        link.begin()
        for pipe in pipes:
            pipe.send("serve")
            pipe.recv()
        until = time.monotonic() + START_S
        while len(link.nodes()) < num_devices and time.monotonic() < until:
            time.sleep(0.1)
        trust = Trust(signing_keys.public_bytes(operator))
        yield Network(link, manifest, trust, dict(sorted(nodes.items())), device_keys, pid, counted, pipes)


@contextlib.contextmanager
def _devices(fleet: Fleet) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    ours.send(fleet)
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        process.kill()


@contextlib.contextmanager
def _gate(folder: Path) -> Iterator[tuple[GateConfig, int]]:
    """A gate on free ports of 127.0.0.1, and its process."""
    served = configuration.parse_server_config({"server": {"host": "127.0.0.1", "listen": "127.0.0.1"}})
    server = server_folder.create(folder / "server", served, datetime.now(UTC))
    tls = server.tls
    config = GateConfig("127.0.0.1", 0, 0, folder / "superlink.db", tls.certificate, tls.private_key, server.token)
    path = folder / "gate.json"
    path.touch(0o600)
    path.write_text(gate.config_json(config))
    command = [sys.executable, "-m", "fedmini.flower.gate", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            yield replace(config, port=ready["port"], local_port=ready["local_port"]), process.pid
        finally:
            process.terminate()
