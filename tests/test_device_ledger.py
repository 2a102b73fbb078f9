"""A device's own ledger: over all its runs, before anything leaves. Each refusal has a twin without it."""

import itertools
import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.errors import FedMiniError, PrivacyBudgetError, ProtocolError, StateError
from fedmini.privacy import accounting, chain, device_ledger
from fedmini.privacy.device_ledger import DeviceLedger, DeviceRelease, LifetimeLimits
from fedmini.types import PrivacyEvent
from tests import ledger_faults

DEVICE = PrivacyEvent("device", "shared", 3.0, 1.0, 1, 0.5)
EXAMPLE = PrivacyEvent("example", "local", 5.0, 0.5, 1, 0.25)
LOUD = replace(DEVICE, z_eff=1.5)
DELTA = 1e-5
LIMITS = LifetimeLimits(10.0, DELTA)


def release(round_num: int, attempt: int = 0, **changes) -> DeviceRelease:
    """A release of run "run", which allows 100 in any rounds; `changes` replaces fields."""
    usual = DeviceRelease("run", round_num, attempt, "a" * 64, (DEVICE,), 100, 1, is_seeded=False)
    return replace(usual, **changes)


def gaussian(count: int, event: PrivacyEvent = DEVICE) -> float:
    return accounting.epsilon(event, count, DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.jsonl"


# What is counted.


def test_epsilon_is_that_of_all_runs_composed_whatever_their_noise(path):
    with DeviceLedger.open(path) as ledger:
        assert ledger.epsilon("device", DELTA) == 0.0
        ledger.debit(release(1), LIMITS)
        ledger.debit(release(2), LIMITS)
        ledger.debit(release(1, run_id="another", events=(LOUD,)), LIMITS)
        together = accounting.compose([(DEVICE, 2), (LOUD, 1)], DELTA)
        assert ledger.epsilon("device", DELTA) == together > gaussian(2)
        assert (ledger.num_participations("run"), ledger.num_participations("another")) == (2, 1)
        assert ledger.num_participations("never joined") == 0
    with DeviceLedger.open(path) as ledger:
        assert ledger.epsilon("device", DELTA) == together


def test_the_two_units_are_never_added_up(path):
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1, events=(EXAMPLE, DEVICE)), LIMITS)
        ledger.debit(release(1, run_id="another", events=(EXAMPLE,)), LIMITS)
        assert ledger.epsilon("device", DELTA) == gaussian(1)
        assert ledger.epsilon("example", DELTA) == gaussian(2, EXAMPLE)
        assert ledger.num_participations("run") == 1


def test_receipts_say_what_left_in_which_run_and_under_which_manifest(path):
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(3, attempt=1, events=(EXAMPLE, DEVICE)), LIMITS)
        ledger.debit(release(1, run_id="another", is_seeded=True), LIMITS)
        first, second = ledger.releases()
    assert (first.run_id, first.round_num, first.attempt, first.manifest_hash) == ("run", 3, 1, "a" * 64)
    assert first.events == (EXAMPLE, DEVICE)
    assert (first.is_seeded, second.is_seeded) == (False, True)
    assert not first.is_recovered


@pytest.mark.parametrize("events", [(), (DEVICE, LOUD)])
def test_what_cannot_be_accounted_for_is_refused(path, events):
    with DeviceLedger.open(path) as ledger, pytest.raises(ProtocolError, match="one event for each protected unit"):
        ledger.debit(release(1, events=events), LIMITS)
    assert path.read_bytes() == b""


# A round comes once.


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=12))
def test_only_what_is_later_than_everything_before_is_debited(tmp_path_factory, attempts):
    path = tmp_path_factory.mktemp("device") / "device.jsonl"
    with DeviceLedger.open(path) as ledger:
        done: list[tuple[int, int]] = []
        for attempt in attempts:
            if not done or attempt > max(done):
                ledger.check_new("run", *attempt)
                ledger.debit(release(*attempt), LIMITS)
                done.append(attempt)
                continue
            with pytest.raises(ProtocolError, match="was the server restored from a backup"):
                ledger.check_new("run", *attempt)
            with pytest.raises(ProtocolError, match="was the server restored from a backup"):
                ledger.debit(release(*attempt), LIMITS)
        assert [(receipt.round_num, receipt.attempt) for receipt in ledger.releases()] == done
        ledger.check_new("another run", 1, 0)


def test_twin_without_the_check_one_attempt_is_answered_twice(path, monkeypatch):
    """A server put back to yesterday asks for round 1 again, gets another draw of the noise, and can average the two."""
    monkeypatch.setattr(DeviceLedger, "check_new", lambda self, run_id, round_num, attempt: None)
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1), LIMITS)
        ledger.debit(release(1), LIMITS)
        assert ledger.epsilon("device", DELTA) == gaussian(2)
        assert ledger.num_participations("run") == 1, "and the run's own count would not notice"


def test_a_seeded_replay_costs_nothing_and_anything_else_is_refused(path):
    seeded = release(2, events=(EXAMPLE, DEVICE), is_seeded=True)
    with DeviceLedger.open(path) as ledger:
        assert not ledger.is_replay(seeded)
        ledger.debit(seeded, LIMITS)
        ledger.debit(replace(seeded, round_num=3), LIMITS)
        before = path.read_bytes()
        assert ledger.is_replay(seeded)
        ledger.debit(seeded, LIMITS)  # also where a later one came in between
        assert path.read_bytes() == before
        for other in (
            replace(seeded, is_seeded=False),
            replace(seeded, manifest_hash="b" * 64),
            replace(seeded, events=(EXAMPLE, LOUD)),
            replace(seeded, events=(EXAMPLE,)),
        ):
            assert not ledger.is_replay(other)
            with pytest.raises(ProtocolError):
                ledger.debit(other, LIMITS)
        assert path.read_bytes() == before


def test_in_a_deployment_nothing_is_a_replay(path):
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1), LIMITS)
        assert not ledger.is_replay(release(1))


def test_a_replay_completes_an_attempt_whose_second_line_was_lost(path):
    seeded = release(1, events=(EXAMPLE, DEVICE), is_seeded=True)
    with DeviceLedger.open(path) as ledger:
        ledger.debit(seeded, LIMITS)
    whole = path.read_bytes()
    first, _ = whole.splitlines(keepends=True)
    path.write_bytes(first)
    with DeviceLedger.open(path) as ledger:
        ledger.debit(seeded, LIMITS)
    assert path.read_bytes() == whole


# Not more often, and not sooner, than the manifest says.


def test_a_device_is_in_a_run_as_often_as_its_manifest_allows_repeated_attempts_included(path):
    with DeviceLedger.open(path) as ledger:
        for round_num, attempt in ((1, 0), (1, 1), (2, 0)):
            ledger.debit(release(round_num, attempt, max_participations=3), LIMITS)
        with pytest.raises(ProtocolError, match="at most 3 contributions"):
            ledger.debit(release(3, max_participations=3), LIMITS)
        ledger.debit(release(1, run_id="another", max_participations=1), LIMITS)


def test_twin_without_the_count_a_run_costs_more_than_its_manifest_said(path, monkeypatch):
    promised = gaussian(3)
    monkeypatch.setattr(device_ledger, "check_participations", lambda release, num_done: None)
    with DeviceLedger.open(path) as ledger:
        for round_num in range(1, 6):
            ledger.debit(release(round_num, max_participations=3), LIMITS)
        assert ledger.epsilon("device", DELTA) > promised


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2)), max_size=15).map(sorted), st.integers(1, 5))
def test_participations_are_apart_but_for_another_attempt_at_the_same_round(tmp_path_factory, attempts, min_separation):
    path = tmp_path_factory.mktemp("device") / "device.jsonl"
    with DeviceLedger.open(path) as ledger:
        for round_num, attempt in attempts:
            try:
                ledger.debit(release(round_num, attempt, min_separation=min_separation), LIMITS)
            except ProtocolError as error:
                assert "rounds or more since" in str(error) or "was the server restored" in str(error)
        rounds = sorted({receipt.round_num for receipt in ledger.releases()})
    assert all(later - earlier >= min_separation for earlier, later in itertools.pairwise(rounds))
    assert not attempts or len(rounds) >= 1


def test_twin_without_the_separation_a_device_is_asked_every_round(path, monkeypatch):
    monkeypatch.setattr(device_ledger, "check_separation", lambda release, latest: None)
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1, min_separation=3), LIMITS)
        ledger.debit(release(2, min_separation=3), LIMITS)
        assert ledger.num_participations("run") == 2


# A lifetime.


def test_the_release_that_would_pass_the_lifetime_limit_is_refused_and_nothing_is_written(path):
    """z = 3 and delta = 1e-5: the limit is what ten releases cost, made here by two runs; an eleventh passes it."""
    limits = LifetimeLimits(gaussian(10), DELTA)
    with DeviceLedger.open(path) as ledger:
        for index in range(10):
            ledger.debit(release(index // 2 + 1, run_id=f"run {index % 2}"), limits)
        before = path.read_bytes()
        with pytest.raises(PrivacyBudgetError, match="a lifetime device epsilon of at most"):
            ledger.debit(release(1, run_id="the third"), limits)
        assert path.read_bytes() == before
        ledger.debit(release(1, run_id="the third", events=(EXAMPLE,)), limits)  # the other unit has its own


def test_twin_without_the_limit_many_modest_runs_leave_nothing_private(path, monkeypatch):
    monkeypatch.setattr(device_ledger, "check_lifetime", lambda past, event, num_left, limits: None)
    with DeviceLedger.open(path) as ledger:
        for index in range(40):
            ledger.debit(release(1, run_id=f"run {index}"), LIMITS)
        assert gaussian(1) < 2
        assert ledger.epsilon("device", DELTA) > LIMITS.lifetime_epsilon


def test_where_one_unit_has_nothing_left_neither_unit_is_debited(path):
    limits = LifetimeLimits(gaussian(1), DELTA)
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1), limits)
        before = path.read_bytes()
        with pytest.raises(PrivacyBudgetError, match="device"):
            ledger.debit(release(2, events=(replace(EXAMPLE, z_eff=50.0), DEVICE)), limits)
        assert path.read_bytes() == before
        assert ledger.epsilon("example", DELTA) == 0.0


EVENTS = st.sampled_from([DEVICE, LOUD, EXAMPLE])


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), EVENTS), min_size=1, max_size=8),
    st.sampled_from([1.0, 2.5, 5.0]),
    st.sampled_from([1, 3, 100]),
)
def test_no_history_passes_the_limit_and_none_is_refused_that_would_not(
    tmp_path_factory, history, most, max_participations
):
    path = tmp_path_factory.mktemp("device") / "device.jsonl"
    limits = LifetimeLimits(most, DELTA)
    with DeviceLedger.open(path) as ledger:
        spent: dict[str, list[tuple[PrivacyEvent, int]]] = {"example": [], "device": []}
        for round_num, (run_id, event) in enumerate(history, 1):
            asked = release(round_num, run_id=run_id, events=(event,), max_participations=max_participations)
            after = accounting.compose([*spent[event.unit], (event, 1)], DELTA)
            try:
                ledger.debit(asked, limits)
            except PrivacyBudgetError:
                assert after > most
            except ProtocolError:
                assert ledger.num_participations(run_id) == max_participations
            else:
                assert after <= most
                spent[event.unit].append((event, 1))
        for unit in ("example", "device"):
            assert ledger.epsilon(unit, DELTA) == accounting.compose(spent[unit], DELTA) <= most


@pytest.mark.parametrize(
    ("most", "max_participations", "num_computed"), [(10.0, 30, 1), (5.0, 1000, 25), (math.inf, 1000, 0)]
)
def test_the_accountant_works_once_for_many_like_debits(path, most, max_participations, num_computed):
    """An epsilon takes tenths of a second: the whole run's is computed first, and where that fits nothing else is."""
    event = replace(DEVICE, z_eff=10.0)
    accounting._epsilon_of.cache_clear()
    num_debited = 0
    with DeviceLedger.open(path) as ledger:
        for round_num in range(1, 101):
            asked = release(round_num, events=(event,), max_participations=max_participations)
            try:
                ledger.debit(asked, LifetimeLimits(most, DELTA))
            except (PrivacyBudgetError, ProtocolError):
                break
            num_debited += 1
    assert num_debited in (30, 100)
    assert accounting._epsilon_of.cache_info().misses <= num_computed


# The file.


def test_a_second_process_is_refused(path):
    with DeviceLedger.open(path), pytest.raises(StateError, match="in use by another process"):
        DeviceLedger.open(path)
    DeviceLedger.open(path).close()


def test_a_closed_ledger_refuses_a_debit(path):
    ledger = DeviceLedger.open(path)
    ledger.close()
    with pytest.raises(StateError, match="closed"):
        ledger.debit(release(1), LIMITS)


def filled(path: Path) -> bytes:
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1, events=(EXAMPLE, DEVICE)), LIMITS)
        ledger.debit(release(2, events=(EXAMPLE, DEVICE)), LIMITS)
        ledger.debit(release(1, run_id="another"), LIMITS)
    return path.read_bytes()


@given(st.data())
def test_a_flipped_byte_is_refused_wherever_it_is(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "device.jsonl"
    content = bytearray(filled(path))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"line [1-5] was changed"):
        DeviceLedger.open(path)
    assert path.read_bytes() == bytes(content)


@settings(max_examples=60)
@given(st.data())
def test_a_cut_last_line_counts_as_spent(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "device.jsonl"
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1), LIMITS)
        num_whole = len(path.read_bytes())
        ledger.debit(release(2), LIMITS)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(num_whole + 1, len(content) - 2))])
    with DeviceLedger.open(path) as ledger:
        assert ledger.epsilon("device", DELTA) == gaussian(2)
        assert ledger.num_participations("run") == 2
        assert [receipt.is_recovered for receipt in ledger.releases()] == [False, True]
        ledger.debit(release(3, max_participations=3), LIMITS)
        with pytest.raises(ProtocolError, match="at most 3 contributions"):
            ledger.debit(release(4, max_participations=3), LIMITS)


def test_twin_without_the_recovery_a_cut_line_is_free(path, monkeypatch):
    with DeviceLedger.open(path) as ledger:
        ledger.debit(release(1), LIMITS)
        ledger.debit(release(2), LIMITS)
    path.write_bytes(path.read_bytes()[:-9])
    monkeypatch.setattr(chain, "lost_entries", lambda lines, line_format: [])
    with DeviceLedger.open(path) as ledger:
        assert ledger.epsilon("device", DELTA) == gaussian(1)


def test_a_cut_first_line_says_what_to_do(path):
    path.write_bytes(b'{"seq":1')
    with pytest.raises(StateError, match="remove the file if this device has never taken part"):
        DeviceLedger.open(path)


SCRIPT = """
import sys
from pathlib import Path
from fedmini.privacy.device_ledger import DeviceLedger, DeviceRelease, LifetimeLimits
from fedmini.types import PrivacyEvent
path, limits = Path(sys.argv[1]), LifetimeLimits(float("inf"), 1e-5)
ledger = DeviceLedger.open(path)
def debit(round_num):
    event = PrivacyEvent("device", "shared", 3.0, 1.0, 1, 0.5)
    ledger.debit(DeviceRelease("run", round_num, 0, "a" * 64, (event,), 10**6, 1, False), limits)
"""
DEBIT_FOREVER = f"""{SCRIPT}
{ledger_faults.ACKNOWLEDGE}
round_num = ledger.num_participations("run")
while True:
    round_num += 1
    debit(round_num)
    acknowledge(round_num)
"""
FILL_THE_DISK = f"""{SCRIPT}
{ledger_faults.LEAVE_ROOM}
debit(1)
for room in (0, 1, 200):
    leave_room(path, room)
    try:
        debit(2)
    except Exception as error:
        print(type(error).__name__, ledger.num_participations("run"))
leave_room(path, None)
debit(2)
"""


def test_a_kill_in_the_middle_of_debits_loses_nothing_that_was_acknowledged(path):
    num_before = 0
    for kill_after_s in ledger_faults.KILL_AFTER_S:
        acknowledged = ledger_faults.last_acknowledged(DEBIT_FOREVER, path, kill_after_s)
        assert acknowledged > num_before
        with DeviceLedger.open(path) as ledger:
            num_before = ledger.num_participations("run")
        assert num_before >= acknowledged


def test_twin_acknowledged_from_memory_a_kill_makes_contributions_free(path):
    acknowledged = ledger_faults.last_acknowledged(ledger_faults.KEEP_IN_MEMORY + DEBIT_FOREVER, path, 0.01)
    with DeviceLedger.open(path) as ledger:
        assert ledger.num_participations("run") < acknowledged


def test_a_full_disk_refuses_the_debit_loses_nothing_and_recovers_with_space(path):
    assert ledger_faults.output_of(FILL_THE_DISK, path) == ["StateError 1"] * 3
    with DeviceLedger.open(path) as ledger:
        assert ledger.num_participations("run") == 2


# What is asked before it is paid for.

SMALL = LifetimeLimits(2.5 * gaussian(1), DELTA)


@st.composite
def wishes(draw) -> DeviceRelease:
    """A release that a server could ask for, good or not."""
    events = draw(st.sampled_from([(DEVICE,), (DEVICE,), (LOUD,), (EXAMPLE, DEVICE), (), (DEVICE, LOUD)]))
    changes = {"events": events, "run_id": draw(st.sampled_from(["run", "another"])), "max_participations": 3}
    return release(draw(st.integers(1, 9)), draw(st.integers(0, 1)), min_separation=2, **changes)


@settings(max_examples=30)
@given(st.lists(st.tuples(wishes(), st.booleans()), max_size=8))
def test_what_is_checked_is_exactly_what_would_be_debited(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("device") / "device.jsonl"
    with DeviceLedger.open(path) as ledger:
        for one, is_seeded in wanted:
            asked = replace(one, is_seeded=is_seeded)
            before = path.read_bytes()
            found = refused_with(lambda asked=asked: ledger.check(asked, SMALL))
            assert path.read_bytes() == before, "a check writes nothing"
            assert found == refused_with(lambda asked=asked: ledger.debit(asked, SMALL))
            assert (path.read_bytes() == before) or found is None


def refused_with(action) -> tuple[type, str] | None:
    try:
        action()
    except FedMiniError as error:
        return type(error), str(error)
    return None


def test_threads_of_one_process_take_turns(path):
    """One shows what was spent while another is about to contribute: neither refuses the other."""
    opened, failed = threading.Barrier(4), []

    def debit(run_id: str) -> None:
        try:
            opened.wait(20)
            for round_num in range(1, 6):
                with DeviceLedger.open(path) as ledger:
                    ledger.debit(release(round_num, run_id=run_id), LifetimeLimits(math.inf, DELTA))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=debit, args=(f"run-{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    with DeviceLedger.open(path) as ledger:
        assert len(ledger.releases()) == 20
