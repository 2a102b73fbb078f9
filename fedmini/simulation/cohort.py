"""The seam to the devices of this process: one manifest's, its training's or its evaluations'."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fedmini.contributor import sum_together
from fedmini.privacy import encoding
from fedmini.secagg.server_session import Refusal
from fedmini.secure_sum import SecureSum
from fedmini.simulation.secure import SecureDevices
from fedmini.simulation.setup import Setup
from fedmini.types import CohortSum, DeviceId, Residues, Roster, TrainTask

SumDevices: TypeAlias = Callable[[Sequence[DeviceId], TrainTask, Callable[[], None]], CohortSum]
"""Adds up what the named devices contribute to a task; the last argument is called after each of them."""


@dataclass(frozen=True, slots=True)
class SimulatedCohort:
    """A SumCohort. `on_answer` hears of each contribution: the task, how many there were, and how many are expected.

    `sum_devices` adds up contributions where they aren't aggregated securely; None: here, in batches of devices.
    """

    setup: Setup
    secure: SecureDevices | None
    on_answer: Callable[[TrainTask, int, int], None]
    note: Callable[[str], None]
    sum_devices: SumDevices | None = None

    def __call__(self, chosen: Sequence[DeviceId], task: TrainTask, debit: Callable[[Roster], None]) -> CohortSum:
        """The sum, by secure aggregation where the run asks for it, else added up directly.

        Either way the same devices drop out, after the debit, and the sum has the same bits.
        """
        lost, manifest = self._lost(chosen, task), self.setup.run.manifest
        num_left, num_done = len(chosen) - len(lost), itertools.count(1)

        def on_answer() -> None:
            self.on_answer(task, next(num_done), num_left)

        if self.secure is not None:
            exchange = self.secure.exchange(lost, on_answer)
            return SecureSum(manifest, self.secure.trust, exchange, self._note_refusals)(chosen, task, debit)
        debit(Roster(manifest.run_id, task.round_num, task.attempt, tuple(sorted(chosen))))
        survivors = [device for device in sorted(chosen) if device not in lost]
        return (self.sum_devices or self._sum_here)(survivors, task, on_answer)

    def _lost(self, chosen: Sequence[DeviceId], task: TrainTask) -> frozenset[DeviceId]:
        """Who drops out of this attempt after its debit: each with the configured probability."""
        setup = self.setup
        draws = setup.run.streams("dropout", "round", task.round_num, "attempt", task.attempt).uniform(len(chosen))
        rate = setup.config.rounds.dropout_rate
        return frozenset(device for device, draw in zip(sorted(chosen), draws, strict=True) if draw < rate)

    def _sum_here(self, survivors: Sequence[DeviceId], task: TrainTask, on_answer: Callable[[], None]) -> CohortSum:
        """One contribution in memory at a time, beside what the devices of a batch need."""
        manifest = self.setup.run.manifest
        total: Residues = np.zeros(manifest.num_coordinates, np.uint32)
        for batch in batches(survivors, self.setup.config.simulation.devices_per_batch):
            part = sum_together([self.setup.devices[device] for device in batch], task, on_answer)
            total = encoding.add(total, part, manifest.release.modulus_bits)
        return CohortSum(total, len(survivors))

    def _note_refusals(self, refusals: Sequence[Refusal]) -> None:
        for refusal in refusals:
            self.note(f"{refusal.device}: an answer at stage {refusal.stage.name} was refused: {refusal.reason}")


def batches(devices: Sequence[DeviceId], devices_per_batch: int) -> list[Sequence[DeviceId]]:
    """Who trains together: decided by the devices and that number alone, wherever each batch is computed."""
    return [devices[start : start + devices_per_batch] for start in range(0, len(devices), devices_per_batch)]
