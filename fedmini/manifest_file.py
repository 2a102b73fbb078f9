"""A manifest as a file: the very bytes that `Manifest.hash` hashes, and back, with every field in its range.

What is in range can still be a bad bargain: whether a device agrees to it is decided in floors.py.
"""

import math
from functools import cache
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from fedmini.errors import UpdateError
from fedmini.types import Manifest, Unit

MAX_BYTES = 2**20
MAX_COORDINATES = 2**26  # a device's upload is then 256 MiB


def _each_unit_once(budgets: tuple[tuple[Unit, float], ...]) -> tuple[tuple[Unit, float], ...]:
    if len({unit for unit, _ in budgets}) != len(budgets):
        raise ValueError("target_epsilon has two budgets for one unit")
    return budgets


Positive = Annotated[float, Field(gt=0, le=1e6)]
Wide = Annotated[float, Field(gt=0, le=1e15)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Budgets = Annotated[tuple[tuple[Unit, Positive], ...], Field(max_length=2), AfterValidator(_each_unit_once)]
Name = Annotated[str, Field(pattern=r"^[!-~]{1,200}$")]


def canonical(manifest: Manifest) -> bytes:
    """The bytes whose SHA-256 is the manifest's hash: JSON of every field, sorted, without spaces."""
    return manifest.canonical


def parse(content: bytes) -> Manifest:
    """The manifest in these bytes; `canonical` gives exactly them back.

    Raises UpdateError for a field that is missing, unknown, of another type or out of range, and for another spelling
    of the same manifest (spaces, another order of keys or form of a number, a newline at the end).
    """
    if len(content) > MAX_BYTES:
        raise UpdateError(f"expected a manifest of at most {MAX_BYTES} bytes, got {len(content)}")
    try:
        _Manifest.model_validate_json(content)
        manifest: Manifest = _adapter().validate_json(content, strict=True)
    except ValidationError as error:
        raise UpdateError(f"this is no manifest that fedmini wrote: {_explain(error)}") from None
    if canonical(manifest) != content:
        raise UpdateError("the manifest is not in its one form: take the file as `fedmini plan --manifest` wrote it")
    return manifest


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _explain(error: ValidationError) -> str:
    """The first problem, in words of ours and the library's: never what the file says."""
    problem = error.errors(include_url=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        return "it is not JSON"
    *where, last = problem["loc"] or ("the whole",)
    if problem["type"] == "extra_forbidden":
        return f"{'.'.join(map(str, where)) or 'the manifest'} has a key that is unknown here: is fedmini up to date?"
    return f"{'.'.join(map(str, [*where, last]))}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


class _Fields(BaseModel):
    """The ranges of a dataclass in types/plans.py, field for field; tests/test_manifest_file.py compares the names."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _LoraShape(_Fields):
    lora_rank: Annotated[int, Field(ge=1, le=1024)]
    lora_alpha: Positive
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1, max_length=64)]
    layers: Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], Field(max_length=1000)] | None
    trained: Literal["B", "AB"]
    seed: Seed


class _LocalPlan(_Fields):
    num_steps: Count
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    expected_batch_size: Positive
    learning_rate: Positive
    optimizer: Literal["sgd", "adam"]
    max_length: Annotated[int, Field(ge=8, le=2**20)]
    detach_prefix: bool


class _UnitPlan(_Fields):
    unit: Unit
    noise: Literal["local", "shared", "server"]
    clip_norm: Positive
    noise_multiplier: Positive
    scale: Wide
    noise_variance: Annotated[int, Field(ge=1, le=2**44)]
    num_shares: Count
    z_eff: Positive
    target_delta: Annotated[float, Field(gt=0, lt=1)]


class _ReleasePlan(_Fields):
    example: _UnitPlan | None
    device: _UnitPlan | None
    encoding_norm: Wide
    scale: Wide
    modulus_bits: Literal[24, 32]
    num_metrics: Annotated[int, Field(ge=0, le=16)]
    cohort_size: Count
    max_devices: Count
    min_survivors: Count
    n_honest: Count
    max_participations: Count
    max_releases: Count
    min_separation: Count

    @model_validator(mode="after")
    def _units_in_their_places(self) -> Self:
        for name in ("example", "device"):
            unit = getattr(self, name)
            if unit is not None and unit.unit != name:
                raise ValueError(f"{name} holds the plan of another unit")
        return self


class _EvaluationPlan(_Fields):
    every: Count
    fraction: Annotated[float, Field(gt=0, lt=1)]
    expected_examples: Positive
    num_evaluations: Count
    release: _ReleasePlan
    target_epsilon: Budgets


class _Manifest(_Fields):
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
    base_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    lora: _LoraShape
    template: Annotated[
        tuple[tuple[Name, Annotated[tuple[Count, ...], Field(min_length=1, max_length=4)]], ...],
        Field(min_length=1, max_length=8192),
    ]
    local: _LocalPlan
    release: _ReleasePlan
    num_rounds: Count
    target_epsilon: Budgets
    evaluation: _EvaluationPlan | None = None

    @model_validator(mode="after")
    def _each_name_once(self) -> Self:
        names = [name for name, _ in self.template]
        if names != sorted(set(names)):
            raise ValueError("template is not sorted by name, or has a name twice")
        if sum(math.prod(shape) for _, shape in self.template) > MAX_COORDINATES:
            raise ValueError(f"template has more than {MAX_COORDINATES} coordinates")
        return self
