"""What fedmini's own part of a round costs: the peers' `mlp` as a toy device through `rounds.train`, beside the bare loop."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from plain_loop import PlainLoop
from workloads import WORKLOADS, cohorts, make_data, make_model

from fedmini import config, metrics, planning, rounds, vectors
from fedmini.privacy import clipping, encoding
from fedmini.privacy.ledger import Ledger
from fedmini.privacy.noise import RandomStream
from fedmini.types import CohortSum, DeviceId, Residues, Roster, ServerState, TrainTask, Vector

WORK = WORKLOADS["mlp"]


Times = dict[str, tuple[list[float], list[float]]]


def measure(repeats: int, rounds_each: int = 5) -> tuple[Times, float]:
    """CPU and wall seconds a client-round of the bare loop and of fedmini, in turn, `rounds_each` rounds a turn.

    The accountant works out each epsilon once: its CPU seconds for all of these rounds are given apart, as pfl's are.
    """
    torch.set_num_threads(1)
    num_rounds = rounds_each * (repeats + 1)
    found: Times = {"bare": ([], []), "fedmini": ([], [])}
    with tempfile.TemporaryDirectory(prefix="fedmini-bench-") as folder:
        first = ToyRun(Path(folder) / "first", num_rounds)
        started = time.process_time()
        first.train(num_rounds)
        first.close()
        with_accountant = time.process_time() - started
        toy = ToyRun(Path(folder) / "second", num_rounds)
        bare = PlainLoop("mlp", make_model("mlp"), make_data("mlp")[0])
        asked = cohorts("mlp", rounds_each)
        for repeat in range(repeats + 1):
            for name, work in (("bare", partial(_bare, bare, asked)), ("fedmini", partial(toy.train, rounds_each))):
                cpu, wall = time.process_time(), time.perf_counter()
                work()
                if repeat:
                    found[name][0].append((time.process_time() - cpu) / (rounds_each * WORK.cohort_size))
                    found[name][1].append((time.perf_counter() - wall) / (rounds_each * WORK.cohort_size))
        toy.close()
    once_more = statistics.median(found["fedmini"][0]) * num_rounds * WORK.cohort_size
    return found, max(0.0, with_accountant - once_more)


def _bare(loop: PlainLoop, asked: Sequence[Sequence[int]]) -> None:
    for cohort in asked:
        loop.round(cohort)


class ToyRun:
    """A run whose devices train the peers' small network, with all that a run has but its directory: ledger, noise, reports."""

    def __init__(self, folder: Path, num_rounds: int) -> None:
        devices, self._test = make_data("mlp")
        self._loop = PlainLoop("mlp", make_model("mlp"), devices)
        named = dict(self._loop.model.named_parameters())
        self._tensors = {name: named[name] for name in sorted(named)}
        template = tuple((name, tuple(tensor.shape)) for name, tensor in self._tensors.items())
        parsed = config.parse_run_config(_settings(num_rounds))
        manifest = planning.make_manifest(parsed, "bench", planning.Base("toy", template), None)
        self._num_coordinates = manifest.num_coordinates
        names = tuple(f"device-{index:03d}" for index in range(WORK.num_devices))
        streams = partial(RandomStream.seeded, 1)
        self._run = rounds.Run(manifest, planning.server_plan(parsed), lambda: names, streams, True, True)
        folder.mkdir()
        self._ledger = Ledger.open(folder / "ledger.jsonl", "bench")
        adapter = {name: tensor.detach().numpy().copy() for name, tensor in self._tensors.items()}
        self._state = ServerState(0, adapter, 0, None, None, {}, self._ledger.position)

    def train(self, num_rounds: int) -> None:
        """So many rounds more."""
        for _ in range(num_rounds):
            self._state, _ = rounds.run_round(self._state, self._run, self._sum_cohort, self._ledger)

    def close(self) -> None:
        self._ledger.close()

    def _sum_cohort(self, chosen: Sequence[DeviceId], task: TrainTask, debit: Callable[[Roster], None]) -> CohortSum:
        manifest = self._run.manifest
        debit(Roster(manifest.run_id, task.round_num, task.attempt, tuple(sorted(chosen))))
        # As `contribute_together` has a batch: the task is checked once, all are trained, and then each contributes.
        vectors.check(task.adapter, manifest.template)
        given = [torch.from_numpy(task.adapter[name]) for name in self._tensors]
        deltas = {device: self._train(device, given) for device in sorted(chosen)}
        total: Residues = np.zeros(self._num_coordinates, np.uint32)
        for device, delta in deltas.items():
            total = encoding.add(total, self._contribute(device, delta, task), manifest.release.modulus_bits)
        return CohortSum(total, len(chosen))

    def _train(self, device: DeviceId, given: Sequence[torch.Tensor]) -> Vector:
        """What a device's steps change, from the tensors of the task. (num_parameters,)"""
        with torch.no_grad():
            for tensor, value in zip(self._tensors.values(), given, strict=True):
                tensor.copy_(value)
        start = self._flat()
        self._loop.train_device(int(device.removeprefix("device-")))
        delta = self._flat()
        delta -= start
        return delta

    def _contribute(self, device: DeviceId, delta: Vector, task: TrainTask) -> Residues:
        """As `Contributor` has it for a device-level unit."""
        manifest, release = self._run.manifest, self._run.manifest.release
        factor = clipping.factor(vectors.norm(delta), metrics.room_for_vector(release.encoding_norm))
        vector = np.zeros(self._num_coordinates)
        np.multiply(delta, np.float64(factor), out=vector[: len(delta)])
        vector[len(delta) :] = metrics.coordinates(
            1.0, 1.0, factor < 1, release.encoding_norm, manifest.local.max_length
        )
        bound = encoding.sensitivity(release.encoding_norm, release.scale, len(vector))
        stream = self._run.streams("device", device, "round", task.round_num, "rounding")
        integers = encoding.round_stochastically(vector, release.scale, bound, stream)
        integers += np.zeros(self._num_coordinates, np.int64)  # the share of the noise, which is the server's here
        return encoding.wrap(integers, release.modulus_bits)

    def _flat(self) -> Vector:
        return np.concatenate([tensor.detach().numpy().ravel() for tensor in self._tensors.values()])


def _settings(num_rounds: int) -> dict[str, object]:
    protected = {"noise": "server", "clip_norm": WORK.clip_norm, "noise_multiplier": 4.0, "target_delta": 1e-5}
    return {
        "run": {"name": "bench", "seed": 1},
        "base": {"name": "smollm2-135m-q4"},
        "data": {"source": "in memory", "held_out_devices": 1},
        "local": {"num_steps": 5, "sampling_rate": 0.2, "expected_batch_size": 10.0, "learning_rate": 0.1},
        "rounds": {"num_rounds": num_rounds, "cohort_size": WORK.cohort_size},
        "privacy": {"device": protected},
    }
