"""A whole cohort in one process, with a server that can be made to lie and devices that can be made to fail."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedmini.errors import FedMiniError
from fedmini.secagg import masks
from fedmini.secagg.checks import Agreed
from fedmini.secagg.device_session import DeviceSession
from fedmini.secagg.messages import Context, Stage, hash_model
from fedmini.secagg.server_session import ServerSession
from fedmini.secagg.shamir import Random
from fedmini.types import Contribution, DeviceId, LocalPlan, LoraShape, Manifest, ReleasePlan, Residues, TrainTask
from tests import tiny_trust

MODEL_SHAPE = (3, 2)
MODEL = np.arange(6, dtype="<f4").tobytes()

Tamper = Callable[[Stage, DeviceId, bytes], bytes | None]


def a_manifest(
    num_coordinates: int = 10, max_devices: int = 150, min_survivors: int = 2, modulus_bits: int = 24
) -> Manifest:
    """Six parameters, the other coordinates metrics; no privacy plan, which the protocol does not look at."""
    num_metrics = num_coordinates - int(np.prod(MODEL_SHAPE))
    release = ReleasePlan(
        example=None, device=None, encoding_norm=1.0, scale=8192.0, modulus_bits=modulus_bits, num_metrics=num_metrics,
        cohort_size=max_devices, max_devices=max_devices, min_survivors=min_survivors, n_honest=min_survivors,
        max_participations=10, max_releases=10, min_separation=1,
    )  # fmt: skip
    return Manifest(
        "run", "f" * 64, LoraShape(4, 8.0, ("v_proj",), None, "B", 0), (("w", MODEL_SHAPE),),
        LocalPlan(1, 0.5, 4.0, 1.0, "sgd", 64, detach_prefix=False), release, 100, (),
    )  # fmt: skip


@dataclass
class Device:
    """An owner of sessions whose contribution is a vector that the test chose."""

    vector: Residues
    models: list[bytes] = field(default_factory=list)  # what it was asked to train

    def admit(self, context: Context) -> None:
        """This one forgets what it took part in; a real one asks its ledger."""

    def contribute(self, context: Context, model: bytes) -> Residues:
        self.models.append(model)
        return self.vector

    def answer(self, task: TrainTask) -> Contribution:
        """The same for a Member, which has checked and paid by then."""
        self.models.append(b"")
        return Contribution(self.vector)


class Cohort:
    """Devices `d000` and so on, enrolled by one operator, each with a random vector, and sessions for one round."""

    def __init__(
        self, num_devices: int = 6, manifest: Manifest | None = None, round_num: int = 1, random: Random = os.urandom
    ) -> None:
        self.manifest, self.random = manifest or a_manifest(), random
        self.operator = tiny_trust.an_operator()
        self.trust = tiny_trust.trust_in(self.operator)
        self.devices = tuple(f"d{index:03d}" for index in range(num_devices))
        bits = self.manifest.release.modulus_bits
        size = self.manifest.num_coordinates
        self.owners = {
            device: Device(np.frombuffer(os.urandom(4 * size), np.uint32) & np.uint32(2**bits - 1))
            for device in self.devices
        }
        self.identities = {device: tiny_trust.enrol(self.operator, device) for device in self.devices}
        self.begin(self.context_of(round_num))

    def context_of(self, round_num: int, attempt: int = 0, devices: Sequence[DeviceId] | None = None) -> Context:
        """A session about MODEL, with all devices or with some."""
        invited = tuple(self.devices if devices is None else devices)
        return Context("run", round_num, attempt, bytes.fromhex(self.manifest.hash), hash_model(MODEL), invited)

    def begin(self, context: Context) -> None:
        """A fresh session on each device that is invited, and nothing known of errors before."""
        self.context = context
        self.sessions = {device: self.session(device) for device in context.invited}
        self.errors: dict[DeviceId, FedMiniError] = {}

    def session(self, device: DeviceId) -> DeviceSession:
        agreed = Agreed(device, self.manifest, self.trust)
        return DeviceSession(self.identities[device], agreed, self.owners[device], self.random)

    def server(self) -> ServerSession:
        return ServerSession(self.manifest, self.context, MODEL, self.trust)

    def sum_of(self, devices: Sequence[DeviceId]) -> Residues:
        """The sum that should come out, mod 2**modulus_bits."""
        total = np.zeros(self.manifest.num_coordinates, np.uint32)
        for device in devices:
            total += self.owners[device].vector
        return masks.reduce(total, self.manifest.release.modulus_bits)

    def answers(
        self, stage: Stage, requests: Iterator[tuple[DeviceId, bytes]], tamper: Tamper | None = None,
        drop: Mapping[Stage, Sequence[DeviceId]] | None = None,
    ) -> Iterator[tuple[DeviceId, bytes]]:  # fmt: skip
        """What the devices answer; one that gives up is noted in `errors` and silent. `tamper` changes requests."""
        for device, request in requests:
            if device in (drop or {}).get(stage, ()):
                continue
            sent = request if tamper is None else tamper(stage, device, request)
            if sent is None:
                continue
            try:
                answer = self.sessions[device].step(sent)
            except FedMiniError as error:
                self.errors[device] = error
                continue
            yield device, answer

    def run(
        self, tamper: Tamper | None = None, drop: Mapping[Stage, Sequence[DeviceId]] | None = None,
        server: ServerSession | None = None, change: Callable[[Stage, DeviceId, bytes], bytes] | None = None,
    ) -> ServerSession:  # fmt: skip
        """The whole protocol; `tamper` lies to devices, `change` to the server in their name."""
        server = server or self.server()
        requests = server.invite()
        while server.stage is not Stage.DONE:
            stage = server.stage
            answers = self.answers(stage, requests, tamper, drop)
            if change is not None:
                answers = ((device, change(stage, device, answer)) for device, answer in answers)
            requests = server.step(answers)
        return server


def with_release(manifest: Manifest, **changes: object) -> Manifest:
    return replace(manifest, release=replace(manifest.release, **changes))
