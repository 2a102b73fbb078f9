"""The example store under kill -9 and under several processes at once, each of them real."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from stores import IN_MEMORY, open_store, responses

HERE = Path(__file__).resolve().parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}


def started(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / script), *(str(argument) for argument in arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def busy(*each: tuple[object, ...]) -> list[subprocess.Popen[str]]:
    """Processes of busy_store.py that all begin when all are ready."""
    processes = [started("busy_store.py", *arguments) for arguments in each]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("begin\n")
        process.stdin.flush()
    return processes


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.splitlines()


def steps_of(what: str, place: str) -> list[tuple[int, int, int]]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as parent:
        lines = lines_of(started("dying_store.py", what, place, parent))
    return [(int(killed), int(examples), int(keys)) for killed, examples, keys in map(str.split, lines)]


def test_an_erasure_killed_at_any_step_has_happened_wholly_or_not_at_all() -> None:
    steps = steps_of("erase", "file")
    assert [killed for killed, _, _ in steps] == [1] * (len(steps) - 1) + [0]
    counts = [num_examples for _, num_examples, _ in steps]
    # Both are there until one step, and none from it on; there are steps on either side.
    assert counts == [2] * counts.count(2) + [0] * counts.count(0)
    assert counts.count(2) > 5 and counts.count(0) > 5
    assert {num_keys for _, _, num_keys in steps} == {1}


def test_an_erasure_with_the_key_in_a_keyring_is_finished_too_and_the_old_key_is_gone() -> None:
    steps = steps_of("erase", "keyring")
    counts = [num_examples for _, num_examples, _ in steps]
    assert counts == [2] * counts.count(2) + [0] * counts.count(0)
    assert counts.count(2) > 5 and counts.count(0) > 5
    # At most one key more: drawn for the erasure that was killed, and never used.
    assert {num_keys for _, _, num_keys in steps} <= {1, 2} and steps[-1][2] == 1


@pytest.mark.parametrize("place", ["file", "keyring"])
def test_a_store_killed_at_any_step_of_being_made_is_made_by_the_next_opening(place: str) -> None:
    steps = steps_of("make", place)
    assert len(steps) > 10
    assert {num_examples for _, num_examples, _ in steps} == {0}


def test_every_acknowledged_example_is_there_exactly_once_after_each_of_eight_kills(tmp_path: Path) -> None:
    chance = random.Random(8)
    expected: list[str] = []
    for kill in range(8):
        (process,) = busy((tmp_path / "store", kill, 1000, 1, 7))
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(chance.randrange(1, 60))]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout  # not communicate(): it passes over what readline() has buffered
        process.communicate()
        last = lines[-1].strip()
        for line in map(str.strip, lines):
            if line[0] == "+":
                expected.append(line[2:])
            if line[0] == "-":
                expected.clear()
        with open_store(tmp_path / "store") as store:
            found = responses(store)
        outcomes = [expected]
        if last[0] == "?":  # killed before it was acknowledged: whole, or not at all
            outcomes.append([*expected, last[2:]])
        if last[0] == "!":
            outcomes.append([])
        assert found in outcomes, f"kill {kill} after {last}"
        expected = found


def test_two_processes_of_two_threads_lose_and_double_nothing(tmp_path: Path) -> None:
    processes = busy(*((tmp_path / "store", name, 25, 2, 0) for name in ("a", "b")))
    for process in processes:
        assert len(lines_of(process)) == 100
    with open_store(tmp_path / "store") as store:
        found = responses(store)
    for writer in ("a.0", "a.1", "b.0", "b.1"):
        own = [response for response in found if response.startswith(writer)]
        assert own == [f"{writer} {number}" for number in range(25)]
    assert len(found) == 100


def test_one_process_erases_while_another_adds_and_both_go_on(tmp_path: Path) -> None:
    processes = busy((tmp_path / "store", "a", 30, 2, 0), (tmp_path / "store", "b", 30, 1, 5))
    for process in processes:
        lines_of(process)
    with open_store(tmp_path / "store") as store:
        found = responses(store)
        assert len(found) == len(set(found))  # and each can be read: the key is the one they were sealed with
        store.add("after")
        assert responses(store) == [*found, "after"]


# A script that runs out of space begins with this: no file can grow past so many bytes.
LIMIT = """
import pathlib, resource, sys
from stores import IN_MEMORY, open_store
def limit(size_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))
"""


def printed_by(script: str, folder: Path) -> list[str]:
    command = [sys.executable, "-c", LIMIT + script, str(folder)]
    return subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def test_a_file_system_that_refuses_to_write_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    script = """
with open_store(pathlib.Path(sys.argv[1])) as store:
    store.add("first")
    limit(200_000)
    for text in ("x" * 300_000, "second"):
        try: store.add(text)
        except Exception as error: print(type(error).__name__, error)
    print([one.response for one in store.examples()])
"""
    refused, found = printed_by(script, tmp_path / "store")
    assert refused.startswith("StateError ") and "nothing was changed" in refused and "xx" not in refused
    assert found == "['first', 'second']"


def test_an_erasure_needs_little_room_however_much_it_erases(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        store.add("x" * 1_000_000)
    script = """
with open_store(pathlib.Path(sys.argv[1])) as store:
    limit(100_000)
    store.erase()
    print(store.num_examples)
"""
    assert printed_by(script, tmp_path / "store") == ["0"]


def test_a_person_can_erase_on_a_disk_without_any_room(tmp_path: Path) -> None:
    script = """
import sys; from pathlib import Path; from stores import open_store, responses
with open_store(Path(sys.argv[1]) / "store") as store:
    try:
        while True: store.add("x" * 20_000)
    except Exception as error: print(error)
    with open(sys.argv[1] + "/other", "wb", 0) as file:
        try:
            while True: file.write(bytes(512))
        except OSError: pass
    store.erase(); print(responses(store))
    store.add("after"); print(responses(store))
"""
    (tmp_path / "disk").mkdir()
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"', str(tmp_path / "disk")]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a small disk in a namespace of their own")
    answer = subprocess.run(
        [*mounted, sys.executable, "-c", script, str(tmp_path / "disk")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    full, erased, after = answer.stdout.splitlines()
    assert full.startswith("no room is left on the disk for ") and "xx" not in full
    assert (erased, after) == ("[]", "['after']")
