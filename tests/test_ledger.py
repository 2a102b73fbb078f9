import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.errors import StateError
from fedmini.privacy import accounting
from fedmini.privacy.chain import GENESIS
from fedmini.privacy.ledger import Ledger, read_ledger
from fedmini.types import LedgerPosition, PrivacyEvent, Roster
from tests import ledger_faults

DEVICE = PrivacyEvent("device", "shared", 3.0, 1.0, 1, 0.5)
EXAMPLE = PrivacyEvent("example", "local", 5.0, 0.5, 1, 0.25)
DELTA = 1e-6


def roster(round_num: int, attempt: int = 0, run_id: str = "run") -> Roster:
    return Roster(run_id, round_num, attempt, ("ann", "bob"))


def filled(path: Path, num_rounds: int, events: tuple[PrivacyEvent, ...] = (DEVICE,)) -> LedgerPosition:
    with Ledger.open(path, "run") as ledger:
        for round_num in range(1, num_rounds + 1):
            ledger.debit(roster(round_num), events, round_num, seeded=False)
        return ledger.position


def gaussian(count: int) -> float:
    return accounting.epsilon(DEVICE, count, DELTA)


def test_epsilon_is_the_largest_participation_times_the_event(tmp_path):
    with Ledger.open(tmp_path / "ledger.jsonl", "run") as ledger:
        assert ledger.epsilon("device", DELTA) == 0.0
        assert ledger.epsilon_after(DEVICE, 1, DELTA) == gaussian(1)
        ledger.debit(roster(1), [DEVICE], 1, seeded=False)
        ledger.debit(roster(2), [DEVICE], 1, seeded=False)  # other devices
        assert ledger.epsilon("device", DELTA) == gaussian(1)
        assert ledger.epsilon_after(DEVICE, 2, DELTA) == gaussian(2)
        ledger.debit(roster(3), [DEVICE], 2, seeded=False)
        assert ledger.epsilon("device", DELTA) == gaussian(2)
        assert ledger.max_participation("device") == 2
        assert ledger.epsilon("example", DELTA) == 0.0
        assert ledger.max_participation("example") == 0


def test_the_two_units_are_never_added_up(tmp_path):
    filled(tmp_path / "ledger.jsonl", 2, (EXAMPLE, DEVICE))
    with Ledger.open(tmp_path / "ledger.jsonl", "run") as ledger:
        assert ledger.num_debits == 2
        assert ledger.position.seq == 4
        assert ledger.epsilon("device", DELTA) == gaussian(2)
        assert ledger.epsilon("example", DELTA) == accounting.epsilon(EXAMPLE, 2, DELTA)


def test_where_events_differ_all_lines_are_composed(tmp_path):
    louder = replace(DEVICE, z_eff=1.5)
    with Ledger.open(tmp_path / "ledger.jsonl", "run") as ledger:
        ledger.debit(roster(1), [DEVICE], 1, seeded=False)
        ledger.debit(roster(2), [DEVICE], 1, seeded=False)
        after = ledger.epsilon_after(louder, 1, DELTA)
        ledger.debit(roster(3), [louder], 1, seeded=False)
        assert ledger.epsilon("device", DELTA) == accounting.compose([(DEVICE, 2), (louder, 1)], DELTA) == after


def test_epsilon_can_be_recomputed_from_the_file_alone(tmp_path):
    filled(tmp_path / "ledger.jsonl", 3)
    lines = read_ledger(tmp_path / "ledger.jsonl")
    assert [line["seq"] for line in lines] == [1, 2, 3]
    assert lines[0]["prev"] == GENESIS
    assert lines[2]["adjacency"] == "one device's contribution to the run replaced by zero"
    event = PrivacyEvent(
        *(lines[2][key] for key in ("unit", "noise", "z_eff", "sampling_rate", "num_steps", "clip_norm"))
    )
    with Ledger.open(tmp_path / "ledger.jsonl", "run") as ledger:
        assert accounting.epsilon(event, lines[2]["participation"], DELTA) == ledger.epsilon("device", DELTA)


def test_a_seeded_replay_costs_nothing_and_anything_else_is_refused(tmp_path):
    with Ledger.open(tmp_path / "ledger.jsonl", "run") as ledger:
        ledger.debit(roster(1), [DEVICE], 1, seeded=True)
        before = ledger.position
        ledger.debit(roster(1), [DEVICE], 1, seeded=True)
        ledger.debit(roster(1), [DEVICE], 0, seeded=True)  # a replay need not know the participation
        assert ledger.position == before
        assert ledger.was_seeded
        other_devices = replace(roster(1), devices=("ann", "eve"))
        for refused, event, seeded in [
            (roster(1), DEVICE, False),
            (other_devices, DEVICE, True),
            (roster(1), replace(DEVICE, z_eff=2.0), True),
        ]:
            with pytest.raises(StateError, match="debited already"):
                ledger.debit(refused, [event], 1, seeded)
        ledger.debit(roster(1, attempt=1), [DEVICE], 2, seeded=True)
        assert (ledger.num_debits, ledger.last_attempt(1), ledger.last_attempt(2)) == (2, 1, None)
        assert ledger.is_debited(1, 1)
        assert not ledger.is_debited(2, 0)


def test_a_deployment_never_debits_an_attempt_twice(tmp_path):
    with Ledger.open(tmp_path / "ledger.jsonl", "run") as ledger:
        ledger.debit(roster(1), [DEVICE], 1, seeded=False)
        with pytest.raises(StateError, match="start a new attempt"):
            ledger.debit(roster(1), [DEVICE], 1, seeded=False)
        with pytest.raises(StateError, match="run 'run'"):
            ledger.debit(roster(2, run_id="another"), [DEVICE], 1, seeded=False)
        with pytest.raises(StateError, match="participation"):
            ledger.debit(roster(2), [DEVICE], 0, seeded=False)
        assert not ledger.was_seeded


def test_another_runs_ledger_and_a_second_process_are_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path, 1)
    with pytest.raises(StateError, match="ledger of run 'run'"):
        Ledger.open(path, "another")
    with Ledger.open(path, "run") as ledger:
        code = (
            "import sys; from pathlib import Path; from fedmini.privacy.ledger import Ledger\n"
            "try: Ledger.open(Path(sys.argv[1]), 'run')\n"
            "except Exception as error: print(type(error).__name__, error)"
        )
        answer = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert answer.stdout.startswith("StateError")
        assert "in use by another process" in answer.stdout
        assert read_ledger(path)[0]["seq"] == 1  # reading needs no lock
        ledger.debit(roster(2), [DEVICE], 2, seeded=False)
    with Ledger.open(path, "run") as ledger:  # and closing released it
        assert ledger.num_debits == 2


def test_a_closed_ledger_refuses_a_debit(tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl", "run")
    ledger.close()
    ledger.close()
    with pytest.raises(StateError, match="closed"):
        ledger.debit(roster(1), [DEVICE], 1, seeded=False)


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    for answer in (lambda: Ledger.open(tmp_path / "no" / "ledger.jsonl", "run"), lambda: read_ledger(tmp_path / "no")):
        with pytest.raises(StateError, match="ledger"):
            answer()


@settings(max_examples=150)
@given(st.data())
def test_a_flipped_byte_is_refused_wherever_it_is(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "ledger.jsonl"
    filled(path, 3, (EXAMPLE, DEVICE))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 5, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    for refuses in (lambda: Ledger.open(path, "run"), lambda: read_ledger(path)):
        with pytest.raises(StateError, match=r"line [1-6] was changed"):
            refuses()
    assert path.read_bytes() == bytes(content)  # what was found is left for whoever looks into it


@settings(max_examples=80)
@given(st.data())
def test_a_cut_ledger_never_says_less_unless_the_checkpoint_refuses_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "ledger.jsonl"
    position = filled(path, 3, (EXAMPLE, DEVICE))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with Ledger.open(path, "run") as ledger:
            ledger.verify(position)
            assert ledger.epsilon("device", DELTA) >= gaussian(3)
    except StateError:
        return


@settings(max_examples=60)
@given(st.data())
def test_a_cut_last_line_counts_as_spent(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tail") / "ledger.jsonl"
    checkpoint = filled(path, 2)
    first = len(path.read_bytes())
    with Ledger.open(path, "run") as ledger:
        ledger.debit(roster(3), [DEVICE], 3, seeded=False)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(first + 1, len(content) - 1))])
    assert len(read_ledger(path)) == 3  # a report shows it too
    with Ledger.open(path, "run") as ledger:
        assert ledger.epsilon("device", DELTA) == gaussian(3)
        ledger.verify(checkpoint)
        ledger.debit(roster(4), [DEVICE], 3, seeded=False)
    repaired = path.read_bytes()
    with Ledger.open(path, "run") as ledger:
        assert ledger.epsilon("device", DELTA) >= gaussian(3)
    assert path.read_bytes() == repaired  # once repaired, whole
    assert [line["state"] for line in read_ledger(path)][2] in ("RECOVERED", "DEBITED")
    assert list(path.parent.iterdir()) == [path]


def test_a_recovered_line_adds_to_the_participation_that_is_reported_afterwards(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path, 2)
    path.write_bytes(path.read_bytes() + b'{"seq":3,"prev":"')
    with Ledger.open(path, "run") as ledger:
        assert read_ledger(path)[2]["state"] == "RECOVERED"
        assert ledger.num_debits == 2
        assert ledger.epsilon("device", DELTA) == gaussian(3)
        assert ledger.epsilon_after(DEVICE, 3, DELTA) == gaussian(4)


def test_a_cut_first_line_is_refused_and_an_empty_ledger_is_fine(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"seq":1,"prev":"000')
    with pytest.raises(StateError, match="line 1 is cut"):
        Ledger.open(path, "run")
    path.write_bytes(b"")
    with Ledger.open(path, "run") as ledger:
        assert ledger.position == LedgerPosition(0, GENESIS)
        ledger.verify(LedgerPosition(0, GENESIS))


def test_a_replay_completes_an_attempt_whose_second_line_was_lost(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, "run") as ledger:
        ledger.debit(roster(1), [EXAMPLE, DEVICE], 1, seeded=True)
    first_line, _ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first_line)
    with Ledger.open(path, "run") as ledger:
        ledger.debit(roster(1), [EXAMPLE, DEVICE], 0, seeded=True)
        assert ledger.epsilon("device", DELTA) == gaussian(1)
        assert ledger.position.seq == 2


def test_yesterdays_backup_is_refused_by_todays_checkpoint(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path, 2)
    backup = path.read_bytes()
    with Ledger.open(path, "run") as ledger:
        ledger.debit(roster(3), [DEVICE], 3, seeded=False)
        today = ledger.position
    path.write_bytes(backup)
    with Ledger.open(path, "run") as ledger:
        with pytest.raises(StateError, match="restored from a backup"):
            ledger.verify(today)
        ledger.debit(roster(3), [replace(DEVICE, z_eff=9.0)], 3, seeded=False)  # as long again, but another line
        with pytest.raises(StateError, match="restored from a backup"):
            ledger.verify(today)


def test_twin_without_the_checks_a_changed_number_in_the_last_line_would_lower_epsilon(tmp_path):
    """What `check` is for: no later line holds the hash of the last one."""
    path = tmp_path / "ledger.jsonl"
    filled(path, 1)
    path.write_bytes(path.read_bytes().replace(b'"z_eff":3.0', b'"z_eff":9.0'))
    assert accounting.epsilon(replace(DEVICE, z_eff=9.0), 1, DELTA) < gaussian(1)
    with pytest.raises(StateError, match="line 1 was changed"):
        Ledger.open(path, "run")


APPEND_FOREVER = f"""{ledger_faults.ACKNOWLEDGE}
from pathlib import Path
from fedmini.privacy.ledger import Ledger
from fedmini.types import PrivacyEvent, Roster
event = PrivacyEvent("device", "shared", 3.0, 1.0, 1, 0.5)
with Ledger.open(Path(sys.argv[1]), "run") as ledger:
    round_num = ledger.num_debits
    while True:
        round_num += 1
        ledger.debit(Roster("run", round_num, 0, ("ann",)), [event], round_num, seeded=False)
        acknowledge(round_num)
"""


def test_a_kill_in_the_middle_of_appends_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "ledger.jsonl"
    num_before = 0
    for kill_after_s in ledger_faults.KILL_AFTER_S:
        acknowledged = ledger_faults.last_acknowledged(APPEND_FOREVER, path, kill_after_s)
        assert acknowledged > num_before
        with Ledger.open(path, "run") as ledger:
            assert ledger.num_debits >= acknowledged
            assert ledger.max_participation("device") >= acknowledged
            num_before = ledger.num_debits


FILL_THE_DISK = f"""{ledger_faults.LEAVE_ROOM}
import sys
from pathlib import Path
from fedmini.privacy.ledger import Ledger
from fedmini.types import PrivacyEvent, Roster
event = PrivacyEvent("device", "shared", 3.0, 1.0, 1, 0.5)
path = Path(sys.argv[1])
with Ledger.open(path, "run") as ledger:
    ledger.debit(Roster("run", 1, 0, ("ann",)), [event], 1, seeded=False)
    size = path.stat().st_size
    for room in (0, 1, 200):
        leave_room(path, room)
        try:
            ledger.debit(Roster("run", 2, 0, ("ann",)), [event], 2, seeded=False)
        except Exception as error:
            print(type(error).__name__, ledger.num_debits, path.stat().st_size == size)
    leave_room(path, None)
    ledger.debit(Roster("run", 2, 0, ("ann",)), [event], 2, seeded=False)
"""


def test_a_full_disk_refuses_the_debit_loses_nothing_and_recovers_with_space(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert ledger_faults.output_of(FILL_THE_DISK, path) == ["StateError 1 True"] * 3
    with Ledger.open(path, "run") as ledger:
        assert ledger.num_debits == 2


def test_a_ledger_that_cannot_undo_half_a_line_closes_itself(tmp_path, monkeypatch):
    """The disk fails twice: what is on it is unknown, so nothing goes on without a verification from the start."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, "run")

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    for _ in range(2):
        with pytest.raises(StateError, match="ledger"):
            ledger.debit(roster(1), [DEVICE], 1, seeded=False)
    monkeypatch.undo()
    with Ledger.open(path, "run") as reopened:
        assert not reopened.is_debited(2, 0)
