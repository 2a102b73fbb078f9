import os

import pytest

from fedmini.errors import ConfigError
from fedmini.model import cache


def build(folder):
    (folder / "data").write_bytes(b"0123456789")
    return {"answer": 42}


def refuse_to_build(_folder):
    raise AssertionError("it was built again")


def test_what_is_built_once_is_opened_afterwards(tmp_path):
    cache.open_or_build(tmp_path, "key", build, print)

    again = cache.open_or_build(tmp_path, "key", refuse_to_build, print)

    assert (again.folder / "data").read_bytes() == b"0123456789"
    assert again.facts == {"answer": 42}


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest", "format"])
def test_a_damaged_folder_is_built_again_with_a_note(tmp_path, damage):
    folder = cache.open_or_build(tmp_path, "key", build, print).folder
    match damage:
        case "flip":
            (folder / "data").write_bytes(b"0123456780")
        case "cut":
            (folder / "data").write_bytes(b"012345")
        case "delete":
            (folder / "data").unlink()
        case "manifest":
            (folder / "manifest.json").write_text("{")
        case "format":
            text = (folder / "manifest.json").read_text().replace(f'"format": {cache.FORMAT}', '"format": 0')
            (folder / "manifest.json").write_text(text)
    notes = []

    again = cache.open_or_build(tmp_path, "key", build, notes.append)

    assert (again.folder / "data").read_bytes() == b"0123456789"
    assert len(notes) == 1
    assert "building it again" in notes[0]
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["key"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        build(folder)
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        cache.open_or_build(tmp_path, "key", fail, print)

    assert list((tmp_path / "bases").iterdir()) == []


def test_a_process_that_was_slower_takes_what_the_faster_one_wrote(tmp_path):
    def slow(folder):
        cache.open_or_build(tmp_path, "key", build, print)
        return build(folder)

    cached = cache.open_or_build(tmp_path, "key", slow, print)

    assert cached.facts == {"answer": 42}
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["key"]


def test_a_cache_folder_that_is_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "cache").write_text("")

    with pytest.raises(ConfigError, match="can't write"):
        cache.open_or_build(tmp_path / "cache", "key", build, print)


def test_a_source_is_hashed_once_until_it_changes(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"a")
    os.utime(source, ns=(0, 1_000))
    first = cache.source_digest(source, tmp_path)
    source.write_bytes(b"b")
    os.utime(source, ns=(0, 1_000))
    unseen = cache.source_digest(source, tmp_path)  # same size and time: not read again
    os.utime(source, ns=(0, 2_000))

    assert unseen == first
    assert cache.source_digest(source, tmp_path) != first


def test_a_missing_source_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"can't read .*absent"):
        cache.source_digest(tmp_path / "absent", tmp_path)


def test_an_answer_is_computed_once(tmp_path):
    assert cache.remembered(tmp_path, "question", lambda: "first") == "first"
    assert cache.remembered(tmp_path, "question", lambda: "second") == "first"
