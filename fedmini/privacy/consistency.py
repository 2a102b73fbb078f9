"""Whether a manifest says one thing only: every number that privacy rests on is computed again, and a larger claim refused.

A signature says who made a manifest, not that it is true. What is relied on here are the integers that a device really
draws: `noise_variance`, `num_shares`, and the norm bound of what it clips and rounds.
"""

import math
from dataclasses import replace

from fedmini import metrics, schedule
from fedmini.errors import ConfigError, ProtocolError
from fedmini.privacy import accounting, encoding, noise
from fedmini.types import EvaluationManifest, EvaluationPlan, Manifest, Unit, UnitPlan

MAX_COORDINATES = 2**24  # with the next: what docs/accounting.md, section 5, keeps its reserve for
MAX_RELEASES = 10**6  # of one unit, local steps counted
LARGEST = 1e15  # of what has no range of its own: nothing overflows below it
MIN_MULTIPLIER = 0.2  # less noise than that protects nobody, and the accountant would take a minute and 1 GB over it
MAX_RUN_ID = 117  # characters, of a run with evaluations: theirs is longer, and must fit a message
ROUNDING_ERROR = 1e-12  # relative; what another machine's last digits can differ by is far less
CONTRADICTION = "the manifest contradicts itself: leave the run, and tell its operator"


def check_consistency(manifest: Manifest) -> None:
    """Raise ProtocolError, naming the field, where a manifest is out of every sane range or contradicts itself.

    Every manifest that planning makes passes. Whatever passes keeps what docs/accounting.md proves: the sensitivity, the
    smallest share, the number of shares, and a z_eff that is what the integers give.
    """
    for part in (_check_ranges, _check_modes, _check_size, _check_counts):  # what the others calculate with
        part(manifest)
    for unit in manifest.release.units:
        _check_noise(unit, manifest)
    _check_encoding(manifest)
    _check_budgets(manifest)
    evaluated = manifest.for_evaluation
    if manifest.evaluation is not None and evaluated is not None:
        _check_evaluation(manifest.evaluation, manifest)
        try:
            check_consistency(evaluated)
        except ProtocolError as error:
            raise ProtocolError(f"its evaluations on devices: {error}") from error


def epsilon_of(unit: UnitPlan, manifest: Manifest, num_shares: int) -> float:
    """What a whole run with so many honest shares can cost one unit at its target_delta: all releases of a device.

    From a consistent manifest's noise variance: no multiplier in it is relied on. Infinite above 100, and below a
    multiplier of 0.2; composed in growing numbers, so that this is found out before it costs memory and minutes.
    """
    event = accounting.event_of(unit, manifest)
    single = replace(event, num_steps=1, z_eff=_multiplier(unit, manifest, num_shares))
    if single.z_eff < MIN_MULTIPLIER:
        return math.inf
    total, count = manifest.release.max_releases * event.num_steps, 1
    while True:
        count = min(count, total)
        found = accounting.epsilon(single, count, unit.target_delta)
        if found > accounting.HOPELESS_EPSILON:
            return math.inf
        if count == total:
            return found
        count *= 16


def whole_run_epsilon(name: Unit, manifest: Manifest, *, is_alone: bool) -> float:
    """What training and evaluations together can cost one unit, as `epsilon_of` has it; infinite where that is.

    `is_alone`: with no noise but the device's own.
    """
    parts, delta = [], 0.0
    for one in manifest.parts:
        if (unit := one.release.plan_of(name)) is None:
            continue
        num_shares = 1 if is_alone else unit.num_shares
        if math.isinf(epsilon_of(unit, one, num_shares)):
            return math.inf
        event = replace(accounting.event_of(unit, one), z_eff=_multiplier(unit, one, num_shares))
        parts.append((event, one.release.max_releases))
        delta = unit.target_delta
    found = accounting.compose(parts, delta)
    return found if found <= accounting.HOPELESS_EPSILON else math.inf


def _multiplier(unit: UnitPlan, manifest: Manifest, num_shares: int) -> float:
    bound = encoding.sensitivity(unit.clip_norm, unit.scale, manifest.num_coordinates)
    return accounting.effective_multiplier(unit.noise_variance, num_shares, bound)


def _check_ranges(manifest: Manifest) -> None:
    """Every number lies where nothing that is calculated from it overflows, and none is NaN."""
    local, release = manifest.local, manifest.release
    for field, value in (
        ("local.expected_batch_size", local.expected_batch_size),
        ("local.learning_rate", local.learning_rate),
        ("local.max_length", local.max_length),
        ("lora.lora_rank", manifest.lora.lora_rank),
        ("lora.lora_alpha", manifest.lora.lora_alpha),
        ("release.encoding_norm", release.encoding_norm),
        ("release.scale", release.scale),
        *(("target_epsilon", budget) for _, budget in manifest.target_epsilon),
    ):
        within(field, value, 1 / LARGEST, LARGEST)
    within("local.sampling_rate", local.sampling_rate, 2**-64, 1)
    for unit in release.units:
        for name in ("clip_norm", "scale", "noise_multiplier", "z_eff"):
            within(f"release.{unit.unit}.{name}", getattr(unit, name), 1 / LARGEST, LARGEST)
        is_delta = accounting.RESERVED_DELTA < unit.target_delta < 1
        require(is_delta, f"release.{unit.unit}.target_delta", "above 1e-12 and below 1", unit.target_delta)


def _check_size(manifest: Manifest) -> None:
    names = [name for name, _ in manifest.template]
    require(names == sorted(set(names)), "template", "sorted names, each once", "others")
    for _, shape in manifest.template:
        is_shape = len(shape) <= 8 and all(1 <= size <= MAX_COORDINATES for size in shape)
        require(is_shape, "template", "shapes of at most 8 positive sizes", shape)
    size = sum(math.prod(shape) for _, shape in manifest.template)  # in Python's integers, which can't overflow
    within("template", size, 1, MAX_COORDINATES - len(metrics.NAMES))
    example = manifest.release.example
    num_metrics = 0 if example is not None and example.noise == "local" else len(metrics.NAMES)
    if isinstance(manifest, EvaluationManifest):
        num_metrics = len(metrics.EVALUATION_NAMES)
    _equal("release.num_metrics", manifest.release.num_metrics, num_metrics)


def _check_modes(manifest: Manifest) -> None:
    """Each unit stands in its own place, with a source of noise and in a combination that docs/accounting.md covers."""
    example, device, local = manifest.release.example, manifest.release.device, manifest.local
    if example is not None:
        _equal("release.example.unit", example.unit, "example")
        sources = ("local", "shared") if device is None else ("local",)
        require(example.noise in sources, "release.example.noise", " or ".join(sources), example.noise)
    if device is not None:
        _equal("release.device.unit", device.unit, "device")
        require(device.noise in ("shared", "server"), "release.device.noise", "shared or server", device.noise)
    if manifest.release.sums_examples:
        _equal("local.num_steps", local.num_steps, 1)
        _equal("local.optimizer", local.optimizer, "sgd")


def _check_counts(manifest: Manifest) -> None:
    release = manifest.release
    within("num_rounds", manifest.num_rounds, 1, MAX_RELEASES)
    within("release.max_participations", release.max_participations, 1, manifest.num_rounds)
    within("release.min_separation", release.min_separation, 1, MAX_RELEASES)
    spread = math.ceil(manifest.num_rounds / release.min_separation)
    within("release.max_releases", release.max_releases, min(release.max_participations, spread), MAX_RELEASES)
    within("local.num_steps", manifest.local.num_steps, 1, MAX_RELEASES // release.max_releases)
    within("release.max_devices", release.max_devices, 1, MAX_RELEASES)
    within("release.cohort_size", release.cohort_size, 1, release.max_devices)
    within("release.min_survivors", release.min_survivors, 1, release.cohort_size)
    within("release.n_honest", release.n_honest, 1, release.min_survivors)
    if any(unit.noise == "shared" for unit in release.units):  # more corrupt devices could take a sum apart
        within("release.n_honest", release.n_honest, math.ceil(2 * release.min_survivors / 3), release.min_survivors)


def _check_noise(unit: UnitPlan, manifest: Manifest) -> None:
    """The noise can be drawn and is what the multipliers say: each is computed again, and a larger claim refused."""
    name = f"release.{unit.unit}"
    _near(f"{name}.scale", unit.scale, encoding.scale_for(unit.clip_norm, manifest.num_coordinates))
    within(f"{name}.noise_variance", unit.noise_variance, accounting.MIN_SHARE_VARIANCE, noise.MAX_VARIANCE)
    num_shares = manifest.release.n_honest if unit.noise == "shared" else 1
    _equal(f"{name}.num_shares", unit.num_shares, num_shares)
    _near(f"{name}.z_eff", unit.z_eff, _multiplier(unit, manifest, num_shares))
    reach = unit.clip_norm * unit.scale
    lowest = math.sqrt(num_shares * (unit.noise_variance - 1)) / reach  # the variance was rounded up to an integer
    highest = math.sqrt(num_shares * unit.noise_variance) / reach
    error = ROUNDING_ERROR * highest
    within(f"{name}.noise_multiplier", unit.noise_multiplier, lowest - error, highest + error)
    # Where this fails, the grid is too coarse for so many coordinates, or a share too small.
    within(f"{name}.z_eff", unit.z_eff, accounting.SMALLEST_EFFICIENCY * unit.noise_multiplier - error, math.inf)


def _check_encoding(manifest: Manifest) -> None:
    """The vector that travels is that of the unit that is noised in the sum, and the sum fits the modulus."""
    release = manifest.release
    travels = release.example if release.sums_examples else release.device
    if travels is None:
        _equal("release.modulus_bits", release.modulus_bits, 32)
        most = 2**30 / release.max_devices * (1 + ROUNDING_ERROR)
        within("release.scale, times encoding_norm", release.scale * release.encoding_norm, 0, most)
        return
    _near("release.encoding_norm", release.encoding_norm, travels.clip_norm)
    _near("release.scale", release.scale, travels.scale)
    try:
        least = encoding.modulus_bits(
            clip_norm=travels.clip_norm,
            scale=travels.scale,
            num_devices=release.max_devices,
            expected_examples=manifest.local.expected_batch_size if release.sums_examples else None,
            noise_multiplier=travels.noise_multiplier,
            num_shares=travels.num_shares,
        )
    except ConfigError as error:
        raise ProtocolError(
            f"manifest.release.modulus_bits: expected 24 or 32, got a plan that needs more ({error}); {CONTRADICTION}"
        ) from error
    is_enough = release.modulus_bits in encoding.MODULUS_BITS and release.modulus_bits >= least
    require(is_enough, "release.modulus_bits", f"24 or 32, and {least} at least", release.modulus_bits)


def _check_budgets(manifest: Manifest) -> None:
    """A budget belongs to a protected unit, and the noise is enough for it, all releases of a device counted."""
    units = {unit.unit: unit for unit in manifest.release.units}
    budgeted = [unit for unit, _ in manifest.target_epsilon]
    is_own = len(set(budgeted)) == len(budgeted) and set(budgeted) <= set(units)
    require(is_own, "target_epsilon", f"a number for protected units only ({', '.join(units) or 'none'})", budgeted)
    for name, budget in manifest.target_epsilon:
        if budget <= accounting.HOPELESS_EPSILON:  # above it nothing is promised
            found = epsilon_of(units[name], manifest, units[name].num_shares)
            within(f"target_epsilon of {name}", budget, found * (1 - ROUNDING_ERROR), math.inf)


def _check_evaluation(plan: EvaluationPlan, manifest: Manifest) -> None:
    """Evaluations protect what the run protects, by noise of the same kind, and are as many as their interval says."""
    within("run_id, its characters", len(manifest.run_id), 1, MAX_RUN_ID)
    within("evaluation.every", plan.every, 1, MAX_RELEASES)
    within("evaluation.fraction", plan.fraction, 1 / LARGEST, 1)
    most = schedule.num_measured(plan.every, manifest.num_rounds)
    _equal("evaluation.num_evaluations", plan.num_evaluations, most)
    _equal("evaluation.release.max_releases", plan.release.max_releases, most)
    names: tuple[Unit, ...] = ("example", "device")
    for name in names:
        trained, evaluated = manifest.release.plan_of(name), plan.release.plan_of(name)
        wanted = None if trained is None else (trained.noise, trained.target_delta)
        found = None if evaluated is None else (evaluated.noise, evaluated.target_delta)
        _equal(f"evaluation.release.{name}, its noise and delta", found, wanted)
        require(wanted is None or wanted[0] != "local", f"release.{name}.noise beside an evaluation", "shared", wanted)
    for field in ("min_survivors", "n_honest", "max_devices"):
        _equal(f"evaluation.release.{field}", getattr(plan.release, field), getattr(manifest.release, field))


def within(field: str, value: float, least: float, most: float, what_to_do: str = CONTRADICTION) -> None:
    """NaN lies nowhere."""
    expected = f"at least {least:.6g}" if most == math.inf else f"{least:.6g} to {most:.6g}"
    require(least <= value <= most, field, expected, value, what_to_do)


def _near(field: str, value: float, expected: float) -> None:
    require(abs(value - expected) <= ROUNDING_ERROR * expected, field, expected, value)


def _equal(field: str, value: object, expected: object) -> None:
    require(value == expected, field, expected, value)


def require(holds: bool, field: str, expected: object, got: object, what_to_do: str = CONTRADICTION) -> None:
    if not holds:
        raise ProtocolError(f"manifest.{field}: expected {expected}, got {got!r:.80}; {what_to_do}")
