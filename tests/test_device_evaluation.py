"""Devices measure the loss on what they hold back: never trained on, bounded, noised, paid for once, and off by default."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmini import floors, local_evaluation, manifest_file, metrics, planning, schedule, simulation
from fedmini.config import RunConfig, parse_run_config
from fedmini.contributor import Contributor, contribute_together
from fedmini.errors import ConfigError, ProtocolError, StateError, UpdateError
from fedmini.floors import COMPILED, Limits
from fedmini.model.lora import LoraModel
from fedmini.privacy import accounting, clipping, encoding
from fedmini.privacy.device_ledger import DeviceLedger
from fedmini.privacy.ledger import read_ledger
from fedmini.privacy.noise import RandomStream
from fedmini.simulation import SimulationOptions, SimulationResult
from fedmini.types import EncodedExample, EvaluationManifest, EvaluationPlan, Manifest, TrainTask
from tests import tiny_llama, tiny_run

ON_DEVICES = {"fraction": 0.4, "noise_multiplier": 2.0}
BASE = planning.Base("0" * 64, (("x.lora_B.weight", (64, 4)),))
MODES = ("example-shared", "device-shared", "device-server", "none")


def a_config(
    folder: Path, privacy: str = "example-shared", changes: dict[str, Any] | None = None, **own: Any
) -> RunConfig:
    on_devices = {key: value for key, value in (ON_DEVICES | own).items() if value is not None}
    if privacy == "none":
        on_devices.pop("noise_multiplier")
    return tiny_run.config(folder, privacy, {"evaluation": {"devices": on_devices}, **(changes or {})})


def a_manifest(folder: Path, privacy: str = "example-shared", base: planning.Base = BASE, **own: Any) -> Manifest:
    return planning.make_manifest(a_config(folder, privacy, **own), "run", base, None)


def run(folder: Path, config: RunConfig, output: str = "run", resume: bool = False, **options: Any) -> SimulationResult:
    chosen = SimulationOptions(resume=resume, cache_dir=folder / "cache", **options)
    return simulation.simulate(config, data=tiny_run.rows(), output=folder / output, options=chosen)


def adapter_bytes(folder: Path, output: str) -> bytes:
    return (folder / output / "adapter" / "adapter_model.safetensors").read_bytes()


# What one unit can change.

LOSSES = st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 20), min_size=1, max_size=6)


def integers_of(losses: list[float], manifest: EvaluationManifest, coordinates: Callable[..., Any], seed: int) -> Any:
    """What `sum_losses` makes of losses; each example's coins are its own."""
    release = manifest.release
    bound = encoding.sensitivity(release.encoding_norm, release.scale, manifest.num_coordinates)
    rows, _ = clipping.clip_rows(coordinates(losses, release.encoding_norm), release.encoding_norm)
    streams = [RandomStream.seeded(seed, place) for place in range(len(rows))]
    return sum(
        encoding.round_sum(row[None], release.scale, bound, stream) for row, stream in zip(rows, streams, strict=True)
    ), bound


@given(losses=LOSSES, seed=st.integers(0, 2**32))
def test_one_example_more_changes_what_is_measured_by_at_most_the_sensitivity(losses: list[float], seed: int) -> None:
    manifest = MANIFEST.for_evaluation
    assert manifest is not None
    more, bound = integers_of(losses, manifest, metrics.evaluation_coordinates, seed)
    less = integers_of(losses[:-1], manifest, metrics.evaluation_coordinates, seed)[0] if len(losses) > 1 else 0 * more
    difference = [int(value) for value in more - less]
    assert sum(value * value for value in difference) <= bound**2


def test_a_bounded_loss_is_not_changed_by_the_clipping() -> None:
    losses = np.array([0.0, 0.3, metrics.LOSS_CAP, 1e9, np.nan])
    rows = metrics.evaluation_coordinates(losses, 1.0)
    clipped, was_clipped = clipping.clip_rows(rows, 1.0)
    assert np.linalg.norm(rows, axis=1).max() == pytest.approx(1.0)
    assert not was_clipped.any() and np.array_equal(clipped, rows)


def test_twin_without_the_cap_a_large_loss_is_clipped_and_the_count_with_it() -> None:
    """Which is why the loss is capped first: the clipping alone keeps the bound, and spoils the mean of all others."""
    uncapped = np.array([[1.0, 1e4 / metrics.LOSS_CAP]]) / np.sqrt(2)
    clipped, was_clipped = clipping.clip_rows(uncapped, 1.0)
    assert was_clipped.all() and clipped[0, 0] < 0.01


def test_twin_without_cap_and_clipping_one_example_moves_the_sum_beyond_the_sensitivity() -> None:
    manifest = MANIFEST.for_evaluation
    assert manifest is not None
    bound = encoding.sensitivity(1.0, manifest.release.scale, manifest.num_coordinates)
    moved = np.array([1.0, 1e4 / metrics.LOSS_CAP]) / np.sqrt(2) * manifest.release.scale
    assert np.linalg.norm(moved) > 100 * bound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def model() -> LoraModel:
    return LoraModel(tiny_llama.base(), tiny_llama.SHAPE)


EXAMPLES = tiny_llama.examples(tuple(5 + index % 9 for index in range(60)))


def test_an_example_is_trained_on_or_measured_on_whatever_else_there_is(folder: Path) -> None:
    manifest = a_manifest(folder)
    assert manifest.for_evaluation is not None
    trained = local_evaluation.own_part(EXAMPLES, manifest)
    measured = local_evaluation.own_part(EXAMPLES, manifest.for_evaluation)
    assert len(trained) + len(measured) == len(EXAMPLES) and not {id(one) for one in trained} & {
        id(one) for one in measured
    }
    assert 0.2 * len(EXAMPLES) < len(measured) < 0.6 * len(EXAMPLES)
    for example in EXAMPLES:
        alone = local_evaluation.own_part([example], manifest)
        assert bool(alone) == (id(example) in {id(one) for one in trained})
    other_run = replace(manifest, run_id="other")  # a later run doesn't train on what an earlier one measured on
    assert local_evaluation.own_part(EXAMPLES, other_run) == trained


def test_without_evaluations_every_example_is_trained_on(folder: Path) -> None:
    plain = planning.make_manifest(tiny_run.config(folder), "run", BASE, None)
    assert local_evaluation.own_part(EXAMPLES, plain) == tuple(EXAMPLES)
    assert plain.for_evaluation is None


@pytest.mark.parametrize("privacy", MODES)
def test_what_devices_say_decodes_to_the_mean_loss_on_what_they_hold_back(
    folder: Path, model: LoraModel, privacy: str
) -> None:
    """Without the share of the noise, which is known here: the mean over examples, or over devices."""
    base = planning.Base(model.fingerprint, model.template)
    evaluated = a_manifest(folder, privacy, base).for_evaluation
    assert evaluated is not None
    task = TrainTask(evaluated.hash, 1, 0, model.initial_adapter())
    release, total, means, losses = evaluated.release, np.zeros(2), [], []
    for place in range(3):
        own = EXAMPLES[20 * place : 20 * place + 20]
        device = Contributor(f"d{place}", own, model, evaluated, partial(RandomStream.seeded, 3))
        integers = encoding.unwrap(device.contribute(task).vector, release.modulus_bits)
        total += (integers - device._noise_share(task)) / release.scale
        model.set_adapter(task.adapter)
        held_back = [model.mean_losses([one], 1)[0] for one in local_evaluation.own_part(own, evaluated)]
        losses += held_back
        means.append(np.mean(held_back))
    decoded = metrics.decode_evaluation(total, release.encoding_norm, 0.0)
    assert decoded is not None
    expected = np.mean(losses if privacy == "example-shared" else means)
    assert decoded == (pytest.approx(expected, abs=0.02), 0.0)


def test_a_loss_is_the_same_whoever_is_measured_beside_it(model: LoraModel) -> None:
    together = model.mean_losses(EXAMPLES[:7], 3)
    alone = [model.mean_losses([example], 1)[0] for example in EXAMPLES[:7]]
    gradients = model.example_gradients(EXAMPLES[:7]).losses
    assert together == pytest.approx(alone, abs=1e-5) and together == pytest.approx(gradients, abs=1e-5)


class CountingModel(LoraModel):
    """Knows how many examples it was asked for at once."""

    asked: tuple[int, ...] = ()

    def mean_losses(self, examples: Sequence[EncodedExample], batch_size: int) -> NDArray[np.float64]:
        self.asked += (len(examples),)
        return super().mean_losses(examples, batch_size)


@pytest.mark.parametrize("privacy", MODES)
def test_devices_measured_together_say_what_they_do_one_by_one(folder: Path, privacy: str) -> None:
    """In one forward; up to float rounding, which may turn a coin of the stochastic rounding."""
    model = CountingModel(tiny_llama.base(), tiny_llama.SHAPE)
    base = planning.Base(model.fingerprint, model.template)
    evaluated = a_manifest(folder, privacy, base).for_evaluation
    assert evaluated is not None
    task = TrainTask(evaluated.hash, 1, 0, model.initial_adapter())
    owned = [EXAMPLES[:20], (), EXAMPLES[20:30], EXAMPLES[30:60]]
    devices = [
        Contributor(f"d{place}", own, model, evaluated, partial(RandomStream.seeded, 3))
        for place, own in enumerate(owned)
    ]
    bits = evaluated.release.modulus_bits
    one_by_one = [encoding.unwrap(device.contribute(task).vector, bits) for device in devices]
    model.asked = ()
    at_once = [encoding.unwrap(found.vector, bits) for found in contribute_together(devices, task)]
    assert model.asked == (sum(len(local_evaluation.own_part(own, evaluated)) for own in owned),)
    assert np.abs(np.array(at_once) - np.array(one_by_one)).max() <= 1
    assert np.ptp(one_by_one, axis=0).max() > 100


def test_a_device_that_holds_nothing_back_still_sends_its_noise(folder: Path, model: LoraModel) -> None:
    evaluated = a_manifest(folder, base=planning.Base(model.fingerprint, model.template)).for_evaluation
    assert evaluated is not None
    device = Contributor("d", (), model, evaluated, partial(RandomStream.seeded, 3))
    task = TrainTask(evaluated.hash, 1, 0, model.initial_adapter())
    integers = encoding.unwrap(device.contribute(task).vector, evaluated.release.modulus_bits)
    assert integers.any() and np.array_equal(integers, device._noise_share(task))


def test_a_noise_that_drowns_the_count_says_nothing() -> None:
    assert metrics.decode_evaluation(np.array([1.0, 0.5]), 1.0, 1.0) is None
    assert metrics.decode_evaluation(np.array([-1.0, 0.5]), 1.0, 0.0) is None


# The plan, and what a device checks of it.

MANIFEST = planning.make_manifest(
    parse_run_config(
        {
            "run": {"name": "tiny"},
            "base": {"path": "none.gguf"},
            "data": {"source": "in memory", "max_examples_per_device": 12, "held_out_devices": 1},
            "local": {"sampling_rate": 0.5},
            "rounds": {"num_rounds": 5, "cohort_size": 8, "min_survivors": 6},
            "privacy": {
                "example": {"clip_norm": 1.0, "noise_multiplier": 3.0, "target_delta": 1e-5, "noise": "shared"}
            },
            "evaluation": {"devices": {"every": 2, "fraction": 0.25, "target_epsilon": 1.0}},
        }
    ),
    "run",
    BASE,
    None,
)


def test_the_evaluations_fit_their_own_budget() -> None:
    evaluated = MANIFEST.for_evaluation
    assert evaluated is not None and evaluated.num_rounds == 4  # after rounds 0, 2, 4 and 5
    (unit,) = evaluated.release.units
    assert 0.99 < accounting.epsilon(accounting.event_of(unit, evaluated), 4, 1e-5) <= 1.0
    assert evaluated.num_coordinates == 2 and MANIFEST.num_coordinates == 256 + 4


@given(every=st.integers(1, 9), num_rounds=st.integers(1, 20))
def test_measurements_are_counted_from_one_without_a_gap(every: int, num_rounds: int) -> None:
    due = [number for number in range(num_rounds + 1) if schedule.is_due(number, every, num_rounds)]
    assert [schedule.index_after(number, every, num_rounds) for number in due] == list(range(1, len(due) + 1))
    assert schedule.num_measured(every, num_rounds) == len(due)


def test_a_manifest_without_evaluations_has_the_hash_that_it_always_had(folder: Path) -> None:
    plain = planning.make_manifest(tiny_run.config(folder), "run", BASE, None)
    assert b"evaluation" not in plain.canonical


def test_a_manifest_with_evaluations_survives_its_file() -> None:
    again = manifest_file.parse(manifest_file.canonical(MANIFEST))
    assert again == MANIFEST and again.for_evaluation == MANIFEST.for_evaluation
    with pytest.raises(UpdateError):  # a run's own id can't be that of another run's evaluations
        manifest_file.parse(replace(MANIFEST, run_id="other:evaluation").canonical)
    with pytest.raises(UpdateError, match="one form"):
        plain = replace(MANIFEST, evaluation=None).canonical.removesuffix(b"}")
        start, end = plain[:1], plain[1:]
        manifest_file.parse(start + b'"evaluation":null,' + end + b"}")


def test_an_honest_manifest_with_evaluations_is_accepted(folder: Path) -> None:
    floors.check(MANIFEST, COMPILED)
    for privacy in MODES:
        loose = replace(COMPILED, max_epsilon=100.0, max_target_delta=1e-2, allow_no_privacy=True)
        floors.check(a_manifest(folder, privacy, noise_multiplier=20.0), loose)


CHEATS: dict[str, Callable[[EvaluationPlan], EvaluationPlan]] = {
    "evaluation.num_evaluations": lambda plan: replace(plan, num_evaluations=plan.num_evaluations + 5),
    "evaluation.every": lambda plan: replace(plan, every=1),
    "evaluation.fraction": lambda plan: replace(plan, fraction=1.5),
    "evaluation.expected_examples": lambda plan: replace(plan, expected_examples=1e9),
    "evaluation.target_epsilon": lambda plan: replace(plan, target_epsilon=(("example", 0.5),)),
    "evaluation.release, no unit": lambda plan: replace(plan, release=replace(plan.release, example=None)),
    "evaluation.release, its noise": lambda plan: of_unit(
        plan, noise_variance=plan.release.units[0].noise_variance // 100
    ),
    "evaluation.release, its z_eff": lambda plan: of_unit(plan, z_eff=plan.release.units[0].z_eff * 2),
    "evaluation.release, its delta": lambda plan: of_unit(plan, target_delta=1e-4),
    "evaluation.release, its shares": lambda plan: of_unit(plan, num_shares=8),
    "evaluation.release, its honest": lambda plan: replace(plan, release=replace(plan.release, n_honest=4)),
    "evaluation.release, its survivors": lambda plan: replace(plan, release=replace(plan.release, min_survivors=7)),
    "evaluation.release, its metrics": lambda plan: replace(plan, release=replace(plan.release, num_metrics=4)),
    "evaluation.release, its releases": lambda plan: replace(plan, release=replace(plan.release, max_releases=9)),
    "evaluation.release, its range": lambda plan: replace(plan, release=replace(plan.release, encoding_norm=100.0)),
}


def of_unit(plan: EvaluationPlan, **changes: Any) -> EvaluationPlan:
    assert plan.release.example is not None
    return replace(plan, release=replace(plan.release, example=replace(plan.release.example, **changes)))


@pytest.mark.parametrize("cheat", sorted(CHEATS))
def test_a_changed_evaluation_is_refused_whoever_signed_it(cheat: str) -> None:
    assert MANIFEST.evaluation is not None
    with pytest.raises(ProtocolError, match="leave the run"):
        floors.check(replace(MANIFEST, evaluation=CHEATS[cheat](MANIFEST.evaluation)), COMPILED)


def test_every_field_of_an_evaluation_has_a_cheat() -> None:
    for field in fields(EvaluationPlan):
        assert any(name.startswith(f"evaluation.{field.name}") for name in CHEATS), field.name


def test_a_devices_limit_is_for_training_and_evaluations_together() -> None:
    (unit,) = MANIFEST.release.units
    alone = floors.run_epsilon(unit, replace(MANIFEST, evaluation=None))
    together = floors.run_epsilon(unit, MANIFEST)
    assert alone < together < alone + 1.0
    floors.check(replace(MANIFEST, evaluation=None), replace(COMPILED, max_epsilon=together * 0.999))
    with pytest.raises(ProtocolError, match="epsilon of the whole run"):
        floors.check(MANIFEST, replace(COMPILED, max_epsilon=together * 0.999))
    with pytest.raises(ProtocolError, match="evaluations included"):
        floors.check(MANIFEST, Limits(max_participations=MANIFEST.release.max_releases + 3))


@pytest.mark.parametrize(
    ("privacy", "own", "said"),
    [
        ("example-local", {}, "local"),
        ("both", {}, "local"),
        ("example-shared", {"noise_multiplier": None}, "exactly one of"),
        ("example-shared", {"target_epsilon": 1.0}, "exactly one of"),
        ("example-shared", {"fraction": 1.0}, "fraction"),
        ("example-shared", {"every": 0}, "every"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    folder: Path, privacy: str, own: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        a_config(folder, privacy, **own)


# Whole runs.


@pytest.fixture(scope="module")
def finished(folder: Path) -> SimulationResult:
    return run(folder, a_config(folder), "finished")


def test_a_run_without_evaluations_has_none(folder: Path) -> None:
    found = run(folder, tiny_run.config(folder), "plain")
    assert not (folder / "plain" / "evaluation-ledger.jsonl").exists()
    assert all(line["device_loss"] is None for line in found.history)
    assert found.privacy["evaluation_on_devices"] is None


def test_each_evaluation_is_a_release_with_a_line_of_its_own(folder: Path, finished: SimulationResult) -> None:
    lines = read_ledger(folder / "finished" / "evaluation-ledger.jsonl")
    run_id = f"{finished.manifest.run_id}:evaluation"
    assert [(line["run_id"], line["round"], line["participation"]) for line in lines] == [
        (run_id, number, number) for number in (1, 2, 3, 4)
    ]
    assert [line["round"] for line in read_ledger(folder / "finished" / "ledger.jsonl")] == [1, 2, 3]
    for line in finished.history:
        assert abs(line["device_loss"] - line["eval_loss"]) < 6 * line["device_loss_error"] < 15


def test_every_epsilon_that_is_shown_holds_for_training_and_evaluations_together(
    folder: Path, finished: SimulationResult
) -> None:
    (unit,) = finished.manifest.release.units
    evaluated = finished.manifest.for_evaluation
    assert evaluated is not None
    parts = [
        (accounting.event_of(unit, finished.manifest), 3),
        (accounting.event_of(evaluated.release.units[0], evaluated), 4),
    ]
    together = accounting.compose(parts, unit.target_delta)
    assert finished.history[-1]["epsilon"] == {"example": pytest.approx(together)}
    (guarantee,) = finished.privacy["guarantees"]
    assert guarantee["epsilon"] == pytest.approx(together)
    (own,) = finished.privacy["evaluation_on_devices"]["guarantees"]
    assert (
        own["epsilon"] == pytest.approx(accounting.compose(parts[1:], unit.target_delta)) and own["epsilon"] < together
    )
    assert guarantee["epsilon_of_a_lone_honest_device"] > together


@pytest.mark.parametrize("privacy", MODES)
def test_secure_aggregation_gives_the_same_measurements_and_devices_write_them_down(folder: Path, privacy: str) -> None:
    changes = {"rounds": {"num_rounds": 2}}
    own = {"noise_multiplier": 0.3}  # five devices are few: more noise would drown their count
    one_by_one = changes | {"simulation": {"devices_per_batch": 1}}  # as secure devices contribute
    direct = run(folder, a_config(folder, privacy, one_by_one, **own), f"direct-{privacy}")
    secure_changes = changes | {"simulation": {"secure": True}}
    secure = run(folder, a_config(folder, privacy, secure_changes, **own), f"secure-{privacy}")
    assert adapter_bytes(folder, f"direct-{privacy}") == adapter_bytes(folder, f"secure-{privacy}")
    names = ("device_loss", "device_loss_error", "epsilon")
    assert [[line[name] for name in names] for line in direct.history] == [
        [line[name] for name in names] for line in secure.history
    ]
    assert all(line["device_loss"] is not None for line in direct.history)
    if privacy == "none":
        return
    kinds: set[tuple[bool, int]] = set()
    for path in (folder / f"secure-{privacy}" / "devices").glob("*.jsonl"):
        with DeviceLedger.open(path) as ledger:
            kinds |= {(":" in receipt.run_id, receipt.round_num) for receipt in ledger.releases()}
    assert kinds == {(False, 1), (False, 2), (True, 1), (True, 2), (True, 3)}


def test_an_evaluation_changes_nothing_of_what_is_learnt(folder: Path, finished: SimulationResult) -> None:
    """But for the examples that are held back: with the very noise of the training, another interval, the same adapter."""
    run(folder, a_config(folder, every=3), "seldom")
    assert adapter_bytes(folder, "seldom") == adapter_bytes(folder, "finished")


class KilledError(Exception):
    """What a run is ended with."""


def killed_at(stage: str, round_num: int) -> Callable[[Any], None]:
    def on_progress(progress: Any) -> None:
        if (progress.stage, progress.round_num) == (stage, round_num) and progress.device_index == 3:
            raise KilledError

    return on_progress


def test_a_seeded_run_killed_in_an_evaluation_goes_on_with_the_same_bits_and_pays_once(
    folder: Path, finished: SimulationResult
) -> None:
    with pytest.raises(KilledError):
        run(folder, a_config(folder), "killed", on_progress=killed_at("evaluation", 1))
    found = run(folder, a_config(folder), "killed", resume=True)
    names = ("device_loss", "eval_loss", "epsilon")
    assert [[line[name] for name in names] for line in found.history] == [
        [line[name] for name in names] for line in finished.history
    ]
    lines = read_ledger(folder / "killed" / "evaluation-ledger.jsonl")
    assert [line["round"] for line in lines] == [1, 2, 3, 4]


def test_an_unseeded_evaluation_that_was_paid_for_and_lost_is_not_made_again(folder: Path) -> None:
    config = a_config(folder, changes={"run": {"seed": None}})
    with pytest.raises(KilledError):
        run(folder, config, "unseeded", on_progress=killed_at("evaluation", 1))
    found = run(folder, config, "unseeded", resume=True)
    assert [line["device_loss"] is None for line in found.history] == [False, True, False, False]
    lines = read_ledger(folder / "unseeded" / "evaluation-ledger.jsonl")
    assert [(line["round"], line["participation"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_run_goes_on_where_too_few_devices_are_left_to_evaluate(folder: Path) -> None:
    """One device in two drops out: training loses attempts, an evaluation that loses its cohort is paid for, and left out."""
    changes = {"rounds": {"dropout_rate": 0.3, "min_survivors": 4, "spare_attempts": 30, "num_rounds": 4}}
    notes: list[str] = []
    found = run(folder, a_config(folder, changes=changes), "dropouts", on_progress=lambda one: notes.append(one.note))
    missing = [line["round"] for line in found.history if line["device_loss"] is None]
    assert found.history[-1]["round"] == 4 and missing
    assert sum(note.startswith("no evaluation on devices") for note in notes) == len(missing)
    assert len(read_ledger(folder / "dropouts" / "evaluation-ledger.jsonl")) == 5


def test_an_older_evaluation_ledger_is_refused_beside_newer_weights(folder: Path) -> None:
    config = a_config(folder)
    with pytest.raises(KilledError):
        run(folder, config, "restored", on_progress=killed_at("round", 2))
    path = folder / "restored" / "evaluation-ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    with pytest.raises(StateError, match="ledger"):
        run(folder, config, "restored", resume=True)


def test_a_plan_says_what_evaluations_cost_and_how_much_they_can_say(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from fedmini import display, forecast

    found = forecast.forecast(MANIFEST)
    assert found.evaluation is not None and found.evaluation.num_evaluations == 4
    assert found.evaluation.epsilon_together["example"] > found.units[0].epsilon
    display.print_plan(Console(width=200), MANIFEST, found, {})
    said = capsys.readouterr().out
    assert "the loss on the 25% that each holds back, 4 times" in said and "with the training" in said


def test_metrics_lines_stay_json(folder: Path, finished: SimulationResult) -> None:
    for line in (folder / "finished" / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)["evaluation_ledger"]) == {"seq", "hash"}
