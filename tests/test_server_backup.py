"""A server's folder in one file and back: whole, never with more trained than its ledger says, and nothing outside."""

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmini import server_folder
from fedmini.config import parse_server_config
from fedmini.errors import ConfigError, FedMiniError, StateError
from fedmini.secagg import device_keys, signing_keys, trust
from fedmini.server_folder import ServerFolder, archive
from tests.tiny_trust import an_operator

NOW = datetime.now(UTC)
LEDGER, LATEST = "runs/chat/ledger.jsonl", "runs/chat/checkpoints/LATEST"


def a_server(path: Path) -> ServerFolder:
    """A server with a device, a run of two rounds, and a database."""
    operator, device = an_operator(), signing_keys.draw()
    config = parse_server_config({"server": {"host": "fl.example.org"}})
    folder = server_folder.create(path, config, NOW, signing_keys.public_bytes(operator))
    keys = device_keys.vouch(device, device_keys.login_bytes(device_keys.draw_login()))
    folder.enroll(keys, trust.certify(operator, "anna", keys.device_key))
    train(folder, 1)
    train(folder, 2)
    with sqlite3.connect(path / "state/state.db") as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE counted (number INTEGER)")
    database.close()
    return folder


def train(folder: ServerFolder, round_num: int, num_kept: int = 2) -> None:
    """What a server does to its files in a round: the ledger before, the weights after; older ones go."""
    run = folder.path / "runs/chat"
    weights = run / f"checkpoints/round-{round_num:04d}"
    weights.mkdir(parents=True)
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write(f"{round_num}\n")
    (weights / "tensors").write_text(f"{round_num}")
    (run / "checkpoints/.partial").write_text(f"round-{round_num:04d}")
    (run / "checkpoints/.partial").replace(run / "checkpoints/LATEST")
    shutil.rmtree(run / f"checkpoints/round-{round_num - num_kept:04d}", ignore_errors=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "state.db"
    }


def newest_weights(folder: Path) -> int:
    """The round that the newest weights are of, which are there."""
    return int((folder / "runs/chat/checkpoints" / (folder / LATEST).read_text() / "tensors").read_text())


def last_spent(folder: Path) -> int:
    return int((folder / LEDGER).read_text().split()[-1])


# Whole


def test_what_was_backed_up_is_restored(tmp_path: Path) -> None:
    folder = a_server(tmp_path / "server")
    packed = server_folder.back_up(folder.path, tmp_path / "a.tar")
    restored = server_folder.restore(tmp_path / "a.tar", tmp_path / "new")
    assert contents(restored.path) == contents(folder.path)
    assert packed.num_files == len(contents(folder.path)) + 1
    assert (restored.token, restored.devices()) == (folder.token, folder.devices())
    restored.check_certificate(NOW)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "new", "server"]


def test_secrets_are_for_their_owner_only_in_the_archive_and_after_it(tmp_path: Path) -> None:
    folder = a_server(tmp_path / "server")
    server_folder.back_up(folder.path, tmp_path / "a.tar")
    restored = server_folder.restore(tmp_path / "a.tar", tmp_path / "new")
    secret = [restored.path / name for name in ("loopback.token", "tls/ca.key", "tls/server.key")]
    for path in (tmp_path / "a.tar", *secret):
        assert path.stat().st_mode & 0o777 == 0o600
    for path in (restored.path, restored.path / "tls", restored.path / "runs/chat/checkpoints"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_backup_of_a_new_server_that_has_no_operator_yet_is_restored(tmp_path: Path) -> None:
    server_folder.create(tmp_path / "server", parse_server_config({"server": {"host": "a.org"}}), NOW)
    server_folder.back_up(tmp_path / "server", tmp_path / "a.tar")
    restored = server_folder.restore(tmp_path / "a.tar", tmp_path / "new")
    assert sorted(os.listdir(restored.path)) == sorted(os.listdir(tmp_path / "server"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = a_server(tmp_path / "server")
    server_folder.back_up(folder.path, tmp_path / "a.tar")
    before = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(ConfigError, match=r"a\.tar is there already"):
        server_folder.back_up(folder.path, tmp_path / "a.tar")
    with pytest.raises(ConfigError, match="server is there already"):
        server_folder.restore(tmp_path / "a.tar", folder.path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty is there already"):
        server_folder.restore(tmp_path / "a.tar", tmp_path / "empty")
    assert (tmp_path / "a.tar").read_bytes() == before


def test_a_link_in_the_folder_is_not_left_out_quietly(tmp_path: Path) -> None:
    folder = a_server(tmp_path / "server")
    (folder.path / "runs/linked").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="runs/linked is a link, and a backup holds none"):
        server_folder.back_up(folder.path, tmp_path / "a.tar")
    assert sorted(os.listdir(tmp_path)) == ["server"]


def test_a_disk_that_is_full_leaves_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_server(tmp_path / "server")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left on device; mend that"):
        server_folder.back_up(folder.path, tmp_path / "a.tar")
    assert sorted(os.listdir(tmp_path)) == ["server"]


# While the server runs


def while_copying(monkeypatch: pytest.MonkeyPatch, what: Callable[[str], None]) -> None:
    """Call this before each file that is copied, as a server would that goes on meanwhile."""
    really = archive._add_file

    def add(tar: tarfile.TarFile, name: str, *rest: Any) -> str:
        what(name)
        return really(tar, name, *rest)

    monkeypatch.setattr(archive, "_add_file", add)


def test_a_restored_ledger_never_says_less_than_the_restored_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trained = a_server(tmp_path / "server"), [2]

    def train_on(name: str) -> None:
        if name.startswith("runs/") and len(trained) < 2:
            trained.append(trained[-1] + 1)
            train(folder, trained[-1])

    while_copying(monkeypatch, train_on)
    server_folder.back_up(folder.path, tmp_path / "a.tar")
    restored = server_folder.restore(tmp_path / "a.tar", tmp_path / "new")
    assert trained == [2, 3]
    assert newest_weights(restored.path) == 2 and last_spent(restored.path) == 3


def test_twin_with_the_ledger_first_the_weights_have_a_round_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both protections are off: what is newest is looked up late, and the ledger is copied early."""
    folder = a_server(tmp_path / "server")
    monkeypatch.setattr(archive, "NEWEST", "none")
    monkeypatch.setattr(archive, "_turn", lambda name: (name != LEDGER, name))
    walk = archive._walk
    monkeypatch.setattr(archive, "_walk", lambda path: [*walk(path), "runs/chat/checkpoints/round-0003/tensors"])
    while_copying(monkeypatch, lambda name: train(folder, 3, 9) if name == "devices/anna.json" else None)
    server_folder.back_up(folder.path, tmp_path / "a.tar")
    restored = server_folder.restore(tmp_path / "a.tar", tmp_path / "new")
    assert newest_weights(restored.path) == 3 and last_spent(restored.path) == 2


def test_weights_that_the_server_forgets_meanwhile_are_left_out_but_never_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_server(tmp_path / "server")
    weights = folder.path / "runs/chat/checkpoints"
    while_copying(monkeypatch, lambda name: shutil.rmtree(weights / "round-0001", ignore_errors=True))
    server_folder.back_up(folder.path, tmp_path / "a.tar")
    assert newest_weights(server_folder.restore(tmp_path / "a.tar", tmp_path / "new").path) == 2
    while_copying(monkeypatch, lambda name: shutil.rmtree(weights / "round-0002", ignore_errors=True))
    with pytest.raises(StateError, match="No such file"):
        server_folder.back_up(folder.path, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_a_database_that_is_written_to_meanwhile_is_copied_as_of_one_moment(tmp_path: Path) -> None:
    folder = a_server(tmp_path / "server")
    ended = threading.Event()

    def write() -> None:
        database = sqlite3.connect(folder.path / "state/state.db", timeout=60)
        while not ended.is_set():
            with database:  # two rows each time, so that a half of them would show
                database.execute("INSERT INTO counted VALUES (1)")
                database.execute("INSERT INTO counted VALUES (-1)")
        database.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            server_folder.back_up(folder.path, tmp_path / f"{number}.tar")
    finally:
        ended.set()
        writer.join()
    for number in range(3):
        restored = server_folder.restore(tmp_path / f"{number}.tar", tmp_path / f"new-{number}")
        assert os.listdir(restored.path / "state") == ["state.db"]
        with sqlite3.connect(restored.path / "state/state.db") as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert database.execute("SELECT coalesce(sum(number), 0) FROM counted").fetchone() == (0,)
        database.close()


# Archives that somebody else made


def packed(tmp_path: Path) -> Path:
    path = tmp_path / "good.tar"
    if not path.exists():
        server_folder.back_up(a_server(tmp_path / "server").path, path)
    return path


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path, "r:") as tar:
        return [(one, tar.extractfile(one).read()) for one in tar]


def repacked(path: Path, found: list[tuple[tarfile.TarInfo, bytes]], listed: bool = True) -> Path:
    """An archive of these members, its list of contents right for those that are files, where it is asked for."""
    hashes = {one.name: hashlib.sha256(content).hexdigest() for one, content in found if one.isreg()}
    with tarfile.open(path, "w:") as tar:
        for one, content in found:
            tar.addfile(one, io.BytesIO(content))
        if listed:
            content = json.dumps({"format": archive.FORMAT, "sha256": hashes}).encode()
            one = tarfile.TarInfo(archive.CONTENTS)
            one.size = len(content)
            tar.addfile(one, io.BytesIO(content))
    return path


def a_member(name: str, content: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    one = tarfile.TarInfo(name)
    one.size = len(content)
    for field, value in fields.items():
        setattr(one, field, value)
    return one, content


def refused(tmp_path: Path, path: Path, says: str = "is no whole backup of a server's folder") -> None:
    """The archive is refused in one line, and nothing is left of it anywhere."""
    before = sorted(str(one) for one in tmp_path.rglob("*"))
    with pytest.raises(FedMiniError, match=says) as caught:
        server_folder.restore(path, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert sorted(str(one) for one in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "runs/../../evil", "/tmp/evil", "runs//evil", "runs/./evil", "evil", "operator.key", "runs/.hidden",
        "runs/a\\b", "runs/" + "a/" * 20 + "b", "runs/line\nbreak", "",
    ],
)  # fmt: skip
def test_a_file_that_would_lie_where_none_may_is_refused(tmp_path: Path, name: str) -> None:
    found = members(packed(tmp_path))[:-1]
    refused(
        tmp_path, repacked(tmp_path / "bad.tar", [*found, a_member(name)]), "would lie where none may|else than files"
    )


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    found = members(packed(tmp_path))[:-1]
    link = a_member("runs/link", b"", type=kind, linkname="../../..")
    refused(tmp_path, repacked(tmp_path / "bad.tar", [link, *found, a_member("runs/link/evil")]))


def test_a_file_beneath_a_file_and_a_file_twice_are_refused(tmp_path: Path) -> None:
    found = members(packed(tmp_path))[:-1]
    refused(tmp_path, repacked(tmp_path / "bad.tar", [*found, a_member("runs/a"), a_member("runs/a/b")]), "none may")
    refused(tmp_path, repacked(tmp_path / "bad.tar", [*found, found[0]]), "none may")


def test_sizes_that_an_archive_can_not_hold_are_refused(tmp_path: Path) -> None:
    good = packed(tmp_path).read_bytes()
    for size in (2**33, 2**60, len(good)):
        one = tarfile.TarInfo("runs/large")
        one.size = size
        (tmp_path / "bad.tar").write_bytes(one.tobuf(tarfile.GNU_FORMAT) + good)
        refused(tmp_path, tmp_path / "bad.tar")
    negative = bytearray(tarfile.TarInfo("runs/large").tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 12  # -1, in GNU's way
    total = sum(negative[:148]) + sum(negative[156:]) + 8 * 32
    negative[148:156] = b"%06o\0 " % total
    (tmp_path / "bad.tar").write_bytes(bytes(negative) + good)
    refused(tmp_path, tmp_path / "bad.tar")


def test_an_archive_that_was_cut_or_changed_is_refused(tmp_path: Path) -> None:
    good = packed(tmp_path)
    content, found, bad = good.read_bytes(), members(good), tmp_path / "bad.tar"
    for size in (0, 100, 512, 5000, len(content) // 2, len(content) - 10240 - 512):
        bad.write_bytes(content[:size])
        refused(tmp_path, bad)
    refused(tmp_path, repacked(bad, found[:-1], listed=False), "its end is missing")
    refused(tmp_path, repacked(bad, found[1:], listed=False), "not those that its list of contents has")
    refused(tmp_path, repacked(bad, found[1:-1][::-1] + found[-1:], listed=False), "not those")
    where = content.index(b"device_id")
    bad.write_bytes(content[:where] + b"D" + content[where + 1 :])
    refused(tmp_path, bad, "not those that its list")
    bad.write_bytes(b"\x1f\x8b" + content)
    refused(tmp_path, bad)
    refused(tmp_path, tmp_path / "nowhere.tar", r"can't read .*nowhere\.tar: No such file")
    refused(tmp_path, tmp_path, "can't read .*: Is a directory")


def test_an_archive_of_a_folder_that_could_not_be_opened_is_refused(tmp_path: Path) -> None:
    found = {one.name: (one, content) for one, content in members(packed(tmp_path))[:-1]}
    for name, content in (
        ("server.toml", b"[server]\n"),
        ("loopback.token", b"short\n"),
        ("devices/anna.json", b"{}\n"),
    ):
        changed = found | {name: a_member(name, content)}
        refused(tmp_path, repacked(tmp_path / "bad.tar", list(changed.values())))
    del found["server.toml"]
    refused(tmp_path, repacked(tmp_path / "bad.tar", list(found.values())), "is no server's folder")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)
)
def test_nothing_but_our_errors_comes_of_a_spoilt_archive(tmp_path: Path, changes: list[tuple[float, bytes]]) -> None:
    content = bytearray(packed(tmp_path).read_bytes())
    for where, new in changes:
        start = int(where * len(content))
        content[start : start + len(new)] = new[: len(content) - start]
    (tmp_path / "bad.tar").write_bytes(bytes(content))
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    try:
        restored = server_folder.restore(tmp_path / "bad.tar", tmp_path / "new")
    except FedMiniError as error:
        assert "\n" not in str(error) and not (tmp_path / "new").exists()
    else:  # what was spoilt says nothing: an owner's name, what fills a block
        assert contents(restored.path) == contents(tmp_path / "server")
