"""What simulations/bench_deployment.py measures: rounds over a real gate, with devices that answer at once."""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from deployment_network import Network, network

from fedmini.flower import replies
from fedmini.flower.codec import Envelope
from fedmini.secagg.messages import Stage
from fedmini.secure_sum import SecureSum
from fedmini.types import DeviceId, Roster, TrainTask

KILOBYTE = b"\x5a" * 1024
NUM_STAGES = 5
STAGE_S = 120.0

Row = tuple[str, str, str, str]  # what, measured, what it is held against, the bound


@dataclass(frozen=True, slots=True)
class Cost:
    """One size of cohort: seconds are medians of wall-clock time; requests, CPU and memory are the gate's, a secure round."""

    num_devices: int
    stage_s: float
    slowest_stage_s: float
    five_stages_s: float
    secure_s: float
    num_requests: float
    gate_s: float
    gate_mb: float


def measure(num_devices: int, repeats: int) -> Cost:
    """Five stages in sequence and a secure round, in turn, so often; a first stage is not counted."""
    with network(num_devices) as running:
        secure = SecureRounds(running)
        running.echo(KILOBYTE)
        fives, rounds, requests, gate_s = [], [], [], []
        for _ in range(repeats):
            fives.append([running.echo(KILOBYTE) for _ in range(NUM_STAGES)])
            before = running.used()
            rounds.append(secure.run())
            after = running.used()
            requests.append(after.num_requests - before.num_requests)
            gate_s.append(after.gate_s - before.gate_s)
        memory = running.used().gate_mb
    stages = [seconds for five in fives for seconds in five]
    return Cost(
        num_devices,
        statistics.median(stages),
        max(stages),
        statistics.median(sum(five) for five in fives),
        statistics.median(rounds),
        statistics.median(requests),
        statistics.median(gate_s),
        memory,
    )


class SecureRounds:
    """The protocol between a server and the members behind a network, one round after the other."""

    def __init__(self, running: Network) -> None:
        self._running, self._round_num = running, 0
        self._sum = SecureSum(running.manifest, running.trust, self._exchange)

    def run(self) -> float:
        """Seconds of one round. RuntimeError unless everybody's ones are in the sum."""
        self._round_num += 1
        manifest, names = self._running.manifest, tuple(self._running.nodes)
        adapter = {name: np.zeros(shape, np.float32) for name, shape in manifest.template}
        began = time.monotonic()
        found = self._sum(names, TrainTask(manifest.hash, self._round_num, 0, adapter), _nothing)
        took = time.monotonic() - began
        if found.num_devices != len(names) or not (found.total == len(names)).all():
            raise RuntimeError("the sum is not that of all devices")
        return took

    def _exchange(self, stage: Stage, requests: Iterator[tuple[DeviceId, bytes]]) -> Iterator[tuple[DeviceId, bytes]]:
        """Over the network, every answer's signature checked."""
        link, nodes, order = self._running.link, self._running.nodes, list[DeviceId]()

        def messages() -> Iterator[tuple[int, Envelope]]:
            for device, request in requests:
                order.append(device)
                yield nodes[device], Envelope("request", {"stage": stage.name}, request)

        names = list(link.send_all(messages(), STAGE_S))
        asked = {name: device for name, device in zip(names, order, strict=True) if name is not None}
        for reply in link.receive(asked, time.monotonic() + STAGE_S):
            device = asked[reply.message_id]
            if reply.envelope is None:
                raise RuntimeError(f"{device} gave no answer: {reply.problem}")
            replies.check(self._running.device_keys[device], reply.message_id, reply.envelope)
            yield device, reply.envelope.payload


def _nothing(roster: Roster) -> None:
    """A ledger would be debited here."""


def idle_share(num_devices: int, seconds: float) -> float:
    """The part of one core that a gate takes while so many devices wait and nothing is sent."""
    with network(num_devices) as running:
        running.echo(KILOBYTE)
        before = running.used()
        time.sleep(seconds)
        return (running.used().gate_s - before.gate_s) / seconds


def rows(costs: Mapping[int, Cost], idle: Mapping[int, float]) -> list[Row]:
    """A table of what was measured, with what it is held against."""
    two = costs[min(costs)]
    found = [
        (
            f"a round of 1 KB, {two.num_devices} devices, median / max",
            f"{two.stage_s:.2f} / {two.slowest_stage_s:.2f} s",
            "stock Flower: 6.5 to 9.5 s",
            "0.7 s",
        ),
        ("five such stages in sequence", f"{two.five_stages_s:.2f} s", "", "3.5 s"),
        ("a secure round of 1 KB", f"{two.secure_s:.2f} s", "", ""),
    ]
    for cost in costs.values():
        each = f"{cost.stage_s:.2f} s a stage, {cost.secure_s:.2f} s a secure round"
        gate = f"{cost.num_requests:.0f} requests, gate {cost.gate_s:.2f} s of CPU, {cost.gate_mb:.0f} MB"
        found.append((f"{cost.num_devices} devices", each, gate, ""))
    found += [
        (f"the gate, {number} devices idle", f"{100 * share:.1f} % of a core", "", "") for number, share in idle.items()
    ]
    return found
