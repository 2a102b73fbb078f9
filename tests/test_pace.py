"""What a machine's pace is remembered by, and which plan it is recalled for."""

from pathlib import Path
from typing import Any

import pytest

from fedmini import pace
from fedmini.config import RunConfig
from fedmini.pace import KnownPace, Pace
from tests import tiny_run

MEASURED = Pace(train_seconds=10.0, num_trained=100.0, evaluation_seconds=1.0, num_evaluated=50.0)
RESOLVED = {"num_threads": 1, "workers": 2, "devices_per_batch": 4}
OPEN = {"num_threads": 0, "workers": 0, "devices_per_batch": 0}


def configured(folder: Path, **simulation: Any) -> RunConfig:
    return tiny_run.config(folder, changes={"simulation": OPEN | simulation})


def test_a_pace_is_known_with_the_workers_and_the_devices_together_that_it_was_measured_with(tmp_path: Path) -> None:
    pace.remember(tmp_path, configured(tmp_path, **RESOLVED), MEASURED)
    assert pace.recall(tmp_path, configured(tmp_path, **RESOLVED)) == KnownPace(MEASURED, 2, 4)


@pytest.mark.parametrize("chosen", [{}, {"workers": 2}, {"devices_per_batch": 4}, {"num_threads": 1}])
def test_what_is_left_open_is_as_it_was_when_it_was_measured(tmp_path: Path, chosen: dict[str, int]) -> None:
    pace.remember(tmp_path, configured(tmp_path, **RESOLVED), MEASURED)
    assert pace.recall(tmp_path, configured(tmp_path, **chosen)) == KnownPace(MEASURED, 2, 4)


@pytest.mark.parametrize(
    "other",
    [{"workers": 1}, {"devices_per_batch": 1}, {"num_threads": 2}, {"secure": True}, {"max_hidden_bytes": 1}],
)
def test_the_pace_of_another_kind_of_run_is_not_taken(tmp_path: Path, other: dict[str, Any]) -> None:
    pace.remember(tmp_path, configured(tmp_path, **RESOLVED), MEASURED)
    assert pace.recall(tmp_path, configured(tmp_path, **other)) is None


def test_the_newest_of_several_is_taken(tmp_path: Path) -> None:
    faster = Pace(5.0, 100.0, 1.0, 50.0)
    pace.remember(tmp_path, configured(tmp_path, **RESOLVED), MEASURED)
    pace.remember(tmp_path, configured(tmp_path, **RESOLVED | {"workers": 1}), faster)
    assert pace.recall(tmp_path, configured(tmp_path)) == KnownPace(faster, 1, 4)
    pace.remember(tmp_path, configured(tmp_path, **RESOLVED), MEASURED)
    assert pace.recall(tmp_path, configured(tmp_path)) == KnownPace(MEASURED, 2, 4)


def test_a_memory_of_an_older_kind_or_none_at_all_is_no_pace(tmp_path: Path) -> None:
    assert pace.recall(tmp_path, configured(tmp_path)) is None
    (tmp_path / pace.FILE).write_text('{"{\\"base\\": \\"x\\"}": {"train_seconds": 1.0}, "[]": {}, "no": 3}')
    assert pace.recall(tmp_path, configured(tmp_path)) is None
