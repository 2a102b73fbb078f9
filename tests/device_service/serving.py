"""A real `fedmini device serve` in a process of its own, on the tiny model, and calls to it over its socket."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc

from fedmini import operator_keys
from fedmini.config import StoreSection
from fedmini.device_service import messages
from fedmini.store import ExampleStore
from tests import tiny_llama

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 120.0
CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
STREAMED = {"Reply": "ReplyPiece", "Receipts": "Receipt"}


def a_folder(path: Path, more: str = "") -> Path:
    """A device's folder, not enrolled, whose device.toml names the tiny model beside it; its key is in no keyring."""
    gguf = path.parent / "tiny.gguf"
    if not gguf.exists():
        tiny_llama.write_gguf(gguf)
    operator_keys.create_device(path)
    (path / "device.toml").write_text(f'[base]\npath = {json.dumps(str(gguf))}\ncompute_dtype = "float32"\n{more}')
    ExampleStore.open(path / "examples", StoreSection(), find_keyring=lambda: None).close()
    return path


def environment(**changes: str) -> dict[str, str]:
    """That of a process under test."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def fedmini(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    command = [sys.executable, "-m", "fedmini", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), timeout=WAIT_S)


def complaints(*commands: Sequence[str | Path]) -> list[str]:
    """The one line of each command that ends with 2; they run at once."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return [_complaint(ended) for ended in pool.map(lambda command: fedmini(*command), commands)]


def _complaint(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 2, ended
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("fedmini: "), ended.stderr
    return ended.stderr.removeprefix("fedmini: ").rstrip("\n")


@dataclass
class Daemon:
    """A process of `fedmini device serve` or `run`, and its log."""

    arguments: Sequence[str | Path]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)
    begun: int = 0  # where its part of the log begins

    def start(self, **changes: str) -> "Daemon":
        """Start it, and wait until it runs."""
        command = [sys.executable, "-m", "fedmini", "device", *map(str, self.arguments), "--log-format", "json"]
        with self.log.open("ab") as log:
            self.begun = log.tell()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(**changes)
            )
        self.wait_for("device.runs")
        return self

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_bytes()[self.begun :].decode().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, event: str, **fields: Any) -> dict[str, Any]:
        """The newest such event of this process; fails where it ends before, or it takes too long."""
        until = time.monotonic() + WAIT_S
        while True:
            is_over = self.process.poll() is not None
            found = [one for one in self.events if one["event"] == event and fields.items() <= one.items()]
            if found:
                return found[-1]
            assert not is_over and time.monotonic() < until, f"no {event} came\n{self.log.read_text()}"
            time.sleep(0.05)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


@contextmanager
def serving(folder: Path, *arguments: str | Path, **changes: str) -> Iterator[Daemon]:
    """`fedmini device serve FOLDER ...`, ended afterwards."""
    daemon = Daemon(("serve", folder, *arguments), folder.parent / f"{folder.name}.log")
    try:
        yield daemon.start(**changes)
    finally:
        daemon.kill()


class Client:
    """Calls to a service, by a socket or an address."""

    def __init__(self, target: Path | str, token: str | None = None, **options: Any) -> None:
        address = f"unix:{quote(os.fsencode(target.absolute()))}" if isinstance(target, Path) else target
        self.channel = grpc.insecure_channel(address, options=CHANNEL, **options)
        self.metadata = () if token is None else (("fedmini-token", token),)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def send(self, name: str, content: bytes, timeout: float = WAIT_S, **options: Any) -> Any:
        """The answer to these bytes: a message, or for a stream the call, which gives messages."""
        method = messages.METHODS[name]
        kind = self.channel.unary_stream if method.is_streaming else self.channel.unary_unary
        parse = type(messages.make(STREAMED.get(name, f"{name}Response"))).FromString
        path = f"/{messages.SERVICE}/{name}"
        return kind(path, response_deserializer=parse)(content, timeout, metadata=self.metadata, **options)

    def call(self, name: str, timeout: float = WAIT_S, **fields: Any) -> Any:
        """The answer to a request of these fields."""
        return self.send(name, messages.make(f"{name}Request", **fields).SerializeToString(), timeout)

    def add(self, *examples: tuple[str | None, str]) -> int:
        made = [messages.make("Example", prompt=prompt, response=response) for prompt, response in examples]
        return int(self.call("AddExamples", examples=made).num_added)

    def reply(self, prompt: str, **fields: Any) -> str:
        return "".join(piece.text for piece in self.call("Reply", prompt=prompt, **fields))


def refused(call: Any, *arguments: Any, **fields: Any) -> tuple[str, str]:
    """The status that a call ends with: its code, and its words."""
    try:
        list(answer) if hasattr(answer := call(*arguments, **fields), "cancel") else None
    except grpc.RpcError as error:
        return error.code().name, error.details()
    raise AssertionError("it was answered")
