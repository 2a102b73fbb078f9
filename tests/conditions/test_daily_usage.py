"""What a day's training is counted as: never less than it was, whatever the clock, the disk or the kernel does."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmini.conditions import Conditions, DailyUsage, Policy, Usage, usage
from fedmini.config.device_sections import ConditionsSection
from fedmini.errors import StateError

DAY = date(2026, 3, 4)
LIMIT_S = 60.0
STEP_S = 40.0


class Device:
    """A device that trains whenever it may, on a clock and for times that a test decides."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shown = datetime(2026, 3, 4, 12)
        self.elapsed = 0.0
        self.trained: dict[date, float] = {}
        self.start()

    def start(self) -> None:
        self.usage = DailyUsage(self.path, now=lambda: self.shown, elapsed=lambda: self.elapsed, step_s=STEP_S)
        limits = ConditionsSection(max_minutes_per_day=LIMIT_S / 60)
        self.policy = Policy(limits, self, self.usage, lambda: self.shown)

    def read(self) -> Conditions:
        return Conditions(None, None, None, None, None)

    def train(self, seconds: int, moves: timedelta = timedelta(0)) -> None:
        """Train while it may; the clock moves in the middle."""
        if seconds == 0 or self.policy.why_not() is not None:
            return
        with self.usage.training():
            for second in range(seconds):
                if self.policy.why_not() is not None:
                    return
                self.trained[self.shown.date()] = self.trained.get(self.shown.date(), 0.0) + 1
                self.elapsed += 1
                if second == seconds // 2:
                    self.policy.why_not()
                    self.shown += moves

    def be_killed_while_training(self, seconds: int) -> None:
        if self.policy.why_not() is not None:
            return
        with self.usage.training():
            self.trained[self.shown.date()] = self.trained.get(self.shown.date(), 0.0) + seconds
            for _ in range(seconds):
                self.elapsed += 1
                self.usage.today()  # as its own thread does
            left = self.path.read_bytes()
        self.path.write_bytes(left)
        self.start()


MOVES = st.sampled_from([0, 1, -1, 1, -1, 40])  # days: mostly between few dates


@dataclass(frozen=True)
class Stretch:
    """What a device lives through: its clock moves, it is started anew or not, it trains for a while, or is killed."""

    move: int
    is_restarted: bool
    seconds: int
    move_meanwhile: int = 0
    is_killed: bool = False


STRETCHES = st.builds(
    Stretch,
    MOVES,
    st.booleans(),
    st.sampled_from([70, 50, 31, 7]),
    st.sampled_from([0, 0, 1, -1]),
    st.sampled_from([False, False, False, True]),
)


def live(folder: Path, stretches: list[Stretch]) -> Device:
    (folder / "usage.json").unlink(missing_ok=True)
    device = Device(folder / "usage.json")
    for stretch in stretches:
        device.shown += timedelta(days=stretch.move)
        device.policy.why_not()
        if stretch.is_restarted:
            device.start()
        if stretch.is_killed:
            device.be_killed_while_training(min(stretch.seconds, 5))
        else:
            device.train(stretch.seconds, timedelta(days=stretch.move_meanwhile))
    return device


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(stretches=st.lists(STRETCHES, min_size=3, max_size=8))
def test_no_date_that_the_clock_shows_has_more_than_a_days_training(tmp_path: Path, stretches: list[Stretch]) -> None:
    trained = live(tmp_path, stretches).trained
    # A kill may come up to 5 s after the last question here, whereas an unbroken training stops on the second.
    assert max(trained.values(), default=0.0) <= LIMIT_S + 5


CLOCK_GOES_THERE_AND_BACK = [Stretch(0, False, 70), Stretch(-1, False, 70), Stretch(1, False, 70)]


def test_a_clock_that_is_set_back_and_forth_gives_no_second_budget(tmp_path: Path) -> None:
    assert live(tmp_path, CLOCK_GOES_THERE_AND_BACK).trained == {DAY: LIMIT_S}


def test_without_the_defence_the_same_clock_gives_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "day_that_counts", lambda latest, shown: shown)
    device = live(tmp_path, CLOCK_GOES_THERE_AND_BACK)
    assert device.trained == {DAY: 2 * LIMIT_S, DAY - timedelta(days=1): LIMIT_S}


def test_a_date_that_is_only_shown_costs_nothing(tmp_path: Path) -> None:
    device = live(tmp_path, [Stretch(0, False, 30), Stretch(900, False, 0), Stretch(-900, False, 0)])
    assert device.usage.today() == Usage(DAY, 30.0)


def test_a_day_begins_at_midnight_also_while_training(tmp_path: Path) -> None:
    device = Device(tmp_path / "usage.json")
    device.train(50, moves=timedelta(days=1))
    assert device.trained == {DAY: 26, DAY + timedelta(days=1): 24}
    assert device.usage.today().day == DAY + timedelta(days=1)
    assert device.usage.today().seconds <= 25


def test_what_was_counted_is_there_after_a_restart(tmp_path: Path) -> None:
    device = Device(tmp_path / "usage.json")
    device.train(50)
    device.usage.contributed()
    device.start()
    assert device.usage.today() == Usage(DAY, 50.0, 1)


def test_asking_writes_nothing(tmp_path: Path) -> None:
    device = Device(tmp_path / "usage.json")
    assert device.policy.why_not() is None
    assert list(tmp_path.iterdir()) == []


def test_two_trainings_at_once_are_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    device = Device(tmp_path / "usage.json")
    with device.usage.training():
        with pytest.raises(StateError, match="one round at a time"), device.usage.training():
            raise AssertionError("the second has begun")
        device.elapsed += 7
    assert device.usage.today().seconds == 7


def test_an_error_inside_a_training_is_counted_and_passed_on(tmp_path: Path) -> None:
    device = Device(tmp_path / "usage.json")
    with pytest.raises(ZeroDivisionError), device.usage.training():
        device.elapsed += 7
        raise ZeroDivisionError
    assert json.loads(device.path.read_text())["seconds"] == 7


def test_the_disk_is_ahead_of_the_training_and_exact_after_it(tmp_path: Path) -> None:
    device = Device(tmp_path / "usage.json")
    with device.usage.training():
        assert json.loads(device.path.read_text())["seconds"] == STEP_S
        for _ in range(100):
            device.elapsed += 1
            used_s = device.usage.today().seconds
            on_disk_s = json.loads(device.path.read_text())["seconds"]
            assert used_s < on_disk_s <= used_s + STEP_S
        device.usage.contributed()
        assert used_s < json.loads(device.path.read_text())["seconds"]
    assert json.loads(device.path.read_text()) == {
        "day": "2026-03-04",
        "seconds": 100.0,
        "contributions": 1,
        "problem": None,
    }


TRAINS = """
import sys, time
from pathlib import Path
from fedmini.conditions import DailyUsage
usage = DailyUsage(Path(sys.argv[1]), step_s=0.2)
with usage.training():
    began = time.monotonic()
    while True:
        print(time.monotonic() - began, flush=True)
        time.sleep(0.01)
"""


def test_a_kill_loses_nothing_and_counts_at_most_a_step_too_much(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    child = subprocess.Popen([sys.executable, "-c", TRAINS, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = next(line for line in child.stdout if json.loads(path.read_text())["seconds"] >= 0.5)
    child.kill()
    rest = child.stdout.read().split()
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    counted = DailyUsage(path).today().seconds
    assert counted >= 0.5
    assert counted <= float(rest[-1] if rest else said) + 5
    assert DailyUsage(path).today().problem is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"day": "2026-03-04"}',
        b'{"day": "2026-13-04", "seconds": 1, "contributions": 0, "problem": null}',
        b'{"day": 5, "seconds": 1, "contributions": 0, "problem": null}',
        b'{"day": "2026-03-04", "seconds": -1, "contributions": 0, "problem": null}',
        b'{"day": "2026-03-04", "seconds": NaN, "contributions": 0, "problem": null}',
        b'{"day": "2026-03-04", "seconds": Infinity, "contributions": 0, "problem": null}',
        b'{"day": "2026-03-04", "seconds": true, "contributions": 0, "problem": null}',
        b'{"day": "2026-03-04", "seconds": 1, "contributions": -1, "problem": null}',
        b'{"day": "2026-03-04", "seconds": 1, "contributions": 0.5, "problem": null}',
        b'{"day": "2026-03-04", "seconds": 1, "contributions": 0, "problem": []}',
        b'{"day": "2026-03-04", "seconds": 1, "contributions": 0, "problem": null, "more": 1}',
    ],
)
def test_a_damaged_file_is_a_problem_until_its_day_is_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "usage.json").write_bytes(content)
    device = Device(tmp_path / "usage.json")
    assert device.usage.today() == Usage(DAY, problem="damaged")
    device.usage.contributed()  # the owner may have set no limit
    device.start()
    assert device.usage.today() == Usage(DAY, contributions=1, problem="damaged")
    device.shown += timedelta(days=1)
    assert device.usage.today() == Usage(DAY + timedelta(days=1))
    device.train(5)
    device.start()
    assert device.usage.today() == Usage(DAY + timedelta(days=1), 5.0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=st.binary(max_size=80))
def test_no_content_of_the_file_ends_the_device(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "usage.json").write_bytes(content)
    assert Device(tmp_path / "usage.json").usage.today().problem == "damaged"


def test_a_file_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "usage.json").mkdir()
    with pytest.raises(StateError, match="can't read"):
        Device(tmp_path / "usage.json")


def test_a_disk_that_refuses_stops_training_until_it_takes_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "device"
    folder.mkdir()
    device = Device(folder / "usage.json")
    with device.usage.training():
        folder.rename(tmp_path / "away")
        device.elapsed += 26
        assert device.usage.today() == Usage(DAY, 26.0, problem="unwritable")
        said = device.policy.why_not()
    assert said == "it can't write down how long it trains, until there is room for usage.json on its disk"
    (tmp_path / "away").rename(folder)
    assert device.usage.today() == Usage(DAY, 26.0)
    assert json.loads(device.path.read_text())["seconds"] == 26


def test_nothing_begins_that_cannot_be_written_down(tmp_path: Path) -> None:
    device = Device(tmp_path / "none" / "usage.json")
    with pytest.raises(StateError, match="nothing was trained"), device.usage.training():
        raise AssertionError("it has begun")
    with pytest.raises(StateError, match="the contribution was not counted"):
        device.usage.contributed()
    assert device.usage.today() == Usage(DAY, problem="unwritable")
