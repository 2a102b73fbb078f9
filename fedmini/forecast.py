"""What a run will cost, and whether its noise will drown what it learns: `fedmini plan` prints this."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedmini import metrics
from fedmini.privacy import accounting, encoding
from fedmini.sums import download_bytes, mean_denominator, noise_std_of_sum, upload_bytes
from fedmini.types import Manifest, Unit, UnitPlan

NOISE_TO_SIGNAL_LIMIT = 3.0


@dataclass(frozen=True, slots=True)
class UnitForecast:
    """What one kind of unit can count on at the end of a run."""

    plan: UnitPlan
    num_releases: int  # that one unit is in, at most, spare attempts included
    epsilon: float
    epsilon_lone: float | None  # were all other devices of every cohort the adversary's; None where nothing is shared


@dataclass(frozen=True, slots=True)
class EvaluationForecast:
    """What the devices' own evaluations will cost, beside the training, and how much they can say."""

    num_evaluations: int
    units: tuple[UnitForecast, ...]
    epsilon_together: Mapping[Unit, float]  # of training and evaluations, as if every unit were in both
    error: float  # one standard deviation of the noise in the loss, nats a token, if all goes as planned


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
    evaluation: EvaluationForecast | None


def forecast(manifest: Manifest) -> Forecast:
    """What a run of this manifest will cost, if all goes well; its spare attempts are counted as used."""
    release = manifest.release
    ratio = _noise_to_signal(manifest)
    is_drowned = ratio is not None and ratio > NOISE_TO_SIGNAL_LIMIT
    return Forecast(
        units=tuple(_unit_forecast(unit, manifest) for unit in release.units),
        noise_to_signal=ratio,
        cohort_needed=_cohort_needed(manifest, ratio) if is_drowned and ratio is not None else None,
        rank_needed=_rank_needed(manifest, ratio) if is_drowned and ratio is not None else None,
        num_coordinates=manifest.num_coordinates,
        upload_bytes_per_device=upload_bytes(manifest),
        download_bytes_per_device=download_bytes(manifest),
        evaluation=_evaluation_forecast(manifest),
    )


def _evaluation_forecast(manifest: Manifest) -> EvaluationForecast | None:
    evaluated = manifest.for_evaluation
    if evaluated is None:
        return None
    release = evaluated.release
    num_units = release.cohort_size * (evaluated.local.expected_batch_size if release.sums_examples else 1.0)
    together = {
        unit.unit: accounting.compose(
            [
                (accounting.event_of(plan, one), one.release.max_releases)
                for one in manifest.parts
                if (plan := one.release.plan_of(unit.unit)) is not None
            ],
            unit.target_delta,
        )
        for unit in release.units
    }
    return EvaluationForecast(
        num_evaluations=evaluated.num_rounds,
        units=tuple(_unit_forecast(unit, evaluated) for unit in release.units),
        epsilon_together=together,
        error=metrics.expected_evaluation_error(
            num_units, release.encoding_norm, noise_std_of_sum(evaluated, release.cohort_size)
        ),
    )


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


def _unit_forecast(unit: UnitPlan, manifest: Manifest) -> UnitForecast:
    event = accounting.event_of(unit, manifest)
    releases = manifest.release.max_releases
    lone = None
    if unit.noise == "shared" and unit.num_shares > 1:
        bound = encoding.sensitivity(unit.clip_norm, unit.scale, manifest.num_coordinates)
        alone = accounting.effective_multiplier(unit.noise_variance, 1, bound)
        lone = accounting.epsilon(replace(event, z_eff=alone), releases, unit.target_delta)
    return UnitForecast(unit, releases, accounting.epsilon(event, releases, unit.target_delta), lone)
