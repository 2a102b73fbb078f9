"""What a run's devices agree to: the plans, and the manifest that holds them all."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np

Template: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape) of an adapter's tensors, sorted by name
Unit: TypeAlias = Literal["example", "device"]
NoiseSource: TypeAlias = Literal["local", "shared", "server"]
LocalOptimizer: TypeAlias = Literal["sgd", "adam"]

ADJACENCY: Mapping[Unit, str] = {
    "example": "one example of a device's frozen training set added or removed",
    "device": "one device's contribution to the run replaced by zero",
}


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Which LoRA tensors a run trains, and from which seed the frozen ones are drawn."""

    lora_rank: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    layers: tuple[int, ...] | None  # None: every layer
    trained: Literal["B", "AB"]
    seed: int


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """What one device computes in one round."""

    num_steps: int
    sampling_rate: float  # Poisson, the same on every device
    expected_batch_size: float  # a public constant: never what a device really drew
    learning_rate: float
    optimizer: LocalOptimizer
    max_length: int  # tokens
    detach_prefix: bool  # no gradient through what the chat template puts before every prompt


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """How one kind of unit is protected: one row of the privacy table in docs/accounting.md."""

    unit: Unit
    noise: NoiseSource
    clip_norm: float
    noise_multiplier: float  # as configured or calibrated, before rounding and discretisation: see `z_eff`
    scale: float  # integers per unit of the vector: clip_norm * scale is 2**13 or 2**14
    noise_variance: int  # of one share of discrete Gaussian noise, in squared integer units
    num_shares: int  # honest shares that are counted on: n_honest where noise is shared, else 1
    z_eff: float  # the effective Gaussian multiplier that the accountant is given
    target_delta: float


@dataclass(frozen=True, slots=True)
class ReleasePlan:
    """How an update leaves a device. Every number is public and fixed for the run."""

    example: UnitPlan | None
    device: UnitPlan | None
    encoding_norm: float  # the L2 norm of the float vector that travels never passes this
    scale: float
    modulus_bits: int
    num_metrics: int  # bounded metric coordinates behind the adapter's, 0 where nothing would noise them
    cohort_size: int
    max_devices: int  # in one round: what the modulus has room for
    min_survivors: int
    n_honest: int
    max_participations: int
    max_releases: int  # of one device: its participations, and the attempts that may be lost
    min_separation: int

    @property
    def units(self) -> tuple[UnitPlan, ...]:
        """The protected units, the example first; empty where nothing is protected."""
        return tuple(unit for unit in (self.example, self.device) if unit is not None)

    def plan_of(self, unit: Unit) -> UnitPlan | None:
        """How one kind of unit is protected; None where it isn't."""
        return self.example if unit == "example" else self.device

    @property
    def sums_examples(self) -> bool:
        """Whether the vector that travels is a sum of rounded per-example gradients (`example`, `shared`)."""
        return self.example is not None and self.example.noise == "shared"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """How devices measure the loss on examples that they hold back from training: a release of its own."""

    every: int  # rounds; before the first and after the last one too
    fraction: float  # of a device's examples: each is held back or not by a hash of itself
    expected_examples: float  # of one device, a public constant: never what a device really holds back
    num_evaluations: int  # in the whole run, and so at most of one device
    release: ReleasePlan
    target_epsilon: tuple[tuple[Unit, float], ...]


EVALUATION_SUFFIX = ":evaluation"  # no run's own id has a colon in it


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a device must agree to, once; later tasks refer to it by hash."""

    run_id: str
    base_fingerprint: str
    lora: LoraShape
    template: Template
    local: LocalPlan
    release: ReleasePlan
    num_rounds: int
    target_epsilon: tuple[tuple[Unit, float], ...]  # the budget of each protected unit
    evaluation: EvaluationPlan | None = None  # on devices; None: they measure nothing beside their training

    @property
    def num_trained(self) -> int:
        """Coordinates of the update in the vector that travels; the metrics' stand behind them."""
        return sum(int(np.prod(shape)) for _, shape in self.template)

    @property
    def num_coordinates(self) -> int:
        """Coordinates of the vector that travels: the update's and the metrics'."""
        return self.num_trained + self.release.num_metrics

    @property
    def canonical(self) -> bytes:
        """JSON of every field, sorted, without spaces; of the evaluation only where there is one."""
        record = asdict(self)
        if self.evaluation is None:
            del record["evaluation"]
        return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def parts(self) -> tuple["Manifest", ...]:
        """What a device releases under this: the training, and the evaluations where there are any."""
        evaluated = self.for_evaluation
        return (self,) if evaluated is None else (self, evaluated)

    @property
    def for_evaluation(self) -> "EvaluationManifest | None":
        """What devices go by that evaluate on their own examples, as it follows from this; None where none do."""
        plan = self.evaluation
        if plan is None:
            return None
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        local = LocalPlan(
            num_steps=1,
            sampling_rate=1.0,
            expected_batch_size=plan.expected_examples,
            learning_rate=1.0,
            optimizer="sgd",
            max_length=self.local.max_length,
            detach_prefix=self.local.detach_prefix,
        )
        changed = {
            "run_id": self.run_id + EVALUATION_SUFFIX,
            "local": local,
            "release": plan.release,
            "num_rounds": plan.num_evaluations,
            "target_epsilon": plan.target_epsilon,
        }
        return EvaluationManifest(**(values | changed))


@dataclass(frozen=True, slots=True)
class EvaluationManifest(Manifest):
    """A run's evaluations as a run of their own, of which nothing is learnt: only metrics travel.

    Its rounds are the evaluations, counted from 1. It is never signed or sent: each side makes it from the run's manifest.
    """

    @property
    def num_trained(self) -> int:
        """None: the adapter goes to the devices, and no update comes back."""
        return 0

    @property
    def for_evaluation(self) -> None:
        """Nothing: an evaluation is not evaluated."""
        return None
