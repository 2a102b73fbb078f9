"""A configuration made ready to run: base, people, devices and the manifest they agree to."""

import hashlib
import platform
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fedmini import data, planning, rounds, rundir
from fedmini.config import RunConfig
from fedmini.contributor import Contributor
from fedmini.errors import ConfigError, StateError
from fedmini.model import loading, runtime
from fedmini.model.lora import LoraModel
from fedmini.rundir import RunDirectory
from fedmini.simulation import automatic
from fedmini.simulation import devices as simulated
from fedmini.simulation.progress import Progress
from fedmini.types import DeviceId, EncodedExample, Manifest

Rows = Iterable[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """How to run, beside what to run."""

    resume: bool = False
    cache_dir: Path | None = None  # None: the user's cache folder
    on_progress: Callable[[Progress], None] = lambda progress: None


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a run needs that does not change while it goes on."""

    config: RunConfig  # with everything that was "auto" resolved
    run: rounds.Run
    model: LoraModel
    devices: Mapping[DeviceId, Contributor]
    evaluators: Mapping[DeviceId, Contributor]  # the same, measuring on what they hold back; empty where none do
    examples: Mapping[DeviceId, Sequence[EncodedExample]]
    held_out: tuple[EncodedExample, ...]
    evaluated_on: str  # in words
    environment: Mapping[str, Any]
    cache_dir: Path

    @property
    def for_evaluation(self) -> "Setup | None":
        """The same devices as those of the run's evaluations; None where it has none."""
        manifest, streams = self.run.manifest.for_evaluation, self.run.streams
        if manifest is None:
            return None
        run = replace(self.run, manifest=manifest, streams=lambda *purpose: streams("evaluation", *purpose))
        return replace(self, run=run, devices=self.evaluators)


def same_run(given: RunConfig, stored: RunConfig, directory: RunDirectory) -> RunConfig:
    """The stored configuration, where the given one asks for the same run. What is "auto" there may differ here."""
    asked = automatic.resolve(given, stored.base.compute_dtype, automatic.stored_choices(stored.simulation))
    if asked != stored:
        sections = [name for name in RunConfig.model_fields if getattr(asked, name) != getattr(stored, name)]
        raise StateError(
            f"{directory.path} holds another run (its {', '.join(sections)} settings differ, see {directory.config}): "
            "resume with its own settings, or choose another --output"
        )
    return stored


def set_up(config: RunConfig, rows: Rows | None, directory: RunDirectory, options: SimulationOptions) -> Setup:
    tell = options.on_progress
    cache_dir = options.cache_dir or runtime.default_cache_dir()
    num_threads = runtime.limit_threads(config.simulation.num_threads)
    tell(Progress("base", "loading the base model"))
    model, encoder = simulated.load_model(config, cache_dir, lambda note: tell(Progress("base", note)))
    base = model.base
    tell(Progress("data", "reading and encoding the examples"))
    population = data.load_population(config.data, rows)
    examples = {device: encoder.encode_all(found) for device, found in population.devices.items()}
    _check_population(examples, config)
    held_out = _evaluation_examples(config, population, encoder)
    if not held_out:
        raise ConfigError(
            "there is no example to evaluate on: in none of them a target fits local.max_length; "
            "hold out more people, or give another evaluation.source"
        )
    streams = simulated.streams_of(config.run.seed)
    stored = rundir.stored_manifest(directory) if options.resume else None
    run_id = stored["manifest"]["run_id"] if stored else f"{config.run.name}-{secrets.token_hex(4)}"
    manifest = planning.make_manifest(config, run_id, planning.Base(model.fingerprint, model.template), cache_dir)
    workers = automatic.num_workers(config, manifest, base.size_bytes) if base.accelerator.type == "cpu" else 1
    if workers > 1 and config.simulation.num_threads == 0:
        num_threads = runtime.limit_threads(1)
    config = automatic.resolve(
        config,
        str(base.compute_dtype).removeprefix("torch."),
        {
            "num_threads": num_threads,
            "workers": workers,
            "devices_per_batch": automatic.devices_per_batch(config, manifest),
        },
    )
    environment = _environment(base, examples, num_threads)
    if config.run.seed is not None:
        environment["seed"] = config.run.seed
    if stored:
        _check_unchanged(stored, manifest, environment, directory)
    return Setup(
        config=config,
        run=rounds.Run(
            manifest=manifest,
            server=planning.server_plan(config),
            population=lambda: tuple(examples),
            streams=streams,
            is_seeded=config.run.seed is not None,
            is_replayed=config.run.seed is not None,
        ),
        model=model,
        devices=simulated.contributors(examples, model, manifest, streams, config),
        evaluators=simulated.contributors(examples, model, manifest.for_evaluation, streams, config),
        examples=examples,
        held_out=held_out,
        evaluated_on=_evaluated_on(config),
        environment=environment,
        cache_dir=cache_dir,
    )


def _evaluated_on(config: RunConfig) -> str:
    if config.evaluation.source == "held_out":
        return f"{config.data.held_out_devices} people who took no part"
    return f"the examples of {config.evaluation.source}"


def _check_population(examples: Mapping[DeviceId, Sequence[EncodedExample]], config: RunConfig) -> None:
    needed = config.rounds.cohort_size
    if len(examples) < needed:
        raise ConfigError(
            f"{len(examples)} devices have at least data.min_examples = {config.data.min_examples} examples, "
            f"rounds.cohort_size is {needed}: lower one of the two"
        )


def _evaluation_examples(
    config: RunConfig, population: data.Population, encoder: data.Encoder
) -> tuple[EncodedExample, ...]:
    """At most `evaluation.max_examples`, spread evenly over the people held out."""
    most = config.evaluation.max_examples
    if config.evaluation.source != "held_out":
        return encoder.encode_all(data.load_evaluation(config.evaluation.source)[:most])
    people = [encoder.encode_all(found) for _, found in sorted(population.held_out.items())]
    longest = max((len(found) for found in people), default=0)
    turns = [found[index] for index in range(longest) for found in people if index < len(found)]
    return tuple(turns[:most])


def _environment(
    base: loading.Base, examples: Mapping[DeviceId, Sequence[EncodedExample]], num_threads: int
) -> dict[str, Any]:
    """What, beside the configuration, decides a seeded run's bits."""
    digest = hashlib.sha256()
    for name, found in sorted(examples.items()):
        digest.update(f"{name} {len(found)}\n".encode())
        for example in found:
            digest.update(np.asarray(example.tokens, np.int32).tobytes() + example.is_target.tobytes())
    return {
        "data_sha256": digest.hexdigest(),
        "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
        "accelerator": str(base.accelerator),
        "weights": base.weights,
        "num_threads": num_threads,
        "processor": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "opacus", "numpy")},
    }


def _check_unchanged(
    stored: Mapping[str, Any], manifest: Manifest, environment: Mapping[str, Any], directory: RunDirectory
) -> None:
    if stored["environment"].get("data_sha256") != environment["data_sha256"]:
        raise StateError(f"the examples are not those that {directory.path} began with: bring them back, or start anew")
    seed = environment.get("seed")
    if stored["environment"].get("seed") != seed:
        raise StateError(
            f"the run settings in {directory.config} were changed: {directory.path} began with another run.seed, or none; "
            "put it back"
        )
    changed = [key for key, value in environment.items() if stored["environment"].get(key) != value]
    if seed is not None and changed:
        raise StateError(
            f"a seeded run is replayed bit for bit, and {', '.join(changed)} in {directory.manifest} are not what is here "
            "now: go on where it began, or start anew in another --output"
        )
    if stored["hash"] != manifest.hash:
        raise StateError(
            f"the manifest in {directory.manifest} can't be made again from its settings: "
            "the base model or fedmini itself has changed; go on with the versions it began with"
        )


def base_name(config: RunConfig) -> str:
    base = config.base
    return base.hub_id or base.name or str(base.path)
