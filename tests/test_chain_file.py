"""The file under both ledgers: what was acknowledged is there, what was changed is refused; a twin without each defence."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmini.errors import StateError
from fedmini.privacy import chain
from fedmini.privacy.chain import GENESIS, Line, LineFormat
from fedmini.privacy.chain_file import ChainFile
from fedmini.types import LedgerPosition
from tests import ledger_faults

LINES = LineFormat(("state", "unit", "amount"), "start again")


def entry(amount: int, unit: str = "device") -> Line:
    return {"state": "DEBITED", "unit": unit, "amount": amount}


def filled(path: Path, *amounts: int) -> LedgerPosition:
    file = ChainFile.open(path, LINES)
    for amount in amounts:
        file.append([entry(amount)])
    file.close()
    return file.position


def amounts_in(path: Path) -> list[int]:
    file = ChainFile.open(path, LINES)
    file.close()
    return [line["amount"] for line in file.lines]


# What was appended is there.


@given(st.lists(st.lists(st.integers(), max_size=3), max_size=6), st.integers(0, 6))
def test_all_that_was_appended_is_there_in_order_however_often_it_was_opened(tmp_path_factory, batches, reopen_at):
    path = tmp_path_factory.mktemp("chain") / "ledger.jsonl"
    file = ChainFile.open(path, LINES)
    for index, batch in enumerate(batches):
        if index == reopen_at:
            file.close()
            file = ChainFile.open(path, LINES)
        written = file.append([entry(amount) for amount in batch])
        assert [line["amount"] for line in written] == batch
    position = file.position
    file.close()
    assert amounts_in(path) == [amount for batch in batches for amount in batch]
    reopened = ChainFile.open(path, LINES)
    assert reopened.position == position
    reopened.verify(position)
    reopened.close()


def test_a_new_file_is_empty_and_for_its_owner_only(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert filled(path) == LedgerPosition(0, GENESIS)
    assert path.stat().st_mode & 0o777 == 0o600


SCRIPT = """
import sys
from pathlib import Path
from fedmini.privacy.chain import LineFormat
from fedmini.privacy.chain_file import ChainFile
path = Path(sys.argv[1])
file = ChainFile.open(path, LineFormat(("state", "unit", "amount"), "start again"))
def append(amount):
    file.append([{"state": "DEBITED", "unit": "device", "amount": amount}])
"""
APPEND_FOREVER = f"""{SCRIPT}
{ledger_faults.ACKNOWLEDGE}
while True:
    append(len(file.lines) + 1)
    acknowledge(len(file.lines))
"""


def test_a_kill_in_the_middle_of_appends_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "ledger.jsonl"
    num_before = 0
    for kill_after_s in ledger_faults.KILL_AFTER_S:
        acknowledged = ledger_faults.last_acknowledged(APPEND_FOREVER, path, kill_after_s)
        assert acknowledged > num_before
        num_before = len(amounts_in(path))
        assert num_before >= acknowledged


def test_twin_acknowledged_from_memory_a_kill_loses_lines(tmp_path):
    path = tmp_path / "ledger.jsonl"
    acknowledged = ledger_faults.last_acknowledged(ledger_faults.KEEP_IN_MEMORY + APPEND_FOREVER, path, 0.01)
    assert len(amounts_in(path)) < acknowledged


FILL_THE_DISK = f"""{SCRIPT}
{ledger_faults.LEAVE_ROOM}
append(1)
for room in (0, 1, 60):
    leave_room(path, room)
    try:
        append(2)
    except Exception as error:
        print(type(error).__name__, len(file.lines))
leave_room(path, None)
append(3)
"""
WITHOUT_UNDO = """
from fedmini.privacy.chain_file import ChainFile
ChainFile._undo = lambda self: None
"""


def test_a_full_disk_refuses_the_append_loses_nothing_and_recovers_with_space(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert ledger_faults.output_of(FILL_THE_DISK, path) == ["StateError 1"] * 3
    assert amounts_in(path) == [1, 3]


def test_twin_without_the_undo_half_a_line_ruins_the_file(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert ledger_faults.output_of(WITHOUT_UNDO + FILL_THE_DISK, path) == ["StateError 1"] * 3
    with pytest.raises(StateError, match="line 2 was changed"):
        amounts_in(path)


def test_a_file_that_cannot_undo_half_a_line_closes_itself(tmp_path, monkeypatch):
    """The disk fails twice: what is on it is unknown, so nothing goes on without a verification from the start."""
    path = tmp_path / "ledger.jsonl"
    file = ChainFile.open(path, LINES)

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StateError, match="can't write the ledger"):
        file.append([entry(1)])
    monkeypatch.undo()
    with pytest.raises(StateError, match="could not be kept whole"):
        file.append([entry(1)])
    assert amounts_in(path) in ([], [1])


def test_a_closed_file_refuses_and_closing_twice_is_fine(tmp_path):
    file = ChainFile.open(tmp_path / "ledger.jsonl", LINES)
    file.close()
    file.close()
    with pytest.raises(StateError, match="closed"):
        file.append([entry(1)])


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(StateError, match="can't open the ledger"):
        ChainFile.open(tmp_path / "no" / "ledger.jsonl", LINES)


# What was changed is refused.


@given(st.data())
def test_a_flipped_byte_is_refused_wherever_it_is(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "ledger.jsonl"
    filled(path, 10, 20, 30)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"line [1-3] was changed"):
        amounts_in(path)
    assert path.read_bytes() == bytes(content)  # what was found is left for whoever looks into it


def test_twin_without_the_check_a_changed_number_in_the_last_line_is_believed(tmp_path, monkeypatch):
    """What `check` is for: no later line holds the hash of the last one."""
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(chain, "_check", lambda line: "unchecked")
    filled(path, 10, 20)
    path.write_bytes(path.read_bytes().replace(b'"amount":20', b'"amount":2'))
    assert amounts_in(path) == [10, 2]


def exchange_first_line(path: Path, other: Path) -> None:
    """Put the first line of another file, whole and checked, into the place of this one's."""
    first, *_ = other.read_bytes().splitlines(keepends=True)
    _, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, *rest]))


def test_a_line_exchanged_for_another_whole_one_is_refused(tmp_path):
    filled(tmp_path / "ledger.jsonl", 10, 20)
    filled(tmp_path / "other.jsonl", 1)
    exchange_first_line(tmp_path / "ledger.jsonl", tmp_path / "other.jsonl")
    with pytest.raises(StateError, match="line 2 was changed or doesn't follow"):
        amounts_in(tmp_path / "ledger.jsonl")


def test_twin_without_the_links_an_exchanged_line_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "position", lambda lines, seq: LedgerPosition(seq, GENESIS))
    monkeypatch.setattr(chain, "link", _link_to_nothing)
    filled(tmp_path / "ledger.jsonl", 10, 20)
    filled(tmp_path / "other.jsonl", 1)
    exchange_first_line(tmp_path / "ledger.jsonl", tmp_path / "other.jsonl")
    assert amounts_in(tmp_path / "ledger.jsonl") == [1, 20]


def _link_to_nothing(lines, entries):
    linked = [{"seq": len(lines) + 1 + index, "prev": GENESIS, **entry} for index, entry in enumerate(entries)]
    return [{**line, "check": chain._check(line)} for line in linked]


def test_a_line_of_another_kind_of_ledger_is_refused(tmp_path):
    filled(tmp_path / "ledger.jsonl", 10)
    with pytest.raises(StateError, match="line 1 was changed"):
        ChainFile.open(tmp_path / "ledger.jsonl", chain.RUN_LINES)


# What was cut counts.


@given(st.data())
def test_a_cut_last_line_counts_as_the_last_one_of_each_unit_once_more(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "ledger.jsonl"
    file = ChainFile.open(path, LINES)
    file.append([entry(1, "example"), entry(2, "device"), entry(3, "example")])
    num_whole = len(path.read_bytes())
    file.append([entry(4)])
    file.close()
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(num_whole + 1, len(content) - 2))])
    reopened = ChainFile.open(path, LINES)
    found = [(line["state"], line["unit"], line["amount"]) for line in reopened.lines[3:]]
    assert found == [("RECOVERED", "example", 3), ("RECOVERED", "device", 2)]
    reopened.append([entry(5)])
    reopened.close()
    assert amounts_in(path) == [1, 2, 3, 3, 2, 5]
    assert list(path.parent.iterdir()) == [path]


def test_twin_without_the_recovery_a_cut_line_is_forgotten(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    filled(path, 10, 20)
    path.write_bytes(path.read_bytes()[:-5])
    monkeypatch.setattr(chain, "lost_entries", lambda lines, line_format: [])
    assert amounts_in(path) == [10]


def test_where_the_first_line_is_cut_nobody_knows_and_the_message_says_what_to_do(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"seq":1,"pr')
    with pytest.raises(StateError, match=r"line 1 is cut .* start again"):
        ChainFile.open(path, LINES)
    assert path.read_bytes() == b'{"seq":1,"pr'


def test_lines_that_are_refused_are_not_touched_even_where_the_last_one_is_cut(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path, 10, 20)
    cut = path.read_bytes()[:-5]
    path.write_bytes(cut)

    def refuse(lines):
        raise StateError(f"{lines[0]['amount']} belongs to somebody else")

    with pytest.raises(StateError, match="10 belongs to somebody else"):
        ChainFile.open(path, LINES, refuse)
    assert path.read_bytes() == cut
    assert amounts_in(path) == [10, 10]  # and the lock was given back


REPAIR_ON_A_FULL_DISK = f"""{ledger_faults.LEAVE_ROOM}
import sys
from pathlib import Path
from fedmini.privacy.chain import LineFormat
from fedmini.privacy.chain_file import ChainFile
path = Path(sys.argv[1])
leave_room(path, -20)
try:
    ChainFile.open(path, LineFormat(("state", "unit", "amount"), "start again"))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_repair_that_finds_no_space_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path, 10, 20)
    cut = path.read_bytes()[:-5]
    path.write_bytes(cut)
    (answer,) = ledger_faults.output_of(REPAIR_ON_A_FULL_DISK, path)
    assert answer.startswith("StateError can't repair the ledger")
    assert path.read_bytes() == cut
    assert amounts_in(path) == [10, 10]
    assert list(tmp_path.iterdir()) == [path]


# Whoever restores a backup, and whoever opens a second time.


def test_yesterdays_backup_is_refused_by_todays_position(tmp_path):
    path = tmp_path / "ledger.jsonl"
    yesterday = filled(path, 10, 20)
    backup = path.read_bytes()
    today = filled(path, 30)
    path.write_bytes(backup)
    file = ChainFile.open(path, LINES)
    file.verify(yesterday)
    with pytest.raises(StateError, match="restored from a backup"):
        file.verify(today)
    file.append([entry(31)])  # as long again, but another line
    with pytest.raises(StateError, match="restored from a backup"):
        file.verify(today)
    file.close()


def test_a_second_opener_is_refused_in_this_process_and_in_another(tmp_path):
    path = tmp_path / "ledger.jsonl"
    file = ChainFile.open(path, LINES)
    with pytest.raises(StateError, match="in use by another process"):
        ChainFile.open(path, LINES)
    answer = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True)
    assert "in use by another process" in answer.stderr
    file.close()
    assert amounts_in(path) == []


def test_twin_without_the_lock_two_writers_ruin_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    path = tmp_path / "ledger.jsonl"
    first, second = ChainFile.open(path, LINES), ChainFile.open(path, LINES)
    first.append([entry(1)])
    second.append([entry(2)])
    first.close()
    second.close()
    with pytest.raises(StateError, match="line 2 was changed or doesn't follow"):
        amounts_in(path)
