"""Processes that train the devices of a simulation beside each other: each has one model, and gives back sums alone.

They are started anew, never forked, so that no thread of torch's is in between, and they map one packed base. A batch of
devices goes to whichever worker is free; who is in it does not depend on how many workers there are, and sums of residues
have one value in any order: so neither does the result.
"""

import contextlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, cast

import numpy as np

from fedmini import errors, manifest_file
from fedmini.errors import FedMiniError, StateError
from fedmini.privacy import encoding
from fedmini.simulation import frames
from fedmini.simulation.cohort import batches
from fedmini.simulation.frames import Frame
from fedmini.simulation.setup import Setup
from fedmini.types import CohortSum, DeviceId, Residues, TrainTask

END_SECONDS = 5.0  # a worker that was told to end and hasn't is killed


class Workers:
    """The workers of one run, started with it. `sum_devices` is what a SimulatedCohort takes."""

    def __init__(self, setup: Setup, num_workers: int) -> None:
        self._setup = setup
        command = [sys.executable, "-m", "fedmini.simulation.worker"]
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(num_workers):
                self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for process in self._processes:
                self._send(process, self._beginning())
        except BaseException:
            self.end()
            raise
        self._are_ready = False

    def sum_devices(self, survivors: Sequence[DeviceId], task: TrainTask, on_answer: Callable[[], None]) -> CohortSum:
        """The sum of what these devices contribute. Raises what a worker raised, and StateError where one has died."""
        manifest = self._setup.run.manifest
        total: Residues = np.zeros(manifest.num_coordinates, np.uint32)
        self._wait_until_ready()
        waiting = batches(survivors, self._setup.config.simulation.devices_per_batch)[::-1]
        with selectors.DefaultSelector() as busy:
            for process in self._processes[: len(waiting)]:
                self._ask(busy, process, waiting.pop(), task)
            while busy.get_map():
                for key, _ in busy.select():
                    process, batch = key.data
                    busy.unregister(key.fileobj)
                    part = self._receive(process).tensors["total"]
                    total = encoding.add(total, part, manifest.release.modulus_bits)
                    if waiting:
                        self._ask(busy, process, waiting.pop(), task)
                    for _ in batch:
                        on_answer()
        return CohortSum(total, len(survivors))

    def end(self) -> None:
        """End every worker, in the midst of a batch too."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    cast(BinaryIO, pipe).close()

    def _beginning(self) -> Frame:
        setup = self._setup
        return Frame(
            {
                "config": setup.config.model_dump(mode="json"),
                "manifest": manifest_file.canonical(setup.run.manifest).decode(),
                "cache_dir": str(setup.cache_dir.absolute()),
            }
        )

    def _wait_until_ready(self) -> None:
        if not self._are_ready:  # only now: they load while this process does other things
            for process in self._processes:
                self._receive(process)
            self._are_ready = True

    def _ask(
        self,
        busy: selectors.BaseSelector,
        process: subprocess.Popen[bytes],
        batch: Sequence[DeviceId],
        task: TrainTask,
    ) -> None:
        words = {"round_num": task.round_num, "attempt": task.attempt, "devices": list(batch)}
        tensors = frames.pack_examples([self._setup.examples[device] for device in batch])
        adapter = {f"adapter.{name}": np.asarray(value) for name, value in task.adapter.items()}
        self._send(process, Frame(words, tensors | adapter))
        busy.register(cast(BinaryIO, process.stdout), selectors.EVENT_READ, (process, batch))

    def _send(self, process: subprocess.Popen[bytes], frame: Frame) -> None:
        try:
            frames.write(cast(BinaryIO, process.stdin), frame)
        except BrokenPipeError:
            self._receive(process)  # it said why before it ended, or it didn't
            raise

    def _receive(self, process: subprocess.Popen[bytes]) -> Frame:
        frame = frames.read(cast(BinaryIO, process.stdout))
        if frame is None:
            raise StateError(f"a worker of the simulation {_how_it_ended(process)}")
        if frame.words["is"] == "error":
            kind: type[FedMiniError] = getattr(errors, frame.words["class"])
            raise kind(frame.words["message"])
        return frame


@contextlib.contextmanager
def started(setup: Setup) -> Iterator[Workers | None]:
    """The workers that a run's configuration asks for, until the end of the block; None where this process trains."""
    if setup.config.simulation.workers == 1:
        yield None
        return
    workers = Workers(setup, setup.config.simulation.workers)
    try:
        yield workers
    finally:
        workers.end()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        advice = "the machine may have run out of memory: lower simulation.workers or simulation.devices_per_batch"
        return f"was ended by {name}; {advice}, then run with --resume"
    return f"ended by itself with {code}: what it said stands above; mend that, then run with --resume"
