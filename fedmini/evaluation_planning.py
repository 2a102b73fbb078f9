"""What it costs to measure the loss on devices, on what they hold back from training: planned as a release of its own."""

from pathlib import Path

from fedmini import metrics, schedule
from fedmini.config import DeviceEvaluationSection, RunConfig
from fedmini.privacy import accounting, encoding
from fedmini.privacy.accounting import CalibrationRequest, UnitRequest
from fedmini.types import EvaluationPlan, ReleasePlan, UnitPlan

CLIP_NORM = 1.0  # what an evaluation's coordinates are scaled to: they are bounded, so nothing is lost by it


def plan_evaluation(config: RunConfig, release: ReleasePlan, cache_dir: Path | None) -> EvaluationPlan | None:
    """The plan of a run's evaluations on its devices, `release` being that of its training; None where there are none.

    The unit, the source of the noise, delta and the devices that are counted on are the training's.
    Raises ConfigError where the settings can't work together.
    """
    section = config.evaluation.devices
    if section is None:
        return None
    num_evaluations = schedule.num_measured(section.every, config.rounds.num_rounds)
    units = {unit.unit: _plan_unit(unit, section, release, num_evaluations, cache_dir) for unit in release.units}
    expected = section.fraction * config.data.max_examples_per_device
    scale, bits = encoding.plain_scale(CLIP_NORM, release.max_devices), 32
    for unit in units.values():
        scale = unit.scale
        bits = encoding.modulus_bits(
            clip_norm=CLIP_NORM,
            scale=scale,
            num_devices=release.max_devices,
            expected_examples=expected if unit.unit == "example" else None,
            noise_multiplier=unit.noise_multiplier,
            num_shares=unit.num_shares,
        )
    budgets = () if section.target_epsilon is None else tuple((name, section.target_epsilon) for name in units)
    return EvaluationPlan(
        every=section.every,
        fraction=section.fraction,
        expected_examples=expected,
        num_evaluations=num_evaluations,
        release=ReleasePlan(
            example=units.get("example"),
            device=units.get("device"),
            encoding_norm=CLIP_NORM,
            scale=scale,
            modulus_bits=bits,
            num_metrics=len(metrics.EVALUATION_NAMES),
            cohort_size=release.cohort_size,
            max_devices=release.max_devices,
            min_survivors=release.min_survivors,
            n_honest=release.n_honest,
            max_participations=num_evaluations,
            max_releases=num_evaluations,
            min_separation=1,
        ),
        target_epsilon=budgets,
    )


def _plan_unit(
    trained: UnitPlan,
    section: DeviceEvaluationSection,
    release: ReleasePlan,
    num_evaluations: int,
    cache_dir: Path | None,
) -> UnitPlan:
    z_eff = None
    if section.target_epsilon is not None:
        request = CalibrationRequest(section.target_epsilon, trained.target_delta, 1.0, num_evaluations)
        z_eff = accounting.calibrate(request, cache_dir)
    return accounting.plan_unit(
        UnitRequest(
            unit=trained.unit,
            noise=trained.noise,
            clip_norm=CLIP_NORM,
            noise_multiplier=section.noise_multiplier,
            z_eff=z_eff,
            num_coordinates=len(metrics.EVALUATION_NAMES),
            num_shares=release.n_honest if trained.noise == "shared" else 1,
            target_delta=trained.target_delta,
        )
    )
