"""What a run will do, before it does: the manifest its devices agree to, and a forecast of what it costs."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from fedmini import metrics, vectors
from fedmini.config import RunConfig, UnitPrivacy
from fedmini.errors import ConfigError
from fedmini.privacy import accounting, encoding
from fedmini.privacy.accounting import CalibrationRequest, UnitRequest
from fedmini.rounds import event_of
from fedmini.server_step import ServerPlan
from fedmini.sums import download_bytes, mean_denominator, noise_std_of_sum, upload_bytes
from fedmini.types import LocalPlan, LoraShape, Manifest, NoiseSource, ReleasePlan, Template, Unit, UnitPlan

PLAIN_NORM = 64.0  # range of an update that nothing clips: only the encoding needs one
PLAIN_LEVELS = 2**20  # integers per range, for vectors that need no integer noise; less where many devices are summed
NOISE_TO_SIGNAL_LIMIT = 3.0


@dataclass(frozen=True, slots=True)
class Base:
    """What a plan has to know of the base model: which it is, and the LoRA tensors on it."""

    fingerprint: str
    template: Template


@dataclass(frozen=True, slots=True)
class UnitForecast:
    """What one kind of unit can count on at the end of a run."""

    plan: UnitPlan
    num_releases: int  # that one unit is in, at most, spare attempts included
    epsilon: float
    epsilon_lone: float | None  # were all other devices of every cohort the adversary's; None where nothing is shared


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will cost and whether its noise will drown what it learns."""

    units: tuple[UnitForecast, ...]
    noise_to_signal: float | None  # norm of the noise in the mean over the largest norm a mean can have
    cohort_needed: int | None  # devices that would bring it down to NOISE_TO_SIGNAL_LIMIT; None where it is below
    rank_needed: int | None  # LoRA rank that would; None where it is below, or no rank would
    num_coordinates: int
    upload_bytes_per_device: int
    download_bytes_per_device: int


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
    units = {
        unit: _plan_unit(unit, section, config, num_coordinates, cache_dir)
        for unit, section in (("example", config.privacy.example), ("device", config.privacy.device))
        if section is not None
    }
    budgets = tuple(
        (unit, section.target_epsilon)
        for unit, section in (("example", config.privacy.example), ("device", config.privacy.device))
        if section is not None and section.target_epsilon is not None
    )
    return Manifest(
        run_id=run_id,
        base_fingerprint=base.fingerprint,
        lora=lora_shape(config),
        template=base.template,
        local=local,
        release=_release_plan(config, local, units, num_coordinates, num_metrics),
        num_rounds=config.rounds.num_rounds,
        target_epsilon=budgets,  # type: ignore[arg-type]
    )


def forecast(manifest: Manifest, config: RunConfig) -> Forecast:
    """What a run of this manifest will cost, if all goes well; its spare attempts are counted as used."""
    release = manifest.release
    ratio = _noise_to_signal(manifest)
    is_drowned = ratio is not None and ratio > NOISE_TO_SIGNAL_LIMIT
    return Forecast(
        units=tuple(_unit_forecast(unit, manifest, config) for unit in release.units),
        noise_to_signal=ratio,
        cohort_needed=_cohort_needed(manifest, ratio) if is_drowned and ratio is not None else None,
        rank_needed=_rank_needed(manifest, ratio) if is_drowned and ratio is not None else None,
        num_coordinates=manifest.num_coordinates,
        upload_bytes_per_device=upload_bytes(manifest),
        download_bytes_per_device=download_bytes(manifest),
    )


def num_releases(config: RunConfig) -> int:
    """How many rounds one device can be in, at most: abandoned attempts count for everybody."""
    rounds = config.rounds
    spread = math.ceil(rounds.num_rounds / rounds.min_separation)
    return min(rounds.max_participations or rounds.num_rounds, spread) + rounds.spare_attempts


def _local_plan(config: RunConfig) -> LocalPlan:
    local = config.local
    return LocalPlan(
        num_steps=local.num_steps,
        sampling_rate=local.sampling_rate,
        expected_batch_size=local.expected_batch_size or local.sampling_rate * config.data.max_examples_per_device,
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


def _plan_unit(
    unit: Unit, section: UnitPrivacy, config: RunConfig, num_coordinates: int, cache_dir: Path | None
) -> UnitPlan:
    source: NoiseSource = section.noise  # type: ignore[attr-defined]
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
    example, device = units.get("example"), units.get("device")
    num_asked = math.ceil(rounds.cohort_size * rounds.over_selection)
    travels = device if device is not None else example if example is not None and example.noise == "shared" else None
    if travels is not None:
        norm, scale = travels.clip_norm, travels.scale
        bits = encoding.modulus_bits(
            clip_norm=norm,
            scale=scale,
            num_devices=num_asked,
            expected_examples=local.expected_batch_size if travels.unit == "example" else None,
            noise_multiplier=travels.noise_multiplier,
            num_shares=travels.num_shares,
        )
    else:
        norm = PLAIN_NORM if example is None else _range_under_local_noise(local, example, num_coordinates)
        scale, bits = min(PLAIN_LEVELS, 2**30 // num_asked) / norm, 32
    return ReleasePlan(
        example=example,
        device=device,
        encoding_norm=norm,
        scale=scale,
        modulus_bits=bits,
        num_metrics=num_metrics,
        cohort_size=rounds.cohort_size,
        min_survivors=rounds.min_survivors or rounds.cohort_size,
        n_honest=_n_honest(config),
        max_participations=rounds.max_participations or rounds.num_rounds,
        min_separation=rounds.min_separation,
    )


def _range_under_local_noise(local: LocalPlan, unit: UnitPlan, num_coordinates: int) -> float:
    """A norm that a device's noised steps all but never pass; what passes it is clipped, which costs no privacy."""
    if local.optimizer == "adam":  # a step of Adam moves a coordinate by little more than the learning rate
        return 4 * local.learning_rate * local.num_steps * math.sqrt(num_coordinates)
    noise = math.sqrt(unit.noise_variance) / unit.scale * (math.sqrt(num_coordinates) + 6)
    signal = unit.clip_norm * (local.expected_batch_size + 10 * math.sqrt(local.expected_batch_size) + 10)
    return local.learning_rate * local.num_steps * (noise + signal) / local.expected_batch_size


def _noise_to_signal(manifest: Manifest) -> float | None:
    """Norm of the noise in one round's mean over the largest norm its signal can have, at the planned cohort."""
    release = manifest.release
    if not release.units:
        return None
    std = noise_std_of_sum(manifest, release.cohort_size)
    if math.isnan(std):  # a local Adam: what its noise is against its signal is decided in the gradients
        assert release.example is not None
        std = math.sqrt(release.example.noise_variance * release.cohort_size) / release.example.scale
        return std * math.sqrt(manifest.num_coordinates) / (manifest.local.expected_batch_size * release.cohort_size)
    noise = std * math.sqrt(manifest.num_coordinates) / mean_denominator(manifest)
    return noise / _largest_mean(manifest)


def _largest_mean(manifest: Manifest) -> float:
    release, local = manifest.release, manifest.local
    if release.device is not None:
        return release.device.clip_norm
    assert release.example is not None
    if release.sums_examples:
        return release.example.clip_norm
    return release.example.clip_norm * local.learning_rate * local.num_steps


def _cohort_needed(manifest: Manifest, ratio: float) -> int:
    """Noise in a mean of n devices falls with n where each of them stands for its whole share, else with its root."""
    release = manifest.release
    excess = ratio / NOISE_TO_SIGNAL_LIMIT
    if any(unit.noise == "local" for unit in release.units):
        return math.ceil(release.cohort_size * excess**2)
    return math.ceil(release.cohort_size * excess)


def _rank_needed(manifest: Manifest, ratio: float) -> int | None:
    rank = math.floor(manifest.lora.lora_rank * (NOISE_TO_SIGNAL_LIMIT / ratio) ** 2)
    return rank if rank >= 1 else None


def _unit_forecast(unit: UnitPlan, manifest: Manifest, config: RunConfig) -> UnitForecast:
    event = event_of(unit, manifest)
    releases = num_releases(config)
    lone = None
    if unit.noise == "shared" and unit.num_shares > 1:
        bound = encoding.sensitivity(unit.clip_norm, unit.scale, manifest.num_coordinates)
        alone = accounting.effective_multiplier(unit.noise_variance, 1, bound)
        lone = accounting.epsilon(replace(event, z_eff=alone), releases, unit.target_delta)
    return UnitForecast(unit, releases, accounting.epsilon(event, releases, unit.target_delta), lone)
