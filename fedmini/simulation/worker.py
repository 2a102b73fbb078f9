"""A worker: a process of its own that trains batches of a simulation's devices, one batch after the other.

`python -m fedmini.simulation.worker`, started by workers.py alone. It ends with the process that started it, whatever it
is doing.
"""

import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from fedmini import manifest_file
from fedmini.config import parse_run_config
from fedmini.contributor import sum_together
from fedmini.errors import FedMiniError
from fedmini.model import runtime
from fedmini.simulation import devices, frames
from fedmini.simulation.frames import Frame
from fedmini.types import Manifest, TrainTask


def main() -> None:
    """Read a beginning and then batches from standard input, and answer on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: who started this decides
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    asked: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, asked), daemon=True).start()
    try:
        worker = Worker(asked.get())
        frames.write(answers, Frame({"is": "ready"}))
        while True:
            frames.write(answers, worker.answer(asked.get()))
    except FedMiniError as error:
        frames.write(answers, Frame({"is": "error", "class": type(error).__name__, "message": str(error)}))


def _listen(pipe: BinaryIO, asked: "queue.SimpleQueue[Frame]") -> None:
    while (frame := frames.read(pipe)) is not None:
        asked.put(frame)
    os._exit(0)  # nobody is left to answer, in the midst of a batch too


class Worker:
    """The model of a run, loaded, and how its devices contribute."""

    def __init__(self, beginning: Frame) -> None:
        self._config = parse_run_config(beginning.words["config"])
        self._manifest: Manifest = manifest_file.parse(beginning.words["manifest"].encode())
        self._streams = devices.streams_of(self._config.run.seed)
        runtime.limit_threads(self._config.simulation.num_threads)
        self._model, _ = devices.load_model(self._config, Path(beginning.words["cache_dir"]), lambda note: None)

    def answer(self, batch: Frame) -> Frame:
        """The sum of what a batch of devices contributes to a task."""
        words, manifest = batch.words, self._manifest
        adapter = {name: batch.tensors[f"adapter.{name}"] for name, _ in manifest.template}
        task = TrainTask(manifest.hash, words["round_num"], words["attempt"], adapter)
        examples = frames.unpack_examples(words["devices"], batch.tensors)
        batch_of = devices.contributors(examples, self._model, manifest, self._streams, self._config)
        return Frame({"is": "sum"}, {"total": sum_together(list(batch_of.values()), task)})


if __name__ == "__main__":
    main()
