"""The federated algorithm over plain functions: what is divided by what, what is debited when, and who may take part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmini import attempts, cohorts, config, planning, rounds
from fedmini.errors import CohortError, PrivacyBudgetError, ProtocolError, StateError
from fedmini.privacy import encoding
from fedmini.privacy.ledger import Ledger
from fedmini.privacy.noise import RandomStream
from fedmini.server_step import num_asked
from fedmini.types import (
    CohortSum,
    DeviceId,
    LedgerPosition,
    Participation,
    Roster,
    RoundReport,
    ServerState,
    TrainTask,
)

TEMPLATE = (("x.lora_B.weight", (3, 2)),)
DEVICES = tuple(f"device-{index:02d}" for index in range(12))

Debit = Callable[[Roster], None]


def a_run(changes: Mapping[str, Any] | None = None, seed: int | None = 1) -> rounds.Run:
    """Six coordinates, eight devices a round, device-level noise that the server adds, unless changed."""
    values: dict[str, Any] = {
        "run": {"name": "test"},
        "base": {"name": "smollm2-135m-q4"},
        "data": {"source": "x.jsonl", "held_out_devices": 1},
        "local": {"sampling_rate": 0.5, "expected_batch_size": 4.0},
        "rounds": {"num_rounds": 3, "cohort_size": 8, "min_survivors": 5},
        "privacy": {
            "device": {"noise": "server", "clip_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-5},
        },
    }
    for section, value in (changes or {}).items():
        values[section] = value if section == "privacy" else values[section] | value
    parsed = config.parse_run_config(values)
    manifest = planning.make_manifest(parsed, "test-run", planning.Base("base", TEMPLATE), None)
    streams = (lambda *purpose: RandomStream.from_os()) if seed is None else partial(RandomStream.seeded, seed)
    is_seeded = seed is not None
    return rounds.Run(manifest, planning.server_plan(parsed), lambda: DEVICES, streams, is_seeded, is_seeded)


def choose(state: ServerState, run: rounds.Run) -> tuple[DeviceId, ...]:
    """Whom the first attempt at a round asks."""
    release = run.manifest.release
    wanted = num_asked(release.cohort_size, run.server.over_selection)
    stream = run.streams("cohort", "round", state.round_num + 1, "attempt", 0)
    return cohorts.choose(state, run.population(), release, wanted, stream)


NO_PRIVACY = {"privacy": {"none": True}}
SHARED_EXAMPLES = {
    "privacy": {"example": {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-5}}
}


def a_state(ledger: Ledger) -> ServerState:
    return ServerState(0, {"x.lora_B.weight": np.zeros((3, 2), np.float32)}, 0, None, None, {}, ledger.position)


def sends(run: rounds.Run, update: Sequence[float], num_survivors: int | None = None):
    """Devices that all send the same update; only `num_survivors` of them get through."""

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        debit(Roster(run.manifest.run_id, task.round_num, task.attempt, tuple(sorted(chosen))))
        count = len(chosen) if num_survivors is None else num_survivors
        vector = np.zeros(run.manifest.num_coordinates)
        vector[:6] = update
        integers = np.round(vector * run.manifest.release.scale).astype(np.int64) * count
        return CohortSum(encoding.wrap(integers, run.manifest.release.modulus_bits), count)

    return sum_cohort


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger.open(tmp_path / "ledger.jsonl", "test-run") as opened:
        yield opened


UPDATE = [0.5, -0.25, 0.0, 0.125, 0.0, 0.0]


def test_the_sum_is_divided_by_the_planned_cohort_not_by_who_came(ledger: Ledger) -> None:
    run = a_run(NO_PRIVACY)
    state, report = rounds.run_round(a_state(ledger), run, sends(run, UPDATE, num_survivors=6), ledger)
    assert report.num_survivors == 6
    assert state.adapter["x.lora_B.weight"].ravel() == pytest.approx(np.array(UPDATE) * 6 / 8, abs=1e-4)


def test_summed_gradients_are_divided_by_the_expected_batch_and_walked_against(ledger: Ledger) -> None:
    run = a_run(SHARED_EXAMPLES | {"local": {"learning_rate": 2.0}})
    state, _ = rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger)
    expected = -2.0 * np.array(UPDATE) * 8 / (8 * 4.0)
    assert state.adapter["x.lora_B.weight"].ravel() == pytest.approx(expected, abs=1e-4)


def test_the_debit_is_on_the_disk_before_any_contribution_is_asked_for(ledger: Ledger, tmp_path: Path) -> None:
    run = a_run()
    seen = []

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        seen.append((tmp_path / "ledger.jsonl").read_text().count("DEBITED"))
        debit(Roster("test-run", task.round_num, task.attempt, tuple(sorted(chosen))))
        seen.append((tmp_path / "ledger.jsonl").read_text().count("DEBITED"))
        return CohortSum(np.zeros(run.manifest.num_coordinates, np.uint32), 8)

    rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert seen == [0, 1]


def test_a_sum_without_a_debit_is_refused(ledger: Ledger) -> None:
    run = a_run()
    with pytest.raises(CohortError, match="no roster was ever fixed"):
        rounds.run_round(
            a_state(ledger), run, lambda *_: CohortSum(np.zeros(run.manifest.num_coordinates, np.uint32), 8), ledger
        )


def test_the_roster_is_fixed_once(ledger: Ledger) -> None:
    run = a_run()

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        for _ in range(2):
            debit(Roster("test-run", task.round_num, task.attempt, tuple(sorted(chosen))))
        raise AssertionError("a second roster was accepted")

    with pytest.raises(ProtocolError, match="fixed twice"):
        rounds.run_round(a_state(ledger), run, sum_cohort, ledger)


def test_too_few_devices_before_the_debit_cost_nothing(ledger: Ledger) -> None:
    run = a_run()

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        debit(Roster("test-run", task.round_num, task.attempt, tuple(sorted(chosen))[:4]))
        raise AssertionError("a roster below min_survivors was accepted")

    with pytest.raises(CohortError, match="4 devices came, 5 are needed; nothing was spent"):
        rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert ledger.num_debits == 0


def test_an_error_of_the_seam_before_the_debit_ends_the_round_and_costs_nothing(ledger: Ledger) -> None:
    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        raise CohortError("3 devices sent their keys; nothing was spent")

    run = a_run({"rounds": {"num_rounds": 3, "cohort_size": 8, "min_survivors": 5, "spare_attempts": 5}})
    with pytest.raises(CohortError, match=r"^round 1: 3 devices sent their keys; nothing was spent$"):
        rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert ledger.num_debits == 0


def test_an_error_of_the_seam_after_the_debit_is_a_lost_attempt_and_a_spare_one_follows(ledger: Ledger) -> None:
    run = a_run({"rounds": {"num_rounds": 3, "cohort_size": 8, "min_survivors": 5, "spare_attempts": 2}})
    attempts = []

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        attempts.append(task.attempt)
        debit(Roster("test-run", task.round_num, task.attempt, tuple(sorted(chosen))))
        if len(attempts) < 3:
            raise CohortError("4 devices sent their vectors")
        return CohortSum(np.zeros(run.manifest.num_coordinates, np.uint32), 8)

    state, _ = rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert attempts == [0, 1, 2] and ledger.num_debits == 3 and state.round_num == 1


def test_devices_of_a_lost_attempt_may_come_to_the_next_one_and_then_pause(ledger: Ledger) -> None:
    changes = {"num_rounds": 3, "cohort_size": 12, "min_survivors": 5, "min_separation": 2, "spare_attempts": 1}
    run = a_run({"rounds": changes})
    lost: list[tuple[DeviceId, ...]] = []

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        roster = tuple(sorted(chosen))[: 12 - 6 * task.attempt]  # all of them, then half
        debit(Roster("test-run", task.round_num, task.attempt, roster))
        if task.attempt == 0:
            lost.append(roster)
            raise CohortError("lost")
        return CohortSum(np.zeros(run.manifest.num_coordinates, np.uint32), 6)

    state, _ = rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert len(lost[0]) == 12 and sorted(found.count for found in state.participations.values()) == [0] * 6 + [1] * 6
    with pytest.raises(CohortError, match="0 of 12 devices may still take part"):
        choose(state, run)


def test_a_cohort_lost_after_the_debit_stays_paid_for_and_a_spare_attempt_follows(ledger: Ledger) -> None:
    run = a_run({"rounds": {"num_rounds": 3, "cohort_size": 8, "min_survivors": 5, "spare_attempts": 1}})
    attempts = []

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        attempts.append(task.attempt)
        return sends(run, UPDATE, num_survivors=4 if task.attempt == 0 else 8)(chosen, task, debit)

    state, report = rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert attempts == [0, 1]
    assert ledger.num_debits == 2
    assert state.round_num == 1
    assert report.epsilon["device"] > rounds_epsilon(run, 1) + 0.1  # both attempts are in it


def rounds_epsilon(run: rounds.Run, count: int) -> float:
    from fedmini.privacy import accounting

    unit = run.manifest.release.units[0]
    return accounting.epsilon(accounting.event_of(unit, run.manifest), count, unit.target_delta)


def test_without_a_spare_attempt_a_lost_cohort_ends_the_run_and_says_what_to_change(ledger: Ledger) -> None:
    run = a_run()
    with pytest.raises(CohortError, match=r"no spare attempt is left; raise rounds\.over_selection"):
        rounds.run_round(a_state(ledger), run, sends(run, UPDATE, num_survivors=4), ledger)
    assert ledger.num_debits == 1


def test_the_budget_is_checked_before_the_round_that_would_pass_it(ledger: Ledger) -> None:
    """Three rounds are planned; the budget is set to what two cost. The third is never debited nor asked for."""
    run = a_run()
    two = rounds_epsilon(run, 2)
    run = replace(run, manifest=replace(run.manifest, target_epsilon=(("device", two),)))
    reports: list[RoundReport] = []
    states: list[ServerState] = []
    with pytest.raises(PrivacyBudgetError, match="round 3 would bring the device epsilon to"):
        rounds.train(
            a_state(ledger), run, sends(run, UPDATE), ledger, lambda s, r: (states.append(s), reports.append(r))
        )
    assert [report.round_num for report in reports] == [1, 2]
    assert ledger.num_debits == 2
    assert reports[-1].epsilon["device"] == pytest.approx(two)
    assert states[-1].ledger == ledger.position


def test_the_weights_and_what_they_cost_are_one_state(ledger: Ledger) -> None:
    run = a_run()
    state, _ = rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger)
    assert state.ledger == ledger.position
    assert state.ledger != LedgerPosition(0, "0" * 64)


def test_a_seeded_attempt_that_is_replayed_gives_the_same_bits_and_no_second_debit(ledger: Ledger) -> None:
    run = a_run(seed=5)
    before = a_state(ledger)
    first, _ = rounds.run_round(before, run, sends(run, UPDATE), ledger)
    again, _ = rounds.run_round(before, run, sends(run, UPDATE), ledger)
    assert again.adapter["x.lora_B.weight"].tobytes() == first.adapter["x.lora_B.weight"].tobytes()
    assert ledger.num_debits == 1


def test_an_unseeded_round_that_is_repeated_is_a_new_attempt_with_a_new_debit(ledger: Ledger) -> None:
    run = a_run(seed=None)
    before = a_state(ledger)
    _, first = rounds.run_round(before, run, sends(run, UPDATE), ledger)
    _, second = rounds.run_round(before, run, sends(run, UPDATE), ledger)
    assert ledger.num_debits == 2
    assert ledger.last_attempt(1) == 1
    assert second.epsilon["device"] > first.epsilon["device"]


def test_a_device_takes_part_at_most_so_often_and_not_too_soon_again(ledger: Ledger) -> None:
    limits = {"num_rounds": 6, "cohort_size": 4, "min_survivors": 4, "max_participations": 2, "min_separation": 3}
    run = a_run({"rounds": limits})
    taken: dict[DeviceId, list[int]] = {}

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        assert len(set(chosen)) == len(chosen) == 4
        for device in chosen:
            taken.setdefault(device, []).append(task.round_num)
        return sends(run, UPDATE)(chosen, task, debit)

    final = rounds.train(a_state(ledger), run, sum_cohort, ledger, lambda state, report: None)
    assert all(len(rounds_of) <= 2 for rounds_of in taken.values())
    assert all(later - earlier >= 3 for found in taken.values() for earlier, later in pairwise(found))
    assert final.participations == {device: Participation(len(found), found[-1]) for device, found in taken.items()}
    assert ledger.epsilon("device", 1e-5) == pytest.approx(rounds_epsilon(run, 2))


def test_where_too_few_may_still_take_part_nothing_is_asked_or_spent(ledger: Ledger) -> None:
    run = a_run({"rounds": {"num_rounds": 3, "cohort_size": 8, "min_survivors": 5, "max_participations": 1}})
    states: list[ServerState] = []
    with pytest.raises(CohortError, match="round 2: 4 of 12 devices may still take part, 5 are needed"):
        rounds.train(a_state(ledger), run, sends(run, UPDATE), ledger, lambda state, report: states.append(state))
    assert ledger.num_debits == 1


def test_more_devices_are_asked_than_are_needed(ledger: Ledger) -> None:
    run = a_run({"rounds": {"num_rounds": 3, "cohort_size": 8, "min_survivors": 5, "over_selection": 1.25}})
    _, report = rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger)
    assert report.num_sampled == 10


def test_the_server_adds_noise_where_it_is_the_servers_and_only_there(ledger: Ledger, tmp_path: Path) -> None:
    noised = a_run()
    state, _ = rounds.run_round(a_state(ledger), noised, sends(noised, [0.0] * 6), ledger)
    assert np.count_nonzero(state.adapter["x.lora_B.weight"]) == 6
    with Ledger.open(tmp_path / "other.jsonl", "test-run") as other:
        silent = a_run(SHARED_EXAMPLES)  # there the devices do
        state, _ = rounds.run_round(a_state(other), silent, sends(silent, [0.0] * 6), other)
    assert not state.adapter["x.lora_B.weight"].any()


def test_the_servers_noise_has_the_planned_size(ledger: Ledger) -> None:
    """Noise multiplier 1, clip norm 1, cohort 8: a standard deviation of 1/8 in each coordinate of the mean."""
    draws, task = [], TrainTask("", 1, 0, {})
    for seed in range(200):
        run = replace(a_run(seed=seed), is_replayed=True)
        total = sends(run, [0.0] * 6)(DEVICES[:8], task, lambda roster: None)
        draws.append(
            attempts.noised_by_server(total, run.manifest, run.streams, task)[:6] / run.manifest.release.scale / 8
        )
    assert np.std(draws) == pytest.approx(1 / 8, rel=0.06)


def test_a_report_is_decoded_from_the_sum(ledger: Ledger) -> None:
    """Eight devices say loss 3 and "was clipped": the report gives both back, from the metric coordinates alone."""
    from fedmini import metrics

    run = a_run({"privacy": {"none": True}})
    release = run.manifest.release

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        debit(Roster("test-run", task.round_num, task.attempt, tuple(sorted(chosen))))
        row = metrics.coordinates([3.0], [10], [True], release.encoding_norm, run.manifest.local.max_length)[0]
        vector = np.concatenate([np.zeros(6), row])
        integers = np.round(vector * release.scale).astype(np.int64) * 8
        return CohortSum(encoding.wrap(integers, release.modulus_bits), 8)

    _, report = rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert report.train_loss == pytest.approx(3.0, abs=1e-3)
    assert report.clipped_fraction == pytest.approx(1.0, abs=1e-3)
    assert report.train_loss_error == 0.0
    assert report.epsilon == {}


def test_two_protected_units_are_two_ledger_lines(ledger: Ledger, tmp_path: Path) -> None:
    run = a_run(
        {
            "privacy": {
                "example": {"noise": "local", "clip_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-5},
                "device": {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": 2.0, "target_delta": 1e-6},
            }
        }
    )
    _, report = rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger)
    assert set(report.epsilon) == {"example", "device"}
    assert ledger.position.seq == 2
    assert ledger.num_debits == 1


def test_a_replay_with_another_roster_is_refused(ledger: Ledger) -> None:
    run = a_run(seed=5)
    rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger)
    with pytest.raises(StateError, match="debited already"):
        rounds.run_round(a_state(ledger), replace(run, population=lambda: DEVICES[:9]), sends(run, UPDATE), ledger)


def lost_first(run: rounds.Run, attempts: list[tuple[int, int]]):
    """Every round's first attempt loses too many devices; the second one goes well."""

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        attempts.append((task.round_num, task.attempt))
        return sends(run, UPDATE, num_survivors=4 if task.attempt == 0 else 8)(chosen, task, debit)

    return sum_cohort


ONE_SPARE = {"rounds": {"num_rounds": 3, "cohort_size": 8, "min_survivors": 5, "spare_attempts": 1}}


@pytest.mark.parametrize("seed", [None, 5])
def test_spare_attempts_are_the_whole_runs_as_the_calibration_counts_them(ledger: Ledger, seed: int | None) -> None:
    """One spare attempt, three rounds that each lose one: the second loss ends the run, at 1 + 1 + 1 releases."""
    run = a_run(ONE_SPARE, seed=seed)
    attempts: list[tuple[int, int]] = []
    with pytest.raises(CohortError, match=r"round 2: .* no spare attempt is left"):
        rounds.train(a_state(ledger), run, lost_first(run, attempts), ledger, lambda state, report: None)
    assert attempts == [(1, 0), (1, 1), (2, 0)]
    assert ledger.max_participation("device") <= 3 + 1  # what planning.num_releases promises


def test_a_replay_loses_the_same_attempts_and_goes_on_the_same_way(ledger: Ledger) -> None:
    """A kill after the debit of the spare attempt: the replay may not count that debit against itself."""
    run = a_run(ONE_SPARE, seed=5)
    before = a_state(ledger)
    first, _ = rounds.run_round(before, run, lost_first(run, []), ledger)
    again, _ = rounds.run_round(before, run, lost_first(run, []), ledger)
    assert again.adapter["x.lora_B.weight"].tobytes() == first.adapter["x.lora_B.weight"].tobytes()
    assert ledger.num_debits == 2


def test_a_cohort_that_is_lost_says_that_it_stays_paid_for(ledger: Ledger) -> None:
    run = a_run()
    with pytest.raises(CohortError, match="what was debited stays spent"):
        rounds.run_round(a_state(ledger), run, sends(run, UPDATE, num_survivors=4), ledger)


def test_without_privacy_lost_attempts_end_too(ledger: Ledger) -> None:
    run = a_run(NO_PRIVACY | ONE_SPARE)
    attempts: list[int] = []

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        attempts.append(task.attempt)
        return sends(run, UPDATE, num_survivors=4)(chosen, task, debit)

    with pytest.raises(CohortError, match="no spare attempt is left"):
        rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert attempts == [0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda roster: replace(roster, devices=roster.devices + roster.devices[:1]),  # one device twice
        lambda roster: replace(roster, devices=(*roster.devices[:-1], "stranger")),
        lambda roster: replace(roster, round_num=2),
        lambda roster: replace(roster, attempt=1),
    ],
)
def test_a_roster_that_is_not_this_attempts_is_refused_before_the_debit(ledger: Ledger, wrong) -> None:
    run = a_run()

    def sum_cohort(chosen: Sequence[DeviceId], task: TrainTask, debit: Debit) -> CohortSum:
        debit(wrong(Roster("test-run", task.round_num, task.attempt, tuple(sorted(chosen)))))
        raise AssertionError("a wrong roster was accepted")

    with pytest.raises(ProtocolError, match="roster"):
        rounds.run_round(a_state(ledger), run, sum_cohort, ledger)
    assert ledger.num_debits == 0


def test_a_sum_of_more_devices_than_the_roster_has_is_refused(ledger: Ledger) -> None:
    run = a_run()
    with pytest.raises(ProtocolError, match=r"9 devices .* 8 on the roster"):
        rounds.run_round(a_state(ledger), run, sends(run, UPDATE, num_survivors=9), ledger)


def test_a_tenth_more_than_ten_devices_are_eleven(ledger: Ledger) -> None:
    """10 * 1.1 is a little above 11 in floats; it must not become 12."""
    run = a_run({"rounds": {"num_rounds": 3, "cohort_size": 10, "min_survivors": 5, "over_selection": 1.1}})
    assert len(choose(a_state(ledger), run)) == 11
