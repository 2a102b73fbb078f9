"""What a device's process takes, from its start to its first contribution: python simulations/benchmarks/device_memory.py

One real `fedmini.Device` in a process of its own, behind a real gate with TLS, on the packaged 4-bit base; three peers that
answer at once make the round whole. The second start is measured: weights, kernels and calibration are cached by the first.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, slots=True)
class Moment:
    """A device's process at one point of its life. Seconds count from its start; megabytes are of 2**20 bytes."""

    event: str
    wall_s: float
    cpu_s: float
    resident_mb: float
    peak_mb: float


def main(
    lora: Annotated[str, typer.Option(help="What is adapted: a key of LORA in device_federation.py.")] = "all",
    batch: int = 1,
    tokens: int = 128,
    rounds: int = 2,
    training: Annotated[str, typer.Option(help="Settings of device.toml's [training], as JSON.")] = "{}",
    save: Annotated[Path | None, typer.Option(help="Where to write the numbers as JSON.")] = None,
) -> None:
    """Measure one shape: a step of BATCH examples of TOKENS tokens a round."""
    from device_federation import Shape

    shape = Shape(lora, batch, tokens, rounds)
    with tempfile.TemporaryDirectory(prefix="fedmini-bench-") as folder:
        moments = measure(Path(folder), shape, json.loads(training))
    print(f"| lora {lora}, {batch} x {tokens} tokens | wall s | CPU s | resident MB | peak MB |\n|---|---|---|---|---|")
    for one in moments:
        print(f"| {one.event} | {one.wall_s:.1f} | {one.cpu_s:.1f} | {one.resident_mb:.0f} | {one.peak_mb:.0f} |")
    if save is not None:
        found = {"shape": asdict(shape), "training": json.loads(training), "moments": [asdict(one) for one in moments]}
        save.write_text(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, shape: Any, training: Mapping[str, Any]) -> list[Moment]:
    """What the second of two processes of one device went through; nothing is left running."""
    from device_federation import plan

    from fedmini.model import runtime

    runtime.limit_threads(1)
    manifest = plan(shape)
    with server(folder, manifest, shape, training) as ask:
        ask("--warm", 1)
        return ask("--measured", shape.rounds)


@contextlib.contextmanager
def server(folder: Path, manifest: Any, shape: Any, training: Mapping[str, Any]) -> Iterator[Any]:
    """A gate, an operator and an enrolled device that agreed to the run. Gives what starts it and runs its rounds."""
    from deployment_network import _gate
    from device_federation import Federation, device_config, lay_out

    from fedmini.flower import loopback_token, registry
    from fedmini.flower.server_link import ServerLink
    from fedmini.secagg import device_keys, signing_keys

    operator = signing_keys.draw()
    login = lay_out(folder / "device", operator, manifest, shape)
    with contextlib.ExitStack() as stack:
        config, _ = stack.enter_context(_gate(folder))
        node = registry.register_node(config.local_port, config.token, device_keys.login_bytes(login))
        link = ServerLink(config.local_port, loopback_token.headers(config.token), 2**27)
        stack.enter_context(contextlib.closing(link))
        settings = {
            "folder": str(folder / "device"),
            "server": f"https://127.0.0.1:{config.port}",
            "server_key": str(folder / "server" / "tls" / "ca.crt"),
            "config": device_config(manifest, training),
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        numbers = iter(range(1, 1000))

        def run(_: str, rounds: int) -> list[Moment]:
            link.begin()
            with device_process(folder / "settings.json") as moments:
                federation = Federation(link, node, operator, manifest)
                for _ in range(rounds):
                    federation.run(next(numbers))
                    moments.wait_for("device.contributed")
            return moments.found

        yield run


STAGE_S = 240.0


class Moments:
    """What a device's process has said so far."""

    def __init__(self, stream: Any) -> None:
        self.found: list[Moment] = []
        self._num_seen = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            with self._changed:
                self.found.append(Moment(**json.loads(line)))
                self._changed.notify_all()

    def wait_for(self, event: str) -> None:
        """Until it is said once more."""

        def is_said() -> bool:
            return any(one.event == event for one in self.found[self._num_seen :])

        with self._changed:
            if not self._changed.wait_for(is_said, STAGE_S):
                raise RuntimeError(f"no {event} came, but {self.found}")
            self._num_seen = len(self.found)


@contextlib.contextmanager
def device_process(settings: Path) -> Iterator[Moments]:
    """A device as an app would embed it; ended afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--device", str(settings)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Moments(process.stdout)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # its device logs out
            process.wait(60)


def be_device(settings: Mapping[str, Any]) -> None:
    """The app: it opens its device, starts it, and says how its process stands at each event."""
    say("process began")
    from fedmini import Device

    say("imported")
    device = Device(
        settings["folder"], settings["server"], settings["server_key"], config=settings["config"], emit=tell
    )
    with device:
        say("opened")
        device.start()
        sys.stdin.read()


def tell(event: str, /, **fields: Any) -> None:
    """An event of the device's, and how its process stands."""
    if event == "device.problem":
        print(event, fields, file=sys.stderr)
    say(event if event != "device.answering" else f"asked: {fields['stage']}")


def say(event: str) -> None:
    """How this process stands now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, peak = (int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    ticks = int(Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    began = ticks / os.sysconf("SC_CLK_TCK")
    print(json.dumps(asdict(Moment(event, uptime - began, time.process_time(), resident, peak))), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--device"]:
        be_device(json.loads(Path(sys.argv[2]).read_text()))
    else:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(main)
        app()
