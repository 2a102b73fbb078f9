"""What a run's file may say: one frozen section for each table, with its defaults, ranges and forbidden combinations."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A table of the file: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


class RunSection(Section):
    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")]
    seed: Annotated[int, Field(ge=0)] | None = None  # simulation only: reproducible, and therefore private from nobody


class BaseSection(Section):
    name: str | None = None  # a packaged base, such as "smollm2-135m-q4"
    path: Path | None = None  # a local GGUF file or transformers folder
    hub_id: str | None = None
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["auto", "packed", "nf4", "int8", "dense"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("name", "path", "hub_id") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of name, path, hub_id; got {', '.join(given) or 'none'}")
        return self


class LoraSection(Section):
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 4
    lora_alpha: Positive = 8.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("v_proj", "o_proj")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # None: every layer
    trained: Literal["B", "AB"] = "B"
    seed: Annotated[int, Field(ge=0)] = 0


class DataSection(Section):
    source: str  # a named data set, or a JSONL file (.jsonl, .jsonl.gz, .jsonl.zst)
    max_examples_per_device: Count = 200
    min_examples: Count = 1
    max_devices: Count | None = None
    held_out_devices: Annotated[int, Field(ge=0)] = 0
    template: Literal["chat", "text"] = "chat"
    split: Literal["people", "dirichlet"] = "people"
    num_devices: Count | None = None  # dirichlet only
    dirichlet_concentration: Positive = 1.0
    split_seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_examples > self.max_examples_per_device:
            raise ValueError("min_examples is above max_examples_per_device: no device could take part")
        if (self.split == "dirichlet") != (self.num_devices is not None):
            raise ValueError('num_devices goes with split = "dirichlet", and only with it')
        return self


class LocalSection(Section):
    num_steps: Count = 1
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    expected_batch_size: Positive | None = None  # None: sampling_rate * max_examples_per_device
    learning_rate: Positive = 1.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    max_length: Annotated[int, Field(ge=8)] = 128
    detach_prefix: bool = False  # hold the template's fixed beginning constant: cheaper, no gradient through it
    physical_batch_size: Count = 16  # examples in memory at once; changes nothing but memory and speed
    checkpointing: bool = False  # recompute activations in backward: less memory, a third more time
    loss_chunk_tokens: Count = 256  # positions whose logits exist at once

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.detach_prefix and self.checkpointing:
            raise ValueError("detach_prefix and checkpointing can't be true together: choose one")
        return self


class RoundsSection(Section):
    num_rounds: Count
    spare_attempts: Annotated[int, Field(ge=0)] = 0
    cohort_size: Count
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.0
    min_survivors: Count | None = None  # None: cohort_size
    assumed_corrupt_fraction: Fraction = (
        0.0  # of min_survivors, rounded up to devices; with shared noise a third at most
    )
    max_participations: Count | None = None  # None: every round
    min_separation: Count = 1
    server_optimizer: Literal["average", "momentum", "adam"] = "average"
    server_learning_rate: Positive = 1.0
    server_momentum: Fraction = 0.9
    server_second_moment: Fraction = 0.99
    server_decay: Literal["none", "linear", "cosine"] = "none"
    dropout_rate: Fraction = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_survivors is not None and self.min_survivors > self.cohort_size:
            raise ValueError(f"min_survivors = {self.min_survivors} is above cohort_size = {self.cohort_size}")
        if self.max_participations is not None and self.max_participations > self.num_rounds:
            raise ValueError(f"max_participations = {self.max_participations} is above num_rounds = {self.num_rounds}")
        return self


class UnitPrivacy(Section):
    """How one kind of unit is protected; `noise` says where the noise comes from."""

    clip_norm: Positive
    target_epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    target_delta: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of target_epsilon and noise_multiplier")
        return self


class ExamplePrivacy(UnitPrivacy):
    noise: Literal["local", "shared"]


class DevicePrivacy(UnitPrivacy):
    noise: Literal["shared", "server"]


class PrivacySection(Section):
    none: bool = False  # true: no privacy at all, said loudly everywhere
    example: ExamplePrivacy | None = None
    device: DevicePrivacy | None = None

    @model_validator(mode="after")
    def _allowed_combination(self) -> Self:
        protected = self.example is not None or self.device is not None
        if self.none and protected:
            raise ValueError("none = true stands beside [privacy.example] or [privacy.device]: remove one of the two")
        if not self.none and not protected:
            raise ValueError("add [privacy.example] or [privacy.device], or say none = true to train without privacy")
        if self.example is not None and self.device is not None and self.example.noise == "shared":
            raise ValueError(
                '[privacy.example] noise = "shared" can\'t stand beside [privacy.device]: use noise = "local" there'
            )
        return self


class DeviceEvaluationSection(Section):
    """Devices measure the loss on what they hold back from training: a release of its own, noised as the run's is."""

    every: Count = 1  # rounds; before the first and after the last one too
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of a device's examples
    target_epsilon: Positive | None = None  # of all evaluations together, beside the training's
    noise_multiplier: Positive | None = None


class EvaluationSection(Section):
    source: str = "held_out"  # the people held out of a simulation, or a JSONL file
    every: Count = 1  # rounds
    max_examples: Count = 256
    devices: DeviceEvaluationSection | None = None  # None: nobody evaluates on a device


class SimulationSection(Section):
    num_threads: Annotated[int, Field(ge=0)] = 0  # of each process; 0: one for each core, where there are workers one
    # Form every sum by secure aggregation, all of it in this process, to the bits of devices_per_batch = 1.
    secure: bool = False
    workers: Annotated[int, Field(ge=0)] = 0  # processes that train; 0: one for each core, or this one for a short run
    # How many compute in one forward and backward: their gradients differ from those of one device after the other by
    # float rounding. 1: one after the other, as under `secure` and in a deployment, and to the same bits. 0: as fits.
    devices_per_batch: Annotated[int, Field(ge=0)] = 0
    # Of what layers below the adapted ones say of examples, in the memory of each process; 0: computed anew each time.
    # It pays where examples are drawn several times in a run; gradients differ by float rounding.
    max_hidden_bytes: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_by_one_where_secure(self) -> Self:
        if self.secure and (self.workers > 1 or self.devices_per_batch > 1):
            raise ValueError(
                "with secure = true devices contribute one after the other, in this process: workers and "
                f"devices_per_batch must be 1 there, or left out; got {self.workers} and {self.devices_per_batch}"
            )
        return self


class RunConfig(Section):
    """One run, as its TOML file describes it."""

    run: RunSection
    base: BaseSection
    lora: LoraSection = LoraSection()
    data: DataSection
    local: LocalSection
    rounds: RoundsSection
    privacy: PrivacySection
    evaluation: EvaluationSection = EvaluationSection()
    simulation: SimulationSection = SimulationSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        example = self.privacy.example
        if example is not None and example.noise == "shared":
            if self.local.num_steps != 1:
                raise ValueError(
                    'local.num_steps must be 1 where [privacy.example] noise = "shared": '
                    f"a sum of gradients is released, not a trained adapter; got {self.local.num_steps}"
                )
            if self.local.optimizer != "sgd":
                raise ValueError(
                    'local.optimizer must be "sgd" where [privacy.example] noise = "shared": '
                    'there is no local optimizer; choose rounds.server_optimizer = "adam" instead'
                )
        self._check_device_evaluation()
        if self.data.held_out_devices == 0 and self.evaluation.source == "held_out":
            raise ValueError("data.held_out_devices is 0: hold people out, or give a file as evaluation.source")
        return self

    def _check_device_evaluation(self) -> None:
        """Its noise is the run's kind, against whom it holds too: so there is none where each device trusts itself alone."""
        section, example = self.evaluation.devices, self.privacy.example
        if section is None:
            return
        if example is not None and example.noise == "local":
            raise ValueError(
                '[evaluation.devices] can\'t stand beside [privacy.example] noise = "local": its noise would be shared, which '
                "trusts the other devices, and the run's does not; remove it"
            )
        num_given = sum(value is not None for value in (section.target_epsilon, section.noise_multiplier))
        if num_given != (0 if self.privacy.none else 1):
            raise ValueError(
                "[evaluation.devices] needs exactly one of target_epsilon and noise_multiplier"
                + (", and neither where [privacy] none = true" if self.privacy.none else "")
            )
