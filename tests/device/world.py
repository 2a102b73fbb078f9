"""What the tests of a device stand on: an operator, runs of the tiny model, peers in this process, conditions to turn."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini import config as configuration
from fedmini import enrolment, offer, planning, vectors
from fedmini.conditions import Conditions
from fedmini.device import Device, DeviceStatus
from fedmini.errors import FedMiniError
from fedmini.flower.codec import Envelope
from fedmini.member import ForThisProcess, Member
from fedmini.model import loading
from fedmini.model.lora import LoraModel
from fedmini.offer import Offer
from fedmini.secagg import signed_manifest, signing_keys, trust, trust_text
from fedmini.secagg.checks import Agreed
from fedmini.secagg.messages import Stage
from fedmini.secagg.trust import Revocations, Trust
from fedmini.secure_sum import SecureSum
from fedmini.types import CohortSum, Contribution, Manifest, TrainTask
from tests import tiny_run, tiny_trust

WAIT_S = 60.0
PEERS = ("ben", "carl", "dora")
EXAMPLES = [("what is it", "a bee"), ("and that", "a cab"), ("who", "Abe"), (None, "fed a bad cafe")]


@cache
def operator() -> Ed25519PrivateKey:
    """One operator for all tests: devices and runs are what differs."""
    return tiny_trust.an_operator()


@cache
def tiny_base(folder: Path, layers: tuple[int, ...] | None = None) -> tuple[planning.Base, configuration.BaseSection]:
    """The tiny Llama as a file, and what a manifest says of it; all of its layers are adapted where none are named."""
    config = tiny_run.config(folder, changes={} if layers is None else {"lora": {"layers": layers}})
    model = LoraModel(loading.load_base(config.base, folder / "cache", lambda note: None), planning.lora_shape(config))
    return planning.Base(model.fingerprint, model.template), config.base


@cache
def a_run(folder: Path, name: str = "run-1", **changes: Any) -> Manifest:
    """A run of four devices, one of whom may be missing, each giving up to three times. `changes` are of its local section."""
    layers = changes.pop("lora_layers", None)
    base, section = tiny_base(folder) if layers is None else tiny_base(folder, layers)  # the same call: it is cached
    rounds = {"num_rounds": 9, "cohort_size": 4, "min_survivors": 3, "max_participations": changes.pop("most", 3)}
    rounds["min_separation"] = changes.pop("min_separation", 1)
    parsed = configuration.parse_run_config(
        {
            "run": {"name": name},
            "base": {"path": str(section.path), "compute_dtype": "float32"},
            "lora": {"lora_rank": 2, "lora_alpha": 4.0, "target_modules": ["v_proj", "o_proj"], "layers": layers},
            "data": {"source": "in memory", "min_examples": 1, "max_examples_per_device": 12, "held_out_devices": 1},
            "local": {"sampling_rate": 0.5, "max_length": 64, "learning_rate": 0.5, **changes},
            "rounds": rounds,
            "privacy": {"device": {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": 2.0, "target_delta": 1e-5}},
        }
    )
    return planning.make_manifest(parsed, name, base, None)


LONG = 100_000  # steps: minutes of training


class Turning:
    """Conditions that a test turns: what they raise, or that the device is on its battery."""

    def __init__(self) -> None:
        self.on_power = True
        self.failure: BaseException | None = None

    def read(self) -> Conditions:
        if self.failure is not None:
            raise self.failure
        return Conditions(
            on_power=self.on_power, is_idle=True, is_unmetered=True, temperature_c=30.0, free_memory_bytes=2**34
        )


class Heard:
    """An app's log: what it heard, and a way to wait for it."""

    def __init__(self, also: Callable[..., None] = lambda event, **fields: None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._also = also

    def __call__(self, event: str, /, **fields: Any) -> None:
        with self._changed:
            self.events.append((event, fields))
            self._changed.notify_all()
        self._also(event, **fields)

    def wait_for(self, event: str, since: int = 0, **fields: Any) -> int:
        """The place after the first such event."""

        def place() -> int:
            for index, (name, found) in enumerate(self.events[since:], since + 1):
                if name == event and fields.items() <= found.items():
                    return index
            return 0

        with self._changed:
            assert self._changed.wait_for(place, WAIT_S), f"no {event} {fields} came, but {self.events[since:]}"
            return place()

    def count(self, event: str) -> int:
        return sum(name == event for name, _ in self.events)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    """For what no event tells: a device's status, a thread's end."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.02)


def wait_for_status(device: Device, condition: Callable[[DeviceStatus], bool], what: str) -> DeviceStatus:
    wait_until(lambda: condition(device.status()), f"{what}: {device.status()}")
    return device.status()


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    """A device's configuration: the tiny base, all of the conditions on, limits that the runs here fit in."""
    _, base = tiny_base(folder)
    values: dict[str, Any] = {
        "device": {"lifetime_epsilon": 1000.0, "lifetime_delta": 1e-3},
        "base": {"path": str(base.path), "compute_dtype": "float32"},
        "training": {"max_memory_bytes": 2**34},
        "conditions": {"max_minutes_per_day": 1000.0},
    }
    return {name: values.get(name, {}) | sections.get(name, {}) for name in {**values, **sections}}


@dataclass
class Owned:
    """One device of a test, and what was turned and heard."""

    device: Device
    conditions: Turning
    heard: Heard
    folder: Path

    @property
    def login_key_pem(self) -> bytes:
        own = self.device._membership.enrolled()
        return own.login_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def device_key(self) -> bytes:
        return self.device._membership.enrolled().identity.certificate.device_key


def enrol(device: Device, folder: Path, name: str = "anna") -> None:
    """As its operator would."""
    from fedmini.secagg import device_keys

    keys = device_keys.read(device.public_keys)
    certificate = trust.certify(operator(), name, keys.device_key)
    device.enrol(trust_text.write_certificate(certificate), operator_pub())


def operator_pub() -> bytes:
    return signing_keys.write_public(operator().public_key().public_bytes_raw())


def accept(folder: Path, manifest: Manifest, config: dict[str, Any]) -> None:
    """As `fedmini device accept` does, while the device is not open."""
    with enrolment.opened(folder, configuration.parse_device_config(config, "test")) as own:
        own.accept(signed(manifest))


def signed(manifest: Manifest, revocations: Revocations | None = None, by: Ed25519PrivateKey | None = None):
    return signed_manifest.sign_manifest(by or operator(), manifest, revocations)


def offered(
    manifest: Manifest, revocations: Revocations | None = None, by: Ed25519PrivateKey | None = None
) -> Envelope:
    """The offer of a run."""
    return Envelope("offer", {}, offer.write(Offer(signed(manifest, by=by), (), revocations, None)))


def a_model(manifest: Manifest, seed: int = 0) -> dict[str, np.ndarray]:
    size = vectors.num_parameters(manifest.template)
    values = np.random.default_rng(seed).normal(0, 0.1, size).astype(np.float32)
    return vectors.unflatten(values, manifest.template)


Ask = Callable[[Envelope], Envelope | None]


@dataclass
class Round:
    """A round of one real device and three peers of this process: what was asked and answered, by stage."""

    manifest: Manifest
    ask: Ask
    trust: Trust = field(default_factory=lambda: tiny_trust.trust_in(operator()))
    answers: dict[Stage, Envelope | None] = field(default_factory=dict)
    requests: dict[Stage, bytes] = field(default_factory=dict)
    was_debited: bool = False
    before: Callable[[Stage], None] = lambda stage: None

    def run(self, round_num: int, attempt: int = 0) -> CohortSum:
        """Raises CohortError where too few are left."""
        members = {name: self._peer(name) for name in PEERS}

        def exchange(stage: Stage, requests: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
            for device, request in requests:
                if device in members:
                    yield device, members[device].answer(request)
                    continue
                self.before(stage)
                self.requests[stage] = request
                fields = {"manifest": self.manifest.hash, "stage": stage.name}
                answer = self.answers[stage] = self.ask(Envelope("request", fields, request))
                if answer is not None and answer.kind == "answer":
                    yield device, answer.payload

        def debit(roster: Any) -> None:
            self.was_debited = True

        task = TrainTask(self.manifest.hash, round_num, attempt, a_model(self.manifest))
        return SecureSum(self.manifest, self.trust, exchange)(("anna", *PEERS), task, debit)

    def _peer(self, name: str) -> Member:
        zeros = np.zeros(self.manifest.num_coordinates, np.uint32)
        agreed = Agreed(name, self.manifest, self.trust)
        identity = tiny_trust.enrol(operator(), name)
        return Member(identity, ForThisProcess(agreed), lambda task: Contribution(zeros), None)

    def reason(self, stage: Stage) -> tuple[object, object]:
        """The code and the reason of a refusal."""
        answer = self.answers[stage]
        assert answer is not None and answer.kind == "refusal", answer
        return answer.fields["code"], answer.fields["reason"]


def failure(action: Callable[[], object]) -> FedMiniError | None:
    try:
        action()
    except FedMiniError as error:
        return error
    return None
