"""The example store where somebody, or a disk, has been at its files: refused with what to do, and nothing lost."""

import shutil
import sqlite3
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import IN_MEMORY, MARKER, open_store, responses

from fedmini.errors import StateError
from fedmini.store import StoredExample, stored_example
from fedmini.store.sealing import Sealer, draw_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed store of three examples; the marker is in each of them."""
    folder = tmp_path / "store"
    with open_store(folder, clock=lambda: 6000.0) as store:
        store.add_many(StoredExample(f"{name} {MARKER}", MARKER) for name in ("first", "second", "third"))
    return folder


@contextmanager
def tampered(folder: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(folder / "examples.db")) as connection, connection:
        yield connection


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refusal(folder: Path) -> str:
    """The error of opening a store and reading it, which shows nothing of what the store holds."""
    with pytest.raises(StateError) as raised, open_store(folder, clock=lambda: 6000.0) as store:
        store.examples()
    assert MARKER not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


def test_nothing_that_was_typed_is_in_any_file_while_the_store_is_open_or_closed_or_erased(folder: Path) -> None:
    everything = [contents(folder)]
    with open_store(folder) as store:
        store.add(MARKER, prompt=MARKER)
        store.freeze("run", 2)
        everything.append(contents(folder))
        store.erase()
        everything.append(contents(folder))
    everything.append(contents(folder))
    for files in everything:
        assert "examples.db" in files
        for name, content in files.items():
            assert MARKER.encode() not in content, name


def test_rows_that_were_swapped_are_refused(folder: Path) -> None:
    with tampered(folder) as connection:
        connection.execute("UPDATE examples SET row = -row")
        connection.execute("UPDATE examples SET row = 4 + row")  # the first is now the third
    assert "was altered or damaged" in refusal(folder)


def test_without_what_binds_a_seal_to_its_row_a_swap_would_go_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sealer, "_bound", lambda self, place: b"")
    twin = tmp_path / "twin"
    with open_store(twin) as store:
        store.add_many(StoredExample(text) for text in ("first", "second", "third"))
    with tampered(twin) as connection:
        connection.execute("UPDATE examples SET row = -row")
        connection.execute("UPDATE examples SET row = 4 + row")
    with open_store(twin) as store:
        assert responses(store) == ["third", "second", "first"]


def test_an_example_that_was_given_a_later_date_is_refused(folder: Path) -> None:
    with tampered(folder) as connection:
        connection.execute("UPDATE examples SET added_minute = added_minute + 1 WHERE row = 2")
    assert "example 2 was altered or damaged" in refusal(folder)


def test_an_example_that_was_copied_to_another_row_is_refused(folder: Path) -> None:
    with tampered(folder) as connection:
        connection.execute(
            "INSERT INTO examples (row, added_minute, size_bytes, sealed)"
            " SELECT 9, added_minute, size_bytes, sealed FROM examples WHERE row = 1"
        )
    assert "example 9 was altered or damaged" in refusal(folder)


def test_a_size_that_is_not_the_examples_own_is_refused(folder: Path) -> None:
    # With sizes of nothing, a store would grow past its cap.
    with tampered(folder) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE examples SET size_bytes = 0")
    assert "examples.db is damaged: bring" in refusal(folder)


def test_what_proves_the_key_is_no_example_and_an_example_proves_no_key(folder: Path) -> None:
    key_id, key = draw_key()
    sealer = Sealer(key_id, key)
    sealed = sealer.seal_example(b"", 1, 1)
    assert sealer.open_example(sealed, 1, 1) == b"" and sealer.right_for(sealer.key_check())
    assert sealer.open_example(sealer.key_check(), 1, 1) is None
    assert not sealer.right_for(sealed)
    assert not Sealer("another", key).right_for(sealer.key_check())


@given(position=st.integers(0, 10_000), flipped=st.integers(1, 255), length=st.integers(0, 200))
def test_a_seal_with_one_byte_changed_or_cut_short_opens_for_nobody(position: int, flipped: int, length: int) -> None:
    sealer = Sealer(*draw_key())
    content = stored_example.to_bytes(StoredExample("x" * (length + 1)))
    sealed = bytearray(sealer.seal_example(content, 3, 5))
    assert sealer.open_example(bytes(sealed), 3, 5) == content
    assert sealer.open_example(bytes(sealed[: position % len(sealed)]), 3, 5) is None
    sealed[position % len(sealed)] ^= flipped
    assert sealer.open_example(bytes(sealed), 3, 5) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    with open_store(folder) as store:
        store.add_many(StoredExample(text) for text in ("first", "second", "third"))
        store.freeze("run", 3)
    return folder


@settings(max_examples=100)
@given(position=st.integers(0, 2**20), flipped=st.integers(1, 255))
def test_a_byte_changed_anywhere_in_the_file_changes_no_example(whole: Path, position: int, flipped: int) -> None:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as parent:
        folder = Path(shutil.copytree(whole, Path(parent) / "store"))
        path = folder / "examples.db"
        content = bytearray(path.read_bytes())
        content[position % len(content)] ^= flipped
        path.write_bytes(content)
        try:
            with open_store(folder) as store:
                assert set(responses(store)) <= {"first", "second", "third"}
                store.freeze("run", 3)
                store.add("fourth")
        except StateError as error:
            assert str(folder) in str(error)


@pytest.mark.parametrize("kept_bytes", [0, 1, 100, 4096, 10_000])
def test_a_database_that_was_cut_short_is_refused_and_left_as_it_is(folder: Path, kept_bytes: int) -> None:
    path = folder / "examples.db"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    before = contents(folder)
    message = refusal(folder)
    assert "bring" in message and "back from a backup" in message and str(folder) in message
    assert {name: content for name, content in contents(folder).items() if name in before} == before


def test_a_database_that_is_missing_beside_its_key_is_not_made_anew(folder: Path) -> None:
    (folder / "examples.db").unlink()
    assert "examples.db is missing, and store.key is still there: bring" in refusal(folder)
    assert not (folder / "examples.db").exists() and (folder / "store.key").exists()


def test_another_file_in_its_place_is_refused(folder: Path) -> None:
    (folder / "examples.db").write_bytes(b"not a database" * 1000)
    assert "is damaged or was cut short" in refusal(folder)
    (folder / "examples.db").unlink()
    with tampered(folder) as connection:
        connection.execute("CREATE TABLE examples (row)")
    (folder / "examples.db").chmod(0o600)
    assert "is not an example store" in refusal(folder)


def test_a_newer_format_is_left_alone(folder: Path) -> None:
    with tampered(folder) as connection:
        connection.execute("PRAGMA user_version = 2")
    before = (folder / "examples.db").read_bytes()
    assert "has format 2, and this fedmini reads format 1" in refusal(folder)
    assert (folder / "examples.db").read_bytes() == before


@pytest.mark.parametrize("name", ["examples.db", "store.key"])
def test_a_file_that_others_can_read_is_refused_until_it_is_private_again(folder: Path, name: str) -> None:
    (folder / name).chmod(0o640)
    assert f"{name} can be read by others on this machine: make it 0600" in refusal(folder)
    (folder / name).chmod(0o600)
    with open_store(folder) as store:
        assert store.num_examples == 3


def test_a_folder_that_others_can_read_is_refused(folder: Path) -> None:
    folder.chmod(0o711)
    assert "make it 0700" in refusal(folder)


def test_a_lost_key_is_named_and_no_other_is_made(folder: Path) -> None:
    kept = (folder / "store.key").rename(folder.parent / "kept")
    assert "can't read the store's key" in refusal(folder)
    assert not (folder / "store.key").exists()
    kept.rename(folder / "store.key")
    with open_store(folder) as store:
        assert store.num_examples == 3


def test_a_wrong_key_is_told_from_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    path, right = folder / "store.key", (folder / "store.key").read_text()
    open_store(tmp_path / "another").close()
    shutil.copy(tmp_path / "another" / "store.key", path)
    assert "is not the key of the examples.db beside it" in refusal(folder)
    for damaged in ("", "{}", "[]", right[:-2], right.replace('"key": "', '"key": "zz'), right[:-4] + '"}'):
        path.write_text(damaged)
        assert f"{path} is damaged" in refusal(folder)
    digit = "0" if right[-3] != "0" else "1"
    path.write_text(right[:-3] + digit + '"}')  # another key by the right name
    assert f"the key in {path}, 0600 is not that of {folder}/examples.db" in refusal(folder)


def test_no_error_about_a_key_shows_it(folder: Path) -> None:
    path = folder / "store.key"
    key = path.read_text().split('"key": "')[1][:64]
    path.write_text(path.read_text()[:-3] + "}")
    assert key[:32] not in refusal(folder)


def test_copies_of_the_files_from_before_an_erasure_cannot_be_read_with_what_is_there_after(folder: Path) -> None:
    database, old_key = (folder / "examples.db").read_bytes(), (folder / "store.key").read_text()
    with open_store(folder) as store:
        store.erase()
        store.add("after")
    assert old_key.split('"key": "')[1][:64] not in (folder / "store.key").read_text()
    (folder / "examples.db").write_bytes(database)
    assert "is not the key of the examples.db beside it" in refusal(folder)


def test_the_old_key_is_overwritten_where_it_lay(folder: Path) -> None:
    with (folder / "store.key").open("rb") as old_key, open_store(folder) as store:
        store.erase()
        assert set(old_key.read()) == {0}


def test_an_erased_store_gives_its_room_back_and_counts_on(folder: Path) -> None:
    with open_store(folder) as store:
        store.add_many(StoredExample("x" * 10_000) for _ in range(30))
        store.freeze("run", 5)
    assert (folder / "examples.db").stat().st_size > 300_000
    with open_store(folder) as store:
        store.erase()
        assert (store.examples(), store.num_examples, store.size_bytes, store.freeze("run", 5)) == ([], 0, 0, [])
        assert sum(path.stat().st_size for path in folder.glob("examples.db*")) < 100_000
        store.add("after")
        assert responses(store) == ["after"]


def test_a_full_disk_refuses_an_example_and_loses_none(folder: Path) -> None:
    with open_store(folder) as store:
        connection = store._database.connection
        (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {num_pages}")
        with pytest.raises(
            StateError, match=r"no room is left on the disk for .*: nothing was changed; make room"
        ) as full:
            store.add(MARKER * 1000)
        assert MARKER not in "".join(traceback.format_exception(full.value))
        assert store.num_examples == 3
        store.erase()  # has room for itself
        assert store.num_examples == 0
        connection.execute(f"PRAGMA max_page_count = {10 * num_pages}")
        store.add("there is room again")
    with open_store(folder) as store:
        assert responses(store) == ["there is room again"]


def test_a_damaged_example_can_still_be_erased(folder: Path) -> None:
    with tampered(folder) as connection:
        connection.execute("UPDATE examples SET sealed = zeroblob(size_bytes) WHERE row = 1")
    assert "or erase the store" in refusal(folder)
    with open_store(folder) as store:
        store.erase()
        store.add("after")
        assert responses(store) == ["after"]
