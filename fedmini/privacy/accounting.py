"""Events -> epsilon, and a target epsilon -> the noise: one accountant for every mode.

Every release is a Poisson-subsampled Gaussian at multiplier `z_eff`, composed by dp_accounting's privacy loss
distribution on a grid of 1e-4, pessimistically. Why the integer mechanism may be read so: docs/accounting.md.
"""

import contextlib
import decimal
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmini import files
from fedmini.errors import ConfigError
from fedmini.privacy import encoding, noise
from fedmini.types import Manifest, NoiseSource, PrivacyEvent, Unit, UnitPlan

Mixture = tuple[tuple[float, float, int], ...]  # (z_eff, sampling_rate, how often)

# dp_accounting takes about 0.7 s to import, so gaussian_loss, which does, is imported where it is used.

GRID = 1e-4  # of the privacy losses
ROUGH_GRID = 1e-2
SMOOTHING_VARIANCE = 9  # what a discrete Gaussian gives up to be a rounded continuous one
MIN_SHARE_VARIANCE = 16**2
RESERVED_DELTA = 1e-12  # pays for the sampler's cut tails and for all that "up to a factor" hides
HOPELESS_EPSILON = 100.0  # above it the rough grid's bound is good enough
MIN_MULTIPLIER = 0.05  # below it epsilon is in the hundreds or thousands, and is called infinite
MAX_MULTIPLIER = 1e6
SMALLEST_EFFICIENCY = 0.99  # of z_eff to the noise multiplier that was paid for
CALIBRATION_TOLERANCE = 3e-4  # of epsilon: an epsilon falls at least as fast as 1 / z_eff, so z_eff is nearer still


@dataclass(frozen=True, slots=True)
class UnitRequest:
    """What a unit's plan is made from: exactly one of `noise_multiplier` and `z_eff`."""

    unit: Unit
    noise: NoiseSource
    clip_norm: float
    num_coordinates: int
    num_shares: int  # honest shares that are counted on: n_honest where noise is shared, else 1
    target_delta: float
    noise_multiplier: float | None = None  # of the noise in the sum, as configured
    z_eff: float | None = None  # as calibrated


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """What must hold in the end: `num_compositions` subsampled Gaussians within (target_epsilon, target_delta)."""

    target_epsilon: float
    target_delta: float
    sampling_rate: float
    num_compositions: int


def effective_multiplier(noise_variance: int, num_shares: int, norm_bound: float) -> float:
    """z_eff: the multiplier of a continuous Gaussian that is no more private than these integer shares together.

    `num_shares` independent discrete Gaussians of `noise_variance` each, on integers of sensitivity `norm_bound`.
    A share below variance 256 raises ConfigError: it isn't smooth enough for the argument in docs/accounting.md.
    """
    if noise_variance < MIN_SHARE_VARIANCE:
        raise ConfigError(
            f"each noise share needs a standard deviation of 16 integer units or more, got {noise_variance**0.5:.1f}: "
            "raise the noise multiplier, or spread the noise over fewer devices (rounds.min_survivors)"
        )
    return math.sqrt(num_shares * (noise_variance - SMOOTHING_VARIANCE)) / norm_bound


def plan_unit(request: UnitRequest) -> UnitPlan:
    """The scale, the integer noise variance of one share and the z_eff that follow from a request.

    With `noise_multiplier` z the shares add up to a standard deviation of at least z * clip_norm; with `z_eff` they add
    up to at least that z_eff, and the plan's noise_multiplier is what this took. Raises ConfigError where z_eff would
    be below 0.99 of the noise multiplier: the grid of integers is too coarse for so many coordinates.
    """
    if (request.noise_multiplier is None) == (request.z_eff is None):
        raise ConfigError("a unit's plan needs exactly one of a noise multiplier and an effective multiplier")
    scale = encoding.scale_for(request.clip_norm, request.num_coordinates)
    norm_bound = encoding.sensitivity(request.clip_norm, scale, request.num_coordinates)
    reach = request.clip_norm * scale
    if request.noise_multiplier is not None:
        noise_multiplier = request.noise_multiplier
        noise_variance = math.ceil((noise_multiplier * reach) ** 2 / request.num_shares)
    else:
        assert request.z_eff is not None
        # The factor keeps the square root that follows from coming out one rounding error short.
        wanted = (request.z_eff * norm_bound) ** 2 / request.num_shares * (1 + 1e-12)
        noise_variance = math.ceil(wanted) + SMOOTHING_VARIANCE
        noise_multiplier = math.sqrt(request.num_shares * noise_variance) / reach
    if noise_variance > noise.MAX_VARIANCE:
        raise ConfigError(
            f"noise multiplier {noise_multiplier:g} is more than can be drawn: a share may have a standard deviation of "
            f"at most {noise.MAX_VARIANCE**0.5 / reach:g} clip norms; lower it, or raise target_epsilon"
        )
    z_eff = effective_multiplier(noise_variance, request.num_shares, norm_bound)
    if z_eff < SMALLEST_EFFICIENCY * noise_multiplier:
        raise ConfigError(
            f"rounding {request.num_coordinates} coordinates would cost {1 - z_eff / noise_multiplier:.1%} of the "
            "noise, at most 1 % is accepted: train fewer coordinates (lora.lora_rank, lora.target_modules, lora.layers)"
        )
    return UnitPlan(
        unit=request.unit,
        noise=request.noise,
        clip_norm=request.clip_norm,
        noise_multiplier=noise_multiplier,
        scale=scale,
        noise_variance=noise_variance,
        num_shares=request.num_shares,
        z_eff=z_eff,
        target_delta=request.target_delta,
    )


def event_of(unit: UnitPlan, manifest: Manifest) -> PrivacyEvent:
    """What one round's release costs one unit, as the accountant is told."""
    is_example = unit.unit == "example"
    return PrivacyEvent(
        unit=unit.unit,
        noise=unit.noise,
        z_eff=unit.z_eff,
        sampling_rate=manifest.local.sampling_rate if is_example else 1.0,
        num_steps=manifest.local.num_steps if is_example else 1,
        clip_norm=unit.clip_norm,
    )


def epsilon(event: PrivacyEvent, count: int, target_delta: float) -> float:
    """What `count` releases like `event` cost together, all their `num_steps` composed; as `compose`."""
    return compose([(event, count)], target_delta)


def rounded_up(value: float, digits: int = 3) -> str:
    """An epsilon as it may be shown: so many decimals, and never less than it is."""
    if not math.isfinite(value):
        return "infinity"
    unit = 10**digits
    return f"{math.ceil(value * unit - 1e-6) / unit:.{digits}f}"


def compose(events: Sequence[tuple[PrivacyEvent, int]], target_delta: float) -> float:
    """What a mixture of releases costs the one unit that was in all of them: an upper bound, never negative.

    Each event counts as often as its number says. 1e-12 of `target_delta` is kept back (RESERVED_DELTA), so a
    target_delta of that or less raises ConfigError. Above 100 the result is a coarser upper bound; where an effective
    multiplier is below 0.05 it is infinite. Never composes two kinds of unit: they are two guarantees.
    """
    if len({event.unit for event, _ in events}) > 1:
        raise ConfigError("example and device guarantees are two numbers: compose one unit's events only")
    multiplicities: dict[tuple[float, float], int] = {}
    for event, count in events:
        if count > 0:
            key = (_floor(event.z_eff), event.sampling_rate)
            multiplicities[key] = multiplicities.get(key, 0) + count * event.num_steps
    return _epsilon_of(tuple(sorted((*key, count) for key, count in multiplicities.items())), target_delta)


@functools.lru_cache(maxsize=4096)
def _epsilon_of(mixture: Mixture, target_delta: float) -> float:
    if not RESERVED_DELTA < target_delta < 1:
        raise ConfigError(f"target_delta must be above 1e-12 and below 1, got {target_delta}")
    if not all(z_eff > 0 and 0 < sampling_rate <= 1 for z_eff, sampling_rate, _ in mixture):
        raise ConfigError("an event needs a positive effective multiplier and a sampling rate above 0 and up to 1")
    if not mixture:
        return 0.0
    if min(z_eff for z_eff, _, _ in mixture) < MIN_MULTIPLIER:
        return math.inf
    rough = _pld_epsilon(mixture, target_delta, ROUGH_GRID)
    return rough if rough > HOPELESS_EPSILON else _pld_epsilon(mixture, target_delta, GRID)


def _pld_epsilon(mixture: Mixture, target_delta: float, grid: float) -> float:
    from fedmini.privacy import gaussian_loss

    parts = []
    for z_eff, sampling_rate, count in mixture:
        if sampling_rate == 1.0:  # count Gaussians on the same unit are one, exactly
            parts.append(_loss_distribution(z_eff / math.sqrt(count), 1.0, grid))
        else:
            parts.append(_loss_distribution(z_eff, sampling_rate, grid).self_compose(count))
    composed = functools.reduce(lambda left, right: left.compose(right), parts)
    gaussian_loss.forget_plans()
    return max(0.0, float(composed.get_epsilon_for_delta(target_delta - RESERVED_DELTA)))


@functools.lru_cache(maxsize=16)
def _loss_distribution(z_eff: float, sampling_rate: float, grid: float) -> Any:
    """What PLDAccountant builds for PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(z_eff))."""
    from fedmini.privacy import gaussian_loss

    return gaussian_loss.distribution(z_eff, sampling_rate, grid)


def _floor(z_eff: float) -> float:
    """The multiplier rounded down to five digits, so that plans that hardly differ share their work."""
    return float(decimal.Context(prec=5, rounding=decimal.ROUND_FLOOR).create_decimal(repr(float(z_eff))))


def calibrate(request: CalibrationRequest, cache_dir: Path | None) -> float:
    """The smallest effective multiplier for a target epsilon, to 1e-3 relative, and never too small.

    Guarantee: the epsilon of the result, on the fine grid, is at most the target. Never below 0.05. With `cache_dir` it
    is remembered in calibration.json there; a damaged or unwritable cache costs the time again, nothing else.
    """
    if not (request.target_epsilon > 0 and request.num_compositions >= 1):
        raise ConfigError(
            f"calibration needs a positive target_epsilon and one release at least, got {request.target_epsilon} "
            f"and {request.num_compositions}"
        )
    key = json.dumps([asdict(request), GRID, RESERVED_DELTA, "v1"], sort_keys=True)
    cache = {} if cache_dir is None else _read_cache(cache_dir)
    entry = cache.get(key)
    if isinstance(entry, dict) and entry.get("check") == _check(key, entry.get("z_eff")):
        return float(entry["z_eff"])
    z_eff, slope = 1.0, -1.5
    for grid, tolerance in ((ROUGH_GRID, 1e-2), (10 * GRID, CALIBRATION_TOLERANCE), (GRID, CALIBRATION_TOLERANCE)):
        if grid != 10 * GRID or request.target_epsilon <= HOPELESS_EPSILON:
            z_eff, slope = _smallest_multiplier(request, grid, tolerance, (z_eff, slope))
    if cache_dir is not None:
        _write_cache(cache_dir, {**cache, key: {"z_eff": z_eff, "check": _check(key, z_eff)}})
    return z_eff


def _smallest_multiplier(
    request: CalibrationRequest, grid: float, tolerance: float, guess: tuple[float, float]
) -> tuple[float, float]:
    """The multiplier whose epsilon on `grid` lies just below the target, and d log(epsilon) / d log(z_eff) there.

    Secant steps in the logarithms from a guess of both; bisection where a step leaves the bracket or they take long.
    """
    evaluate = _epsilon_of if grid == GRID else functools.partial(_pld_epsilon, grid=grid)
    aim = math.log(request.target_epsilon * (1 - tolerance / 2))
    low, high = MIN_MULTIPLIER, MAX_MULTIPLIER
    z_eff, slope = guess
    last: tuple[float, float] | None = None
    for num_evaluations in itertools.count(1):
        z_eff = _floor(z_eff)
        reached = evaluate(((z_eff, request.sampling_rate, request.num_compositions),), request.target_delta)
        if reached <= request.target_epsilon:
            high = z_eff
            if reached >= request.target_epsilon * (1 - tolerance) or z_eff == MIN_MULTIPLIER:
                break
        else:
            low = z_eff
        if high <= low * (1 + tolerance):
            break
        point = (math.log(z_eff), math.log(max(reached, 1e-9)))
        if last is not None and point[0] != last[0]:
            slope = min(-0.5, (point[1] - last[1]) / (point[0] - last[0]))
        last = point
        step = math.exp(min(1.5, max(-1.5, (aim - point[1]) / slope)))
        z_eff = z_eff * step if low < _floor(z_eff * step) < high and num_evaluations < 12 else math.sqrt(low * high)
    if high > MAX_MULTIPLIER / 2:
        raise ConfigError(f"target_epsilon = {request.target_epsilon} is too small for any noise: raise it")
    return high, slope


def _check(key: str, z_eff: object) -> str:
    return hashlib.sha256(f"{key} {z_eff!r}".encode()).hexdigest()


def _read_cache(cache_dir: Path) -> dict[str, Any]:
    try:
        cache = json.loads((cache_dir / "calibration.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _write_cache(cache_dir: Path, cache: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that can't be written is only slower
        cache_dir.mkdir(parents=True, exist_ok=True)
        files.replace_synced(cache_dir / "calibration.json", json.dumps(cache).encode())
