"""RunConfig: one TOML file describes a run. Unknown keys are errors that name the key and the nearest valid one."""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmini.errors import ConfigError

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
    assumed_corrupt_fraction: Fraction = 0.0
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


class EvaluationSection(Section):
    source: str = "held_out"  # the people held out of a simulation, or a JSONL file
    every: Count = 1  # rounds
    max_examples: Count = 256


class SimulationSection(Section):
    num_threads: Annotated[int, Field(ge=0)] = 0  # 0: one for each core this process may use


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
        if self.data.held_out_devices == 0 and self.evaluation.source == "held_out":
            raise ValueError("data.held_out_devices is 0: hold people out, or give a file as evaluation.source")
        return self


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file, with `section.key=value` overrides applied on top.

    A relative file name inside it (data, base, evaluation) is taken from the file's own folder.
    Raises ConfigError, in one line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    return _absolute_paths(parse_run_config(values, str(path)), path.parent.resolve())


def parse_run_config(values: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """A RunConfig from a mapping. Raises ConfigError that names every wrong key, and the nearest valid one."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {'; '.join(_explain(problem) for problem in error.errors())}") from error


def dump_run_config(config: RunConfig) -> str:
    """The whole configuration as TOML, defaults included, such that `load_run_config` gives it back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set expects section.key=value, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {part} is a value, not a section")
    if value == "unset":
        table.pop(parts[-1], None)
    else:
        table[parts[-1]] = value


def _absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    def absolute(source: str) -> str:
        is_file = source.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst"))
        return str(folder / Path(source).expanduser()) if is_file else source

    base = config.base
    if base.path is not None:
        base = base.model_copy(update={"path": folder / base.path.expanduser()})
    return config.model_copy(
        update={
            "base": base,
            "data": config.data.model_copy(update={"source": absolute(config.data.source)}),
            "evaluation": config.evaluation.model_copy(update={"source": absolute(config.evaluation.source)}),
        }
    )


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
            return f"unknown key {where}: {hint}"
        case "missing":
            return f"{where} is missing"
        case "value_error":
            reason = str(problem["ctx"]["error"])
            return f"{where}: {reason}" if where else reason
        case _:
            got = problem["input"]
            shown = f", got {got!r}" if isinstance(got, bool | int | float | str) else ""
            return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}{shown}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        candidates = [section.model_fields[str(part)].annotation]
        candidates += getattr(candidates[0], "__args__", ())
        section = next(item for item in candidates if isinstance(item, type) and issubclass(item, Section))
    return list(section.model_fields)
