"""Flower as anybody has it: its own commands, with a home of their own, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
WAIT_S = 150.0


@dataclass
class StockFlower:
    """Processes of Flower's, each with its log in the folder."""

    folder: Path
    port: int
    processes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        return {**os.environ, **own}

    def start(self, command: str, *options: str) -> subprocess.Popen:
        log = (self.folder / f"{command}-{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            [BIN / command, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,  # what it starts ends with it
        )
        self.processes.append(process)
        return process

    def flwr(self, *arguments: str) -> str:
        """What a `flwr` command prints; fails where it does not end well."""
        done = subprocess.run(
            [BIN / "flwr", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def run(self, *options: str, **run_config: str | Path) -> str:
        """`flwr run` of this repository to its end; what it logged."""
        given = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in run_config.items())
        return self.flwr("run", str(ROOT), "test", "--stream", "--run-config", given, *options)

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in self.folder.glob("*.log"))

    def end(self) -> None:
        for process in reversed(self.processes):
            try:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                process.kill()


@contextmanager
def superlink(
    folder: Path, *options: str, connection: str = "insecure = true", port: int | None = None
) -> Iterator[StockFlower]:
    """A SuperLink that listens, and a connection to it by the name of test."""
    folder.mkdir(exist_ok=True)
    stock = StockFlower(folder, port or free_port())
    (folder / "flwr").mkdir()
    text = f'[superlink.test]\naddress = "{stock.address}"\n{connection}\n'
    (folder / "flwr" / "config.toml").write_text(text)
    where = ("--host", "127.0.0.1", "--port", str(stock.port), "--disable-runtime-dependency-installation")
    try:
        stock.start("flower-superlink", *where, *options)
        wait_for_port(stock.port)
        yield stock
    finally:
        stock.end()


def wait_for_port(port: int) -> None:
    until = time.monotonic() + WAIT_S
    while True:
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < until, f"nobody listens on {port}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
