"""From a configuration to the manifest that a run's devices agree to: noise calibrated, encoding sized to it."""

import math
from dataclasses import dataclass
from pathlib import Path

from fedmini import evaluation_planning, metrics, vectors
from fedmini.config import DevicePrivacy, ExamplePrivacy, RunConfig
from fedmini.errors import ConfigError
from fedmini.privacy import accounting, encoding
from fedmini.privacy.accounting import CalibrationRequest, UnitRequest
from fedmini.secagg.checks import lowest_threshold
from fedmini.secagg.messages import MAX_DEVICES
from fedmini.server_step import ServerPlan, num_asked
from fedmini.types import LocalPlan, LoraShape, Manifest, NoiseSource, ReleasePlan, Template, Unit, UnitPlan

PLAIN_NORM = 64.0  # range of an update that nothing clips: only the encoding needs one


@dataclass(frozen=True, slots=True)
class Base:
    """What a plan has to know of the base model: which it is, and the LoRA tensors on it."""

    fingerprint: str
    template: Template


def lora_shape(config: RunConfig) -> LoraShape:
    """The LoRA tensors that a configuration asks for."""
    lora = config.lora
    return LoraShape(lora.lora_rank, lora.lora_alpha, lora.target_modules, lora.layers, lora.trained, lora.seed)


def server_plan(config: RunConfig) -> ServerPlan:
    """What the server does with a sum, as configured."""
    rounds = config.rounds
    return ServerPlan(
        over_selection=rounds.over_selection,
        spare_attempts=rounds.spare_attempts,
        optimizer=rounds.server_optimizer,
        learning_rate=rounds.server_learning_rate,
        momentum=rounds.server_momentum,
        second_moment=rounds.server_second_moment,
        decay=rounds.server_decay,
    )


def make_manifest(config: RunConfig, run_id: str, base: Base, cache_dir: Path | None) -> Manifest:
    """The manifest of a run: noise calibrated or taken as given, encoding sized to it. Calibration is kept in `cache_dir`.

    Raises ConfigError where the settings can't work together.
    """
    local = _local_plan(config)
    num_metrics = _num_metrics(config)
    num_coordinates = vectors.num_parameters(base.template) + num_metrics
    sections = _protected(config)
    units = {unit: _plan_unit(unit, section, config, num_coordinates, cache_dir) for unit, section in sections}
    budgets = tuple((unit, section.target_epsilon) for unit, section in sections if section.target_epsilon is not None)
    release = _release_plan(config, local, units, num_coordinates, num_metrics)
    return Manifest(
        run_id=run_id,
        base_fingerprint=base.fingerprint,
        lora=lora_shape(config),
        template=base.template,
        local=local,
        release=release,
        num_rounds=config.rounds.num_rounds,
        target_epsilon=budgets,
        evaluation=evaluation_planning.plan_evaluation(config, release, cache_dir),
    )


def num_releases(config: RunConfig) -> int:
    """How many releases one device can be in, at most: abandoned attempts count for everybody.

    Kills of an unseeded run can make it more: each is one more debit, and the budget is checked all the same.
    """
    rounds = config.rounds
    spread = math.ceil(rounds.num_rounds / rounds.min_separation)
    return min(rounds.max_participations or rounds.num_rounds, spread) + rounds.spare_attempts


def _protected(config: RunConfig) -> list[tuple[Unit, ExamplePrivacy | DevicePrivacy]]:
    found: list[tuple[Unit, ExamplePrivacy | DevicePrivacy]] = []
    if config.privacy.example is not None:
        found.append(("example", config.privacy.example))
    if config.privacy.device is not None:
        found.append(("device", config.privacy.device))
    return found


def _local_plan(config: RunConfig) -> LocalPlan:
    local, devices = config.local, config.evaluation.devices
    num_trained_on = config.data.max_examples_per_device * (1 - devices.fraction if devices is not None else 1)
    return LocalPlan(
        num_steps=local.num_steps,
        sampling_rate=local.sampling_rate,
        expected_batch_size=local.expected_batch_size or local.sampling_rate * num_trained_on,
        learning_rate=local.learning_rate,
        optimizer=local.optimizer,
        max_length=local.max_length,
        detach_prefix=local.detach_prefix,
    )


def _num_metrics(config: RunConfig) -> int:
    """Metrics travel only where something noises them, or where nothing is private anyway."""
    example = config.privacy.example
    return 0 if example is not None and example.noise == "local" else len(metrics.NAMES)


def _n_honest(config: RunConfig) -> int:
    rounds = config.rounds
    least = rounds.min_survivors or rounds.cohort_size
    n_honest = math.floor(least * (1 - rounds.assumed_corrupt_fraction) + 1e-9)
    if n_honest < 1:
        raise ConfigError(
            f"min_survivors = {least} and assumed_corrupt_fraction = {rounds.assumed_corrupt_fraction} leave no honest "
            "device to count on: raise the one or lower the other"
        )
    return n_honest


def _check_corrupt(config: RunConfig, n_honest: int) -> None:
    """Raise ConfigError where shared noise counts on a sum that more corrupt devices than that could take apart."""
    least = config.rounds.min_survivors or config.rounds.cohort_size
    shared = [section for _, section in _protected(config) if section.noise == "shared"]
    if shared and 3 * (least - n_honest) > least:
        raise ConfigError(
            f"{least - n_honest} of min_survivors = {least} devices may be corrupt by rounds.assumed_corrupt_fraction, and "
            "secure aggregation holds against a third at most: lower it"
        )


def _check_secure(config: RunConfig) -> None:
    """Raise ConfigError where secure aggregation could not end a round that the run's own settings allow."""
    rounds = config.rounds
    most_asked = num_asked(rounds.cohort_size, rounds.over_selection)
    if most_asked > MAX_DEVICES:
        raise ConfigError(
            f"secure aggregation takes at most {MAX_DEVICES} devices a round, rounds.cohort_size * rounds.over_selection "
            f"is {most_asked}: lower one of the two, or leave --secure (simulation.secure) away"
        )
    threshold, least = lowest_threshold(most_asked), rounds.min_survivors or rounds.cohort_size
    if least < threshold:
        raise ConfigError(
            f"of {most_asked} devices that are asked, secure aggregation needs {threshold} to stay, and min_survivors is "
            f"{least}: raise rounds.min_survivors, or lower rounds.over_selection"
        )


def _plan_unit(
    unit: Unit, section: ExamplePrivacy | DevicePrivacy, config: RunConfig, num_coordinates: int, cache_dir: Path | None
) -> UnitPlan:
    source: NoiseSource = section.noise
    multiplier = z_eff = None
    if section.noise_multiplier is not None:
        multiplier = section.noise_multiplier
    else:
        assert section.target_epsilon is not None
        steps = config.local.num_steps if unit == "example" else 1
        request = CalibrationRequest(
            target_epsilon=section.target_epsilon,
            target_delta=section.target_delta,
            sampling_rate=config.local.sampling_rate if unit == "example" else 1.0,
            num_compositions=num_releases(config) * steps,
        )
        z_eff = accounting.calibrate(request, cache_dir)
    return accounting.plan_unit(
        UnitRequest(
            unit=unit,
            noise=source,
            clip_norm=section.clip_norm,
            noise_multiplier=multiplier,
            z_eff=z_eff,
            num_coordinates=num_coordinates,
            num_shares=_n_honest(config) if source == "shared" else 1,
            target_delta=section.target_delta,
        )
    )


def _release_plan(
    config: RunConfig, local: LocalPlan, units: dict[Unit, UnitPlan], num_coordinates: int, num_metrics: int
) -> ReleasePlan:
    rounds = config.rounds
    _check_corrupt(config, _n_honest(config))
    if config.simulation.secure:
        _check_secure(config)
    example, device = units.get("example"), units.get("device")
    most_asked = num_asked(rounds.cohort_size, rounds.over_selection)
    most_drawn = max(local.expected_batch_size, local.sampling_rate * config.data.max_examples_per_device)
    travels = device if device is not None else example if example is not None and example.noise == "shared" else None
    if travels is not None:
        norm, scale = travels.clip_norm, travels.scale
        bits = encoding.modulus_bits(
            clip_norm=norm,
            scale=scale,
            num_devices=most_asked,
            expected_examples=most_drawn if travels.unit == "example" else None,
            noise_multiplier=travels.noise_multiplier,
            num_shares=travels.num_shares,
        )
    else:
        norm = PLAIN_NORM if example is None else _range_under_local_noise(local, example, num_coordinates)
        scale, bits = encoding.plain_scale(norm, most_asked), 32
    return ReleasePlan(
        example=example,
        device=device,
        encoding_norm=norm,
        scale=scale,
        modulus_bits=bits,
        num_metrics=num_metrics,
        cohort_size=rounds.cohort_size,
        max_devices=most_asked,
        min_survivors=rounds.min_survivors or rounds.cohort_size,
        n_honest=_n_honest(config),
        max_participations=rounds.max_participations or rounds.num_rounds,
        max_releases=num_releases(config),
        min_separation=rounds.min_separation,
    )


def _range_under_local_noise(local: LocalPlan, unit: UnitPlan, num_coordinates: int) -> float:
    """A norm that a device's noised steps all but never pass; what passes it is clipped, which costs no privacy."""
    if local.optimizer == "adam":  # a step of Adam moves a coordinate by little more than the learning rate
        return 4 * local.learning_rate * local.num_steps * math.sqrt(num_coordinates)
    noise = math.sqrt(unit.noise_variance) / unit.scale * (math.sqrt(num_coordinates) + 6)
    signal = unit.clip_norm * (local.expected_batch_size + 10 * math.sqrt(local.expected_batch_size) + 10)
    return local.learning_rate * local.num_steps * (noise + signal) / local.expected_batch_size
