"""The server's side of rounds with one real device: its run's manifest, its enrolled folder, and peers that answer at once."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmini import config as configuration
from fedmini import enrolment, offer, operator_keys, planning
from fedmini.enrolment import records
from fedmini.flower.codec import Envelope
from fedmini.member import ForThisProcess, Member
from fedmini.model import loading, runtime
from fedmini.model.lora import LoraModel
from fedmini.offer import Offer
from fedmini.secagg import device_keys, signed_manifest, signing_keys, trust
from fedmini.secagg.checks import Agreed
from fedmini.secagg.trust import Identity, Trust
from fedmini.secure_sum import SecureSum
from fedmini.store import ExampleStore, StoredExample
from fedmini.types import Contribution, TrainTask

PEERS = ("ben", "carl", "dora")
STAGE_S = 240.0
LORA = {
    "chat": {"lora_rank": 4, "lora_alpha": 8.0, "target_modules": ["v_proj"], "layers": list(range(10, 30))},
    "top": {"lora_rank": 8, "lora_alpha": 16.0, "target_modules": ["q_proj", "v_proj"], "layers": list(range(20, 30))},
    "all": {
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One step: who is adapted (a key of LORA), and how much is trained on."""

    lora: str
    batch: int
    tokens: int
    rounds: int


def plan(shape: Shape) -> Any:
    """The manifest of a run whose every step draws exactly the device's examples."""
    config = configuration.parse_run_config(
        {
            "run": {"name": "memory"},
            "base": {"name": "smollm2-135m-q4"},
            "lora": LORA[shape.lora],
            "data": {
                "source": "in memory",
                "min_examples": 1,
                "max_examples_per_device": shape.batch,
                "held_out_devices": 1,
            },
            "local": {"sampling_rate": 1.0, "max_length": shape.tokens},
            "rounds": {"num_rounds": 50, "cohort_size": 4, "min_survivors": 4, "max_participations": 50},
            "privacy": {"example": {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 8.0, "target_delta": 1e-5}},
        }
    )
    cache_dir = runtime.default_cache_dir()
    model = LoraModel(loading.load_base(config.base, cache_dir, lambda note: None), planning.lora_shape(config))
    return planning.make_manifest(config, "memory-1", planning.Base(model.fingerprint, model.template), cache_dir)


def device_config(manifest: Any, training: Mapping[str, Any]) -> dict[str, Any]:
    """A device that may train whatever this machine does."""
    return {
        "device": {"lifetime_epsilon": 1000.0, "lifetime_delta": 1e-3},
        "training": {"max_memory_bytes": 2**34, "physical_batch_size": 16, **training},
        "conditions": {
            "on_power": False,
            "idle": False,
            "unmetered": False,
            "max_temperature_c": None,
            "min_free_memory_bytes": 0,
            "max_minutes_per_day": None,
        },
        "consent": {"manifests": [manifest.hash]},
    }


def lay_out(folder: Path, operator: Any, manifest: Any, shape: Shape) -> Any:
    """An enrolled device's folder with enough examples, long enough to be cut; its login key."""
    operator_keys.create_device(folder)
    keys = device_keys.read(operator_keys.read_file(folder / records.PUBLIC_KEYS))
    certificate = trust.certify(operator, "anna", keys.device_key)
    enrolment.enrol(folder, certificate, signing_keys.public_bytes(operator))
    text = " ".join(f"number {number} is followed by {number + 1}" for number in range(shape.tokens))
    with ExampleStore.open(folder / "examples", configuration.StoreSection(), find_keyring=lambda: None) as store:
        store.add_many(StoredExample(f"{index} {text}") for index in range(shape.batch))
    with enrolment.opened(folder, configuration.DeviceConfig()) as own:
        return own.login_key


@dataclass
class Federation:
    """The server's side of rounds with one device over the network and peers in this process."""

    link: Any
    node: int
    operator: Any
    manifest: Any

    def run(self, round_num: int) -> None:
        """One round; RuntimeError where the device does not answer."""
        manifest, believed = self.manifest, Trust(signing_keys.public_bytes(self.operator))
        zeros = np.zeros(manifest.num_coordinates, np.uint32)
        members = {}
        for name in PEERS:
            key = signing_keys.draw()
            identity = Identity(key, trust.certify(self.operator, name, signing_keys.public_bytes(key)))
            agreed = ForThisProcess(Agreed(name, manifest, believed))
            members[name] = Member(identity, agreed, lambda task: Contribution(zeros), None)
        self._offer()

        def exchange(stage: Any, requests: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
            for name, request in requests:
                if name in members:
                    yield name, members[name].answer(request)
                    continue
                envelope = self._envelope("request", {"manifest": manifest.hash, "stage": stage.name}, request)
                yield name, self._ask(envelope).payload

        adapter = {name: np.zeros(shape, np.float32) for name, shape in manifest.template}
        task = TrainTask(manifest.hash, round_num, 0, adapter)
        found = SecureSum(manifest, believed, exchange)(("anna", *PEERS), task, lambda roster: None)
        if found.num_devices != 4:
            raise RuntimeError(f"{found.num_devices} of 4 devices stayed")

    def _offer(self) -> None:

        signed = signed_manifest.sign_manifest(self.operator, self.manifest, None)
        until = time.monotonic() + STAGE_S
        while self.node not in self.link.nodes():
            if time.monotonic() > until:
                raise RuntimeError("the device does not come")
            time.sleep(0.05)
        self._ask(self._envelope("offer", {}, offer.write(Offer(signed, (), None, None))))

    def _envelope(self, kind: str, fields: dict[str, Any], payload: bytes) -> Any:

        return Envelope(kind, fields, payload)

    def _ask(self, envelope: Any) -> Any:
        (name,) = self.link.send_all([(self.node, envelope)], STAGE_S)
        for reply in self.link.receive([name], time.monotonic() + STAGE_S):
            if reply.envelope is None or reply.envelope.kind == "refusal":
                raise RuntimeError(f"the device refused: {reply}")
            return reply.envelope
        raise RuntimeError("the device did not answer")
