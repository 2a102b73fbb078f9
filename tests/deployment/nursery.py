"""Where the devices of a test come from: one process that has imported everything, and forks each of them.

A device is a process of its own all the same; it starts in a moment, where its imports alone take five seconds of a core.
What forks has no thread but one. Between the two stands a keeper, which is the device's parent and says how it ended.
"""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NoReturn, Self, TextIO

Channel = socket.socket  # whose messages stay apart, and can hold open files


def channels() -> tuple[Channel, Channel]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Forked:
    """The process of a device, as `subprocess.Popen` would have it."""

    def __init__(self, keeper: Channel) -> None:
        self._keeper = keeper
        self.returncode: int | None = None

    @cached_property
    def pid(self) -> int:
        said = self._keeper.recv(64)
        assert said, "the nursery has ended: what it wrote says why"
        return int(said)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            pid = self.pid
            if not select.select([self._keeper], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"device {pid}", timeout or 0.0)
            self.returncode = int(self._keeper.recv(64))
            self._keeper.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ends just now
                os.kill(self.pid, number)


class Nursery:
    """The process that forks; devices that live when it ends live on."""

    def __init__(self, root: Path) -> None:
        self._channel, theirs = channels()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        with theirs:
            command = [sys.executable, "-m", "tests.deployment.nursery"]
            self._process = subprocess.Popen(command, stdin=theirs, cwd=root, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._process.wait(60)

    def start(self, program: str, settings: Path) -> tuple[Forked, TextIO]:
        """A device by its program in tests/deployment and its settings, and what it prints."""
        own, theirs = channels()
        reading, writing = os.pipe()
        with theirs:
            socket.send_fds(self._channel, [program.encode(), b" ", os.fsencode(settings)], [theirs.fileno(), writing])
        os.close(writing)
        return Forked(own), os.fdopen(reading, errors="replace")


def main() -> None:
    from tests.deployment import device_process  # noqa: F401 - what every device needs, once

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a keeper ended
    with socket.socket(fileno=os.dup(0)) as channel:
        while True:
            asked, files, _, _ = socket.recv_fds(channel, 4096, 2)
            if not asked:
                return
            if os.fork() == 0:
                channel.close()
                program, settings = os.fsdecode(asked).split(" ", 1)
                keep(program, Path(settings), socket.socket(fileno=files[0]), files[1])
            for one in files:
                os.close(one)


def keep(program: str, settings: Path, asked: Channel, output: int) -> NoReturn:
    """Fork the device, and say its number and how it ended; end with whoever asked, and the device with its parent."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    device = os.fork()
    if device == 0:
        asked.close()
        be_device(program, settings, output)
    os.close(output)
    asked.send(str(device).encode())
    ended = os.pidfd_open(device)
    if asked in select.select([ended, asked], [], [])[0]:
        os._exit(1)
    _, status = os.waitpid(device, 0)
    asked.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def be_device(program: str, settings: Path, output: int) -> NoReturn:
    os.dup2(output, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        importlib.import_module(f"tests.deployment.{program}").main(json.loads(settings.read_bytes()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
