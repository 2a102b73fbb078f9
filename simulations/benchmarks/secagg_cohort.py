"""A cohort of enrolled devices and a server, and what one round of secure aggregation costs each of them."""

import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.secagg import masks, signing_keys, trust
from fedmini.secagg.checks import Agreed
from fedmini.secagg.device_session import DeviceSession
from fedmini.secagg.messages import Context, Stage, hash_model
from fedmini.secagg.server_session import ServerSession
from fedmini.secagg.trust import Identity, Trust
from fedmini.types import DeviceId, LocalPlan, LoraShape, Manifest, ReleasePlan, Residues

MODEL = np.zeros(1, "<f4").tobytes()  # a model's size is no part of what is measured here

Answer = Callable[[DeviceId, bytes], bytes]


@dataclass(slots=True)
class Costs:
    """CPU seconds and bytes of one round, of the server and of each device that stayed."""

    device_s: dict[DeviceId, float] = field(default_factory=dict)
    upload_bytes: dict[DeviceId, int] = field(default_factory=dict)
    download_bytes: dict[DeviceId, int] = field(default_factory=dict)
    server_s: float = 0.0


class Cohort:
    """Devices with sessions for one round, all contributing one vector: where it comes from costs nothing here."""

    def __init__(self, num_devices: int, num_coordinates: int, modulus_bits: int = 24) -> None:
        self.manifest = make_manifest(num_devices, num_coordinates, modulus_bits)
        self.devices = tuple(f"device-{index:03d}" for index in range(num_devices))
        self.context = Context("bench", 1, 0, bytes.fromhex(self.manifest.hash), hash_model(MODEL), self.devices)
        words = np.frombuffer(os.urandom(4 * num_coordinates), np.uint32)
        self.vector: Residues = words & np.uint32(2**modulus_bits - 1)
        operator = signing_keys.draw()
        self.trust = Trust(signing_keys.public_bytes(operator))
        self.sessions = {device: self._session(device, operator) for device in self.devices}

    def _session(self, device: DeviceId, operator: Ed25519PrivateKey) -> DeviceSession:
        key = signing_keys.draw()
        certificate = trust.certify(operator, device, signing_keys.public_bytes(key))
        own_trust = Trust(self.trust.operator_key)  # a device on its own: nothing is verified for it by another one
        agreed = Agreed(device, self.manifest, own_trust)
        return DeviceSession(Identity(key, certificate), agreed, self, os.urandom)

    def admit(self, context: Context) -> None:
        """A device's ledger would look here whether it has been part of this round before."""

    def contribute(self, context: Context, model: bytes) -> Residues:
        """Training would be here."""
        return self.vector

    def answer(self, device: DeviceId, request: bytes) -> bytes:
        """One device's answer, in this process."""
        return self.sessions[device].step(request)

    def serve(self, connection: Connection) -> None:
        """Answer for all devices in a process of their own, until the other end is closed."""
        while True:
            try:
                device, request = connection.recv()
            except EOFError:
                return
            connection.send_bytes(self.answer(device, request))

    def run(self, lost: Collection[DeviceId], answer: Answer | None = None) -> Costs:
        """One round, in which the `lost` send no vector. RuntimeError unless the sum is the survivors'."""
        costs, reach = Costs(), answer or self.answer
        server = ServerSession(self.manifest, self.context, MODEL, self.trust)
        requests = server.invite()
        started = time.process_time()
        while server.stage is not Stage.DONE:
            asked = lost if server.stage is Stage.CONTRIBUTE else ()
            requests = server.step(self._exchange(requests, asked, reach, costs))
        costs.server_s = time.process_time() - started - sum(costs.device_s.values())
        num_left = len(self.devices) - len(lost)
        expected = masks.reduce(self.vector * np.uint32(num_left), self.manifest.release.modulus_bits)
        if server.cohort_sum.num_devices != num_left or not np.array_equal(server.cohort_sum.total, expected):
            raise RuntimeError("the sum is not that of the devices that stayed")
        for known in (costs.device_s, costs.upload_bytes, costs.download_bytes):
            for device in lost:
                known.pop(device)
        return costs

    def _exchange(
        self, requests: Iterator[tuple[DeviceId, bytes]], lost: Collection[DeviceId], reach: Answer, costs: Costs
    ) -> Iterator[tuple[DeviceId, bytes]]:
        for device, request in requests:
            if device in lost:
                continue
            started = time.process_time()
            answer = reach(device, request)
            costs.device_s[device] = costs.device_s.get(device, 0.0) + time.process_time() - started
            costs.upload_bytes[device] = costs.upload_bytes.get(device, 0) + len(answer)
            costs.download_bytes[device] = costs.download_bytes.get(device, 0) + len(request)
            yield device, answer


def make_manifest(num_devices: int, num_coordinates: int, modulus_bits: int) -> Manifest:
    """One parameter, all other coordinates metrics: the protocol doesn't look at what they are."""
    least = 2 * num_devices // 3 + 1
    release = ReleasePlan(
        example=None, device=None, encoding_norm=1.0, scale=8192.0, modulus_bits=modulus_bits,
        num_metrics=num_coordinates - 1, cohort_size=num_devices, max_devices=num_devices, min_survivors=least,
        n_honest=least, max_participations=1, max_releases=1, min_separation=1,
    )  # fmt: skip
    lora = LoraShape(1, 1.0, ("v_proj",), None, "B", 0)
    local = LocalPlan(1, 1.0, 1.0, 1.0, "sgd", 8, detach_prefix=False)
    return Manifest("bench", "0" * 64, lora, (("w", (1,)),), local, release, 1, ())
