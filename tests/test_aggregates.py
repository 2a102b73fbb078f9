"""A sum that is there is committed as it is, after any crash: nothing is asked for twice, nothing debited twice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmini import rounds
from fedmini.aggregates import AggregateFolder
from fedmini.errors import StateError
from fedmini.privacy.ledger import Ledger
from fedmini.types import Aggregate, CohortSum, Roster
from tests.test_rounds import UPDATE, a_run, a_state, sends

ROSTER = Roster("test-run", 1, 0, ("a", "b"))
INTEGERS = np.array([1, -(2**40), 3], np.int64)


class Killed(BaseException):
    """Stands for the end of the process."""


class DiesAfterSaving(AggregateFolder):
    def save(self, aggregate: Aggregate) -> None:
        super().save(aggregate)
        raise Killed


def asks_nobody(*_: object) -> CohortSum:
    raise AssertionError("nothing is asked for again")


def test_a_sum_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    folder = AggregateFolder(tmp_path / "aggregate")
    assert folder.load("test-run", 1) is None
    folder.save(Aggregate(ROSTER, 2, INTEGERS))
    found = folder.load("test-run", 1)
    assert found is not None and (found.roster, found.num_devices) == (ROSTER, 2)
    assert found.integers.dtype == np.int64 and (found.integers == INTEGERS).all()
    assert folder.load("test-run", 2) is None


def test_another_runs_sum_and_a_changed_byte_are_refused(tmp_path: Path) -> None:
    folder = AggregateFolder(tmp_path)
    folder.save(Aggregate(ROSTER, 2, INTEGERS))
    with pytest.raises(StateError, match="the sum of another run, 'test-run'"):
        folder.load("other", 1)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = folder.load("test-run", 1)
        except StateError:
            continue
        assert found is not None and found.roster == ROSTER and (found.integers == INTEGERS).all()
    path.write_bytes(content[:-3])
    with pytest.raises(StateError, match="is damaged"):
        folder.load("test-run", 1)


def test_only_committed_rounds_are_forgotten(tmp_path: Path) -> None:
    folder = AggregateFolder(tmp_path)
    for round_num in (1, 2, 3):
        folder.save(Aggregate(replace(ROSTER, round_num=round_num), 2, INTEGERS))
    folder.forget(up_to_round=2)
    assert [path.name for path in tmp_path.iterdir()] == ["round-0003.safetensors"]


def test_from_the_sum_on_a_kill_changes_nothing_and_costs_nothing(tmp_path: Path) -> None:
    """With noise from the operating system, drawn by the server: a sum that was noised again would be another."""
    run = a_run(seed=None)
    with Ledger.open(tmp_path / "ledger.jsonl", "test-run") as ledger, pytest.raises(Killed):
        rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger, DiesAfterSaving(tmp_path / "kept"))
    kept = AggregateFolder(tmp_path / "kept")
    after = []
    for _ in range(2):  # and killed once more before the checkpoint
        with Ledger.open(tmp_path / "ledger.jsonl", "test-run") as ledger:
            state, report = rounds.run_round(a_state(ledger), run, asks_nobody, ledger, kept)
            assert ledger.num_debits == 1
            after.append({name: value.tobytes() for name, value in state.adapter.items()})
    assert report.num_survivors == 8 and after[0] == after[1]


def test_without_what_is_kept_the_same_kill_pays_again(tmp_path: Path) -> None:
    run = a_run({"rounds": {"spare_attempts": 1}}, seed=None)
    with Ledger.open(tmp_path / "ledger.jsonl", "test-run") as ledger, pytest.raises(Killed):
        rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger, DiesAfterSaving(tmp_path / "kept"))
    with Ledger.open(tmp_path / "ledger.jsonl", "test-run") as ledger:
        rounds.run_round(a_state(ledger), run, sends(run, UPDATE), ledger)
        assert ledger.num_debits == 2


def test_a_sum_that_the_ledger_does_not_know_is_refused(tmp_path: Path) -> None:
    run = a_run()
    kept = AggregateFolder(tmp_path / "kept")
    kept.save(
        Aggregate(Roster("test-run", 1, 0, tuple("abcdefgh")), 8, np.zeros(run.manifest.num_coordinates, np.int64))
    )
    with (
        Ledger.open(tmp_path / "ledger.jsonl", "test-run") as ledger,
        pytest.raises(StateError, match="not in the ledger"),
    ):
        rounds.run_round(a_state(ledger), run, asks_nobody, ledger, kept)
