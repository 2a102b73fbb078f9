"""The example store: what it keeps and for how long, what it refuses, and where its key is."""

import os
import stat
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
from stores import (
    MARKER,
    FindKeyring,
    ForgetfulKeyring,
    MemoryKeyring,
    RefusingKeyring,
    no_keyring,
    open_store,
    responses,
)

from fedmini.config.device_sections import StoreSection
from fedmini.errors import ConfigError, StateError
from fedmini.store import ExampleStore, StoredExample, os_keyring
from fedmini.store.key_places import KeyInKeyring

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_added_is_there_after_reopening_oldest_first_and_twice_where_it_was_added_twice(folder: Path) -> None:
    with open_store(folder) as store:
        store.add("It is warm.", prompt="How is the weather?")
        store.add("a text that answers nothing")
        store.add("a text that answers nothing")
    with open_store(folder) as store:
        assert store.examples() == [
            StoredExample("It is warm.", "How is the weather?"),
            StoredExample("a text that answers nothing"),
            StoredExample("a text that answers nothing"),
        ]
        assert store.num_examples == 3


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a parent" / "100%41 of mine? #1 \u00fc"
    with open_store(folder) as store:
        store.add("something")
    with open_store(folder) as store:
        assert responses(store) == ["something"]
    assert sorted(path.name for path in folder.iterdir()) == ["examples.db", "room-to-erase", "store.key"]


def test_texts_of_any_script_and_length_come_back_as_they_were(folder: Path) -> None:
    given = [StoredExample("\u00fc\U0001f600\0\n " * 3000, " \u4e16\u754c "), StoredExample(" a ")]
    with open_store(folder) as store:
        assert store.add_many(iter(given)) == 2
        assert store.examples() == given


def test_only_the_owner_can_read_the_folder_and_its_files_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        store = open_store(folder)
        store.add("something")
        modes = {path.name: mode(path) for path in folder.iterdir()}
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert modes.keys() == {"examples.db", "examples.db-wal", "examples.db-shm", "room-to-erase", "store.key"}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    ("response", "prompt"), [("", None), (" \n", None), ("a", ""), ("\ud800" + MARKER, None), (7, None), ("a", b"b")]
)
def test_what_is_no_text_is_refused_and_nothing_of_it_is_said(folder: Path, response: str, prompt: str | None) -> None:
    with open_store(folder) as store:
        with pytest.raises(ConfigError, match=r"^(response|prompt): ") as raised:
            store.add_many([StoredExample("good"), StoredExample(response, prompt)])
        assert MARKER not in "".join(traceback.format_exception(raised.value))
        assert raised.value.__context__ is None  # an encoding error would carry the text
        assert store.examples() == []  # all or none


def test_an_example_larger_than_all_the_room_is_refused_by_its_size_alone(folder: Path) -> None:
    # 8 bytes say how long the prompt is, 28 are the nonce and the tag.
    with open_store(folder, StoreSection(max_bytes=100)) as store:
        store.add("x" * 64)
        with pytest.raises(ConfigError, match=r"takes 101 bytes, and store\.max_bytes is 100") as raised:
            store.add(MARKER + "x" * (65 - len(MARKER)))
        assert MARKER not in str(raised.value)
        assert (store.num_examples, store.size_bytes) == (1, 100)


def test_the_oldest_go_first_by_count_and_by_size(folder: Path, tmp_path: Path) -> None:
    with open_store(folder, StoreSection(max_examples=2)) as store:
        store.add_many(StoredExample(text) for text in "abc")
        store.add("d")
        assert responses(store) == ["c", "d"]
    with open_store(tmp_path / "second", StoreSection(max_bytes=100)) as store:  # a letter takes 37 bytes
        store.add_many(StoredExample(text) for text in "abc")
        assert (responses(store), store.size_bytes) == (["b", "c"], 74)


def test_an_example_is_gone_when_it_is_as_old_as_its_owner_allows(folder: Path) -> None:
    now_s = 0.0
    with open_store(folder, StoreSection(max_age_days=2), clock=lambda: now_s) as store:
        store.add("first")
        now_s = 86400.0
        store.add("second")
        now_s = 2 * 86400.0 - 1
        assert responses(store) == ["first", "second"]
        now_s = 2 * 86400.0
        assert (responses(store), store.num_examples) == (["second"], 1)
        now_s = 0.0  # what expired does not come back when the clock is set back
        assert responses(store) == ["second"]


def test_lower_caps_hold_from_the_next_opening(folder: Path) -> None:
    with open_store(folder) as store:
        store.add_many(StoredExample(text) for text in "abc")
    with open_store(folder, StoreSection(max_examples=1)) as store:
        assert responses(store) == ["c"]


def test_a_repr_shows_no_text(folder: Path) -> None:
    assert MARKER not in repr(StoredExample(MARKER, MARKER)) + repr([StoredExample(MARKER)])
    with open_store(folder) as store:
        store.add(MARKER)
        assert repr(store) == f"ExampleStore('{folder}')"


def test_a_closed_store_says_so_and_can_be_closed_again(folder: Path) -> None:
    store = open_store(folder)
    store.close()
    store.close()
    with pytest.raises(StateError, match="is closed: open it again"):
        store.add("something")


def test_a_frozen_set_needs_room_for_an_example(folder: Path) -> None:
    with open_store(folder) as store, pytest.raises(ConfigError, match="max_examples: expected at least 1, got 0"):
        store.freeze("run", 0)


def test_without_a_keyring_the_key_is_in_a_file_and_the_store_says_which(folder: Path) -> None:
    with open_store(folder) as store:
        assert store.key_kept_in == f"{folder}/store.key, 0600"


def test_with_a_keyring_the_key_is_there_and_nowhere_in_the_folder(folder: Path) -> None:
    keyring = MemoryKeyring()
    with open_store(folder, find_keyring=lambda: keyring) as store:
        store.add("something")
        assert store.key_kept_in == "the OS keyring"
        ((key_id, key),) = keyring.passwords.items()
        content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not (folder / "store.key").exists()
    assert key_id.encode() in content
    assert key.encode() not in content and bytes.fromhex(key) not in content
    with open_store(folder, find_keyring=lambda: keyring) as store:
        assert responses(store) == ["something"]


def test_a_store_whose_keyring_is_missing_says_so_and_makes_no_new_key(folder: Path) -> None:
    keyring = MemoryKeyring()
    with open_store(folder, find_keyring=lambda: keyring) as store:
        store.add("something")
    with pytest.raises(StateError, match="is in the OS keyring, which is missing or locked now"):
        open_store(folder, find_keyring=no_keyring)
    with pytest.raises(StateError, match="the OS keyring does not hold this store's key"):
        open_store(folder, find_keyring=MemoryKeyring)
    assert not (folder / "store.key").exists()
    with open_store(folder, find_keyring=lambda: keyring) as store:
        assert responses(store) == ["something"]


def test_a_store_with_a_key_file_never_asks_a_keyring_that_came_later(folder: Path) -> None:
    open_store(folder).close()
    keyring = MemoryKeyring()
    with open_store(folder, find_keyring=lambda: keyring) as store:
        store.erase()
        assert store.key_kept_in.endswith("store.key, 0600")
    assert keyring.passwords == {}


@pytest.mark.parametrize("find_keyring", [RefusingKeyring, ForgetfulKeyring])
def test_a_keyring_that_keeps_nothing_is_passed_over_for_the_file(folder: Path, find_keyring: FindKeyring) -> None:
    with open_store(folder, find_keyring=find_keyring) as store:
        assert store.key_kept_in.endswith("store.key, 0600")


def test_what_a_keyring_says_when_it_refuses_is_not_passed_on() -> None:
    key = bytes(range(32))
    with pytest.raises(StateError, match=r"the OS keyring refused \(PasswordSetError\)") as raised:
        KeyInKeyring(RefusingKeyring()).replace(None, "a", key)
    assert key.hex() not in "".join(traceback.format_exception(raised.value))


def test_a_keyring_that_waits_for_somebody_is_not_waited_for() -> None:
    nobody_comes = threading.Event()

    class AskingKeyring(MemoryKeyring):
        def get_password(self, service: str, username: str) -> str | None:
            nobody_comes.wait()
            return None

    with pytest.raises(StateError, match=r"did not answer in 0\.01 s"):
        KeyInKeyring(AskingKeyring(), timeout_s=0.01).read("a")
    nobody_comes.set()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a keyring, and it would be the developer's")
def test_no_backend_that_keeps_plain_text_or_nothing_is_found_even_where_it_is_configured() -> None:
    environment = {"PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring", "DBUS_SESSION_BUS_ADDRESS": ""}
    script = (
        "import keyring; from fedmini.store import os_keyring\n"
        "print(type(keyring.get_keyring()).__module__, os_keyring.find())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, cwd=ROOT
    )
    assert answer.stdout == "keyring.backends.null None\n", answer.stderr


def test_whatever_goes_wrong_in_looking_for_a_keyring_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere/bus")
    monkeypatch.setattr(sys, "platform", "linux")
    assert os_keyring.find() is None


def test_two_stores_of_one_folder_see_each_others_examples_and_erasures(folder: Path) -> None:
    with open_store(folder) as first, open_store(folder) as second:
        first.add("before")
        assert responses(second) == ["before"]
        second.erase()
        assert responses(first) == []
        first.add("after")  # sealed with the new key
        assert responses(second) == ["after"]


def test_a_store_that_crossed_a_fork_is_refused_in_the_child(folder: Path) -> None:
    script = (
        "import os, sys, pathlib; from stores import open_store\n"
        "store = open_store(pathlib.Path(sys.argv[1]))\n"
        "if os.fork() == 0:\n"
        "    try: store.add('from the child')\n"
        "    except Exception as error: print(error, flush=True)\n"
        "    store.close()\n"
        "    os._exit(0)\n"
        "os.wait(); store.add('from the parent'); print(store.num_examples)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == f"the store {folder} was opened before a fork: open it in this process\n1\n"


def test_an_empty_folder_that_others_can_read_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o750)
    with pytest.raises(StateError, match="can be read by others on this machine: make it 0700"):
        open_store(folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another folder"):
        ExampleStore.open(tmp_path / "file" / "store", StoreSection(), find_keyring=no_keyring)
