"""What holds a device back, in its owner's words."""

from dataclasses import dataclass, replace
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmini.conditions import Conditions, DailyUsage, Policy
from fedmini.conditions.policy import is_quiet
from fedmini.config.device_sections import ConditionsSection

NOON = datetime(2026, 3, 4, 12, 0)
GOOD = Conditions(on_power=True, is_idle=True, is_unmetered=True, temperature_c=40.0, free_memory_bytes=2**32)
UNKNOWN = Conditions(None, None, None, None, None)
TYPED = "what a person typed"


@dataclass
class Recorded:
    """Conditions as somebody says they are."""

    answer: Any

    def read(self) -> Conditions:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def why_not(folder: Path, answer: Any, now: datetime = NOON, **limits: Any) -> str | None:
    usage = DailyUsage(folder / "usage.json", now=lambda: now)
    return Policy(ConditionsSection(**limits), Recorded(answer), usage, lambda: now).why_not()


@pytest.mark.parametrize("answer", [GOOD, UNKNOWN], ids=["good", "unknown"])
def test_good_conditions_and_unknown_ones_hold_nothing_back(tmp_path: Path, answer: Conditions) -> None:
    assert why_not(tmp_path, answer) is None


@pytest.mark.parametrize(
    ("change", "reason", "without"),
    [
        (
            {"on_power": False},
            "it runs on its battery as far as it can tell, until it is plugged in",
            {"on_power": False},
        ),
        ({"is_idle": False}, "it is in use, until it has been left alone for some minutes", {"idle": False}),
        (
            {"is_unmetered": False},
            "its network may cost by volume (mobile data or a phone's), until it is on another",
            {"unmetered": False},
        ),
        ({"temperature_c": 80.5}, "it is at 80.5 °C, until it has cooled down to 80 °C", {"max_temperature_c": None}),
        (
            {"free_memory_bytes": 2**30 - 1},
            "1023 MiB of its memory are free, until 1024 MiB are",
            {"min_free_memory_bytes": 0},
        ),
    ],
)
def test_each_condition_holds_training_back_where_the_owner_says_so(
    tmp_path: Path, change: dict[str, Any], reason: str, without: dict[str, Any]
) -> None:
    assert why_not(tmp_path, replace(GOOD, **change)) == reason
    assert why_not(tmp_path, replace(GOOD, **change), **without) is None


def test_a_limit_itself_is_still_allowed(tmp_path: Path) -> None:
    assert why_not(tmp_path, replace(GOOD, temperature_c=80.0, free_memory_bytes=2**30)) is None


class Answers(Conditions):
    """Looks like conditions, and isn't."""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (KeyError(TYPED), "KeyError"),
        (RecursionError(), "RecursionError"),
        (None, "its answer is not a Conditions"),
        ({"on_power": True}, "its answer is not a Conditions"),
        (Answers(True, True, True, 1.0, 2**40), "its answer is not a Conditions"),
        (replace(GOOD, on_power=TYPED), "on_power is not True, False or None"),
        (replace(GOOD, is_idle=1), "is_idle is not True, False or None"),
        (replace(GOOD, is_unmetered=0.0), "is_unmetered is not True, False or None"),
        (replace(GOOD, temperature_c=float("nan")), "temperature_c is not a temperature"),
        (replace(GOOD, temperature_c=float("-inf")), "temperature_c is not a temperature"),
        (replace(GOOD, temperature_c=True), "temperature_c is not a temperature"),
        (replace(GOOD, temperature_c=TYPED), "temperature_c is not a temperature"),
        (replace(GOOD, temperature_c=10**400), "temperature_c is not a temperature"),
        (replace(GOOD, free_memory_bytes=-1), "free_memory_bytes is not a number of bytes"),
        (replace(GOOD, free_memory_bytes=1e9), "free_memory_bytes is not a number of bytes"),
        (replace(GOOD, free_memory_bytes=True), "free_memory_bytes is not a number of bytes"),
    ],
)
def test_an_app_that_fails_or_talks_nonsense_holds_training_back_and_is_not_quoted(
    tmp_path: Path, answer: Any, reason: str
) -> None:
    assert why_not(tmp_path, answer) == f"the app's conditions failed: {reason}"


def test_nonsense_counts_also_where_the_owner_limits_nothing(tmp_path: Path) -> None:
    limits = {
        "on_power": False,
        "idle": False,
        "unmetered": False,
        "max_temperature_c": None,
        "min_free_memory_bytes": 0,
    }
    assert why_not(tmp_path, replace(GOOD, on_power="yes"), **limits) is not None


@given(
    st.one_of(
        st.none(),
        st.builds(
            Conditions,
            *[st.one_of(st.none(), st.booleans(), st.text(), st.floats(), st.integers(), st.just([]))] * 5,  # type: ignore[arg-type]
        ),
    )
)
def test_no_answer_of_an_app_ends_the_device(tmp_path_factory: pytest.TempPathFactory, answer: Any) -> None:
    said = why_not(tmp_path_factory.getbasetemp(), answer)
    assert said is None or "\n" not in said


def test_quiet_hours_come_first_and_say_when_they_end(tmp_path: Path) -> None:
    night = datetime(2026, 3, 4, 23, 30)
    said = why_not(tmp_path, replace(GOOD, on_power=False), night, quiet_hours="22:00-07:00")
    assert said == "quiet hours until 07:00"
    assert why_not(tmp_path, GOOD, NOON, quiet_hours="22:00-07:00") is None


@pytest.mark.parametrize(
    ("quiet_hours", "at", "expected"),
    [
        ("22:00-07:00", "22:00:00", True),
        ("22:00-07:00", "06:59:59", True),
        ("22:00-07:00", "07:00:00", False),
        ("22:00-07:00", "21:59:59", False),
        ("09:00-17:00", "09:00:00", True),
        ("09:00-17:00", "17:00:00", False),
        ("09:00-17:00", "00:00:00", False),
        ("22:00-00:00", "23:59:59", True),
        ("22:00-00:00", "00:00:00", False),
        ("00:00-06:00", "00:00:00", True),
    ],
)
def test_quiet_hours_have_their_first_minute_and_not_their_last(quiet_hours: str, at: str, expected: bool) -> None:
    assert is_quiet(quiet_hours, time.fromisoformat(at)) is expected


MINUTES = st.integers(0, 24 * 60 - 1)


def clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


@given(MINUTES, MINUTES, st.times())
def test_every_moment_is_quiet_or_in_the_hours_the_other_way_round(begin: int, end: int, at: time) -> None:
    there, back = f"{clock(begin)}-{clock(end)}", f"{clock(end)}-{clock(begin)}"
    if begin != end:
        assert is_quiet(there, at) is not is_quiet(back, at)


@given(MINUTES, MINUTES)
def test_quiet_hours_last_as_long_as_from_their_beginning_to_their_end(begin: int, end: int) -> None:
    quiet = sum(is_quiet(f"{clock(begin)}-{clock(end)}", time(minute // 60, minute % 60)) for minute in range(24 * 60))
    assert quiet == (end - begin) % (24 * 60)


def test_hours_that_begin_and_end_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="begins and ends at once"):
        ConditionsSection(quiet_hours="22:00-22:00")


def used(folder: Path, seconds: float = 0.0, contributions: int = 0) -> DailyUsage:
    elapsed = 0.0
    usage = DailyUsage(folder / "usage.json", now=lambda: NOON, elapsed=lambda: elapsed)
    with usage.training():
        elapsed = seconds
    for _ in range(contributions):
        usage.contributed()
    return usage


def test_a_day_that_is_used_up_says_so(tmp_path: Path) -> None:
    used(tmp_path, seconds=7200.0, contributions=3)
    assert why_not(tmp_path, GOOD) == "it has trained for the 120 minutes that it may a day, until midnight"
    many = {"max_minutes_per_day": 121.0, "max_contributions_per_day": 3}
    assert why_not(tmp_path, GOOD, **many) == "it has contributed as often as it may a day (3), until midnight"
    assert why_not(tmp_path, GOOD, **{**many, "max_contributions_per_day": 4}) is None
    assert why_not(tmp_path, GOOD, NOON + timedelta(days=1)) is None


def test_a_clock_that_was_set_back_says_what_to_do(tmp_path: Path) -> None:
    used(tmp_path, seconds=1.0)
    assert why_not(tmp_path, GOOD, NOON - timedelta(days=1)) == (
        "its clock was set back, until it is 2026-03-04 again; delete usage.json in its folder "
        "if the clock was wrong on that day"
    )


def test_a_damaged_record_holds_training_back_until_midnight(tmp_path: Path) -> None:
    (tmp_path / "usage.json").write_text("{")
    damaged = "the record of how long it trained today is damaged, which counts as used up, until midnight"
    assert why_not(tmp_path, GOOD) == damaged
    assert why_not(tmp_path, GOOD) == damaged
    assert why_not(tmp_path, GOOD, NOON + timedelta(days=1)) is None


def test_whoever_limits_no_day_needs_no_record_of_it(tmp_path: Path) -> None:
    (tmp_path / "usage.json").write_text("{")
    assert why_not(tmp_path, GOOD, max_minutes_per_day=None) is None
