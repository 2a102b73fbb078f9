"""What an app sees of a device, and what its owner can do with it: reply, forget, errors that are clear."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmini import vectors
from fedmini.device import Device, kept_adapter
from fedmini.errors import ConfigError, StateError, UpdateError
from fedmini.flower.codec import Envelope
from fedmini.model import generation, loading
from tests import kills
from tests.device import world
from tests.device.test_device_rounds import begin, begin_long
from tests.device.world import Round, a_model, a_run, offered, wait_for_status

MARKER = "planted marker cafe"


def test_the_model_is_loaded_once_for_messages_rounds_and_replies(base: Path, server, devices, monkeypatch) -> None:
    loaded: list[object] = []
    load = loading.load_base
    monkeypatch.setattr(loading, "load_base", lambda *of: loaded.append(1) or load(*of))
    manifest = a_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    before = owned.device._membership._ready[manifest.hash]
    assert work.run(1).num_devices == work.run(2).num_devices == 4
    owned.device.reply("what is it", 2)
    assert loaded == [1] and owned.device._membership._ready[manifest.hash] is before


def test_why_it_does_not_train_is_true_at_each_time(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    device = owned.device
    assert device.status().why_not_training == "it was not started" and not device.status().is_running
    device.start()
    wait_for_status(device, lambda status: status.why_not_training == "no run was offered to it yet", "the login")
    assert device.status().is_connected
    server.offer(offered(manifest))
    assert device.status().why_not_training is None
    device.stop()
    assert device.status().why_not_training == "it was stopped" and not device.status().is_connected
    owned.conditions.on_power = False
    device.start()
    wait_for_status(device, lambda status: "on its battery" in str(status.why_not_training), "the rest")
    assert not device.status().is_connected and device.status().is_running


def test_the_end_of_a_run_brings_its_adapter(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    begin(server, owned, manifest)
    content = vectors.to_bytes(a_model(manifest, 5), manifest.template)
    fields = {"manifest": manifest.hash, "round": 9}
    assert server.ask(Envelope("adapter", fields, content)).kind == "thanks"
    status = owned.device.status()
    assert status.last_adapter == ("run-1", 9) and status.why_not_training == "run run-1 is over"
    for spoilt in ({**fields, "round": 10}, {**fields, "round": "9"}, {**fields, "manifest": "0" * 64}, {}):
        assert server.ask(Envelope("adapter", spoilt, content)).kind == "refusal"
    nan = b"\x00\x00\xc0\x7f" * (len(content) // 4)
    assert server.ask(Envelope("adapter", fields, nan)).kind == "refusal"
    assert server.ask(Envelope("adapter", fields, content[:-4])).kind == "refusal"
    assert owned.device.status().last_adapter == ("run-1", 9)


# Reply.


def spoken_by(device: Device) -> str:
    """Ten tokens by the likeliest token, by what would reply now."""
    return device.reply("what is it", 10)


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = generation.Sampling
    monkeypatch.setattr(generation, "Sampling", lambda most, **options: sampling(most))


def test_it_replies_by_the_base_then_by_the_newest_adapter_then_by_the_base_again(
    base: Path, server, devices, greedy
) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    by_base = spoken_by(owned.device)
    begin(server, owned, manifest)
    loud = {name: 50 * values for name, values in a_model(manifest, 3).items()}
    fields = {"manifest": manifest.hash, "round": 3}
    server.ask(Envelope("adapter", fields, vectors.to_bytes(loud, manifest.template)))
    by_adapter = spoken_by(owned.device)
    assert by_adapter != by_base
    older = vectors.to_bytes(a_model(manifest, 4), manifest.template)
    server.ask(Envelope("adapter", {**fields, "round": 2}, older))
    assert spoken_by(owned.device) == by_adapter, "an older one does not take its place"
    owned.device.close()
    owned = devices(manifest, examples=[])
    assert spoken_by(owned.device) == by_adapter
    owned.device.forget()
    assert spoken_by(owned.device) == by_base and owned.device.status().last_adapter is None


def test_it_replies_while_it_trains(base: Path, server, devices) -> None:
    owned, _, thread, results = begin_long(base, server, devices)
    assert isinstance(owned.device.reply("what is it", 5), str)
    assert isinstance(owned.device.reply([{"role": "user", "content": "who"}], 5), str)
    assert thread.is_alive() and results == [], "and goes on with it"
    owned.device.stop()
    thread.join(60)


def test_a_reply_that_nobody_listens_to_any_more_holds_up_nothing(devices) -> None:
    owned = devices()
    abandoned = owned.device.reply_in_pieces("what is it", 100)
    first = next(abandoned, None)
    assert isinstance(owned.device.reply("who", 5), str)
    owned.device.forget()
    if first is not None:
        with pytest.raises(StateError, match="this reply has ended"):
            list(abandoned)
    late = owned.device.reply_in_pieces("what is it", 5)
    owned.device.close()
    with pytest.raises(StateError, match="this reply has ended"):
        next(late)


@pytest.mark.parametrize(
    ("prompt", "most"),
    [
        ("who", 0),
        ("who", "5"),
        ("who", True),
        ([], 5),
        ([{"role": "user"}], 5),
        ([MARKER], 5),
        (7, 5),
        (MARKER * 200, 5),
    ],
)
def test_what_cannot_be_replied_to_is_said_without_quoting_it(devices, prompt, most) -> None:
    owned = devices()
    with pytest.raises(ConfigError) as refused:
        owned.device.reply(prompt, most)
    assert MARKER not in str(refused.value)


# Forget.


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_forgetting_erases_what_was_learnt_and_keeps_what_was_spent(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest, examples=[(MARKER, MARKER)] * 3)
    begin(server, owned, manifest)
    Round(manifest, server.ask).run(1)
    before = files_of(owned.folder)
    old_key = json.loads(before["examples/store.key"])["key"]
    assert any(name.startswith("adapters/") for name in before)
    owned.device.forget()
    after = files_of(owned.folder)
    for content in after.values():
        assert MARKER.encode() not in content and old_key.encode() not in content
    assert not any(name.startswith("adapters/") for name in after)
    for name in ("ledger.jsonl", "receipts.jsonl", "certificate.json", "device.key", "usage.json"):
        assert after[name] == before[name], name
    status = owned.device.status()
    assert (status.num_examples, status.rounds_joined, status.name) == (0, 1, "anna")
    assert status.is_running, "and it goes on"
    answer = server.offer(offered(manifest))
    assert answer.fields["code"] == "conditions" and "no example to train on" in owned.device.status().why_not_training
    owned.device.add_example("a cab", "who")
    assert server.offer(offered(manifest)).kind == "ready", "an empty store was not frozen"


def damage(folder: Path) -> None:
    path = folder / "examples" / "examples.db"
    path.write_bytes(b"not a database" * 1000)


def test_a_store_that_cannot_be_opened_is_said_and_can_be_forgotten(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.close()
    ledger = (owned.folder / "ledger.jsonl").read_bytes()
    damage(owned.folder)
    owned = devices(manifest, examples=[])
    status = owned.device.status()
    assert "is damaged" in status.problem and status.num_examples == 0 and "unknown" in status.key_kept_in
    with pytest.raises(StateError, match="is damaged"):
        owned.device.add_example("a cab")
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "refusal"
    assert "is damaged" in owned.device.status().why_not_training
    owned.device.forget()
    owned.device.add_example("a cab", "who")
    assert owned.device.status().problem is None
    assert (owned.folder / "ledger.jsonl").read_bytes() == ledger
    assert server.offer(offered(manifest)).kind == "ready"


def test_a_store_that_breaks_while_it_is_open_can_be_forgotten(base: Path, devices) -> None:
    owned = devices(examples=[(MARKER, MARKER)])
    (owned.folder / "examples" / "store.key").write_bytes(b"{}")
    for name in ("examples.db", "examples.db-wal"):
        path = owned.folder / "examples" / name
        path.write_bytes(b"\xff" * path.stat().st_size)
    owned.device.forget()
    assert owned.device.status().num_examples == 0
    owned.device.add_example("a cab")
    assert owned.device.status().num_examples == 1


def test_what_cannot_be_erased_does_not_keep_the_rest(base: Path, server, devices, monkeypatch) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    begin(server, owned, manifest)
    Round(manifest, server.ask).run(1)

    def refuse(folder: Path) -> None:
        raise StateError("the disk refuses")

    monkeypatch.setattr(owned.device._examples, "erase", lambda: refuse(owned.folder))
    with pytest.raises(StateError, match="the disk refuses"):
        owned.device.forget()
    assert not (owned.folder / "adapters").exists() and owned.device.status().is_running


# The adapter that is kept.


def test_a_kill_while_an_adapter_is_kept_leaves_the_old_one_or_the_new(base: Path, tmp_path: Path) -> None:
    manifest = a_run(base)
    old, new = (vectors.to_bytes(a_model(manifest, seed), manifest.template) for seed in (1, 2))
    found = set()
    for num_calls in range(100):
        folder = tmp_path / str(num_calls)
        folder.mkdir()
        kept_adapter.keep(folder, manifest, 1, old)
        code = kills.run_and_kill(lambda folder=folder: kept_adapter.keep(folder, manifest, 2, new), num_calls)
        adapter = kept_adapter.load(folder, manifest)
        content = vectors.to_bytes(adapter, manifest.template)
        assert content in (old, new)
        found.add(content)
        assert kept_adapter.newest(folder).round_num == (1 if content == old else 2)
        if code == 0:
            break
        kept_adapter.keep(folder, manifest, 3, new)
        assert len(list((folder / "adapters").iterdir())) == 2, "and no litter stays"
    assert code == 0 and found == {old, new} and content == new


@pytest.mark.parametrize("spoil", ["pointer", "content", "both missing", "other content"])
def test_a_damaged_adapter_is_passed_over_and_replaced(base: Path, tmp_path: Path, spoil: str) -> None:
    manifest = a_run(base)
    content = vectors.to_bytes(a_model(manifest), manifest.template)
    kept_adapter.keep(tmp_path, manifest, 5, content)
    (path,) = (tmp_path / "adapters").glob("*.f32")
    if spoil == "pointer":
        (tmp_path / "adapters" / "NEWEST.json").write_bytes(b"[]")
    elif spoil == "content":
        path.write_bytes(content[:-1])
    elif spoil == "other content":
        path.write_bytes(bytes(len(content)))
    else:
        path.unlink()
    assert kept_adapter.newest(tmp_path) is None and kept_adapter.load(tmp_path, manifest) is None
    kept_adapter.keep(tmp_path, manifest, 1, content)
    assert kept_adapter.newest(tmp_path).round_num == 1


def test_an_adapter_that_is_read_while_it_is_replaced_is_the_one_or_the_other(base: Path, tmp_path: Path) -> None:
    manifest = a_run(base)
    contents = [vectors.to_bytes(a_model(manifest, seed), manifest.template) for seed in (1, 2)]
    kept_adapter.keep(tmp_path, manifest, 0, contents[0])
    is_over = threading.Event()

    def replace() -> None:
        for round_num in range(40):
            kept_adapter.keep(tmp_path, manifest, round_num, contents[round_num % 2])
        is_over.set()

    thread = threading.Thread(target=replace)
    thread.start()
    num_read = 0
    while not is_over.is_set():
        adapter = kept_adapter.load(tmp_path, manifest)
        assert adapter is not None and vectors.to_bytes(adapter, manifest.template) in contents
        num_read += 1
    thread.join()
    assert num_read > 0


def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    manifest = a_run(base)
    with pytest.raises(UpdateError):
        kept_adapter.keep(tmp_path, manifest, 1, b"\x00" * 8)
    assert kept_adapter.newest(tmp_path) is None


# The folder, and methods at the wrong time.


@pytest.mark.parametrize("is_enrolled", [True, False])
def test_a_second_device_in_one_folder_is_refused_clearly(devices, is_enrolled) -> None:
    owned = devices(is_enrolled=is_enrolled)
    with pytest.raises(StateError, match="is open in another Device: close that one"):
        devices(is_enrolled=is_enrolled, examples=[])
    owned.device.close()
    devices(is_enrolled=is_enrolled, examples=[])


def test_every_method_of_a_closed_device_says_that_it_was_closed(devices) -> None:
    device = devices().device
    device.close()
    device.close()
    for call in (
        lambda: device.add_example("a cab"),
        lambda: device.add_examples([("who", "Abe")]),
        lambda: device.public_keys,
        lambda: device.enrol(b"", b""),
        device.start,
        device.stop,
        device.status,
        device.receipts,
        lambda: device.consent("0" * 64),
        lambda: device.withdraw("0" * 64),
        lambda: device.reply("who"),
        lambda: device.reply_in_pieces("who"),
        device.forget,
    ):
        with pytest.raises(StateError, match="was closed: open it again"):
            call()


@pytest.mark.parametrize("examples", [[MARKER], [(MARKER,)], [(MARKER, 5)], [(5, MARKER)], [("who", "")], 7])
def test_examples_that_are_none_are_refused_without_quoting_them(devices, examples) -> None:
    owned = devices(examples=[])
    with pytest.raises(ConfigError) as refused:
        owned.device.add_examples(examples)
    assert MARKER not in str(refused.value) and owned.device.status().num_examples == 0


@pytest.mark.parametrize(
    ("server", "server_key", "reason"),
    [
        ("http://example.org:443", None, "has no TLS, and example.org is not this machine"),
        ("ftp://example.org", None, "server"),
        ("https://127.0.0.1:1", "/nowhere/ca.crt", "can't read"),
        ("https://127.0.0.1:1", "-----BEGIN CERTIFICATE-----\nno", "no certificate in PEM"),
        ("https://[::1", None, "expected https://HOST:PORT"),
        ("https://example.org:99999", None, "expected https://HOST:PORT"),
        ("https://example.org:0", None, "expected https://HOST:PORT"),
        ("https://:443", None, "expected https://HOST:PORT"),
        ("https://127.0.0.1:1", "~nobody-of-that-name/ca.crt", "expected a certificate in PEM, or the path"),
        (None, None, "which server?"),
    ],
)
def test_a_server_that_cannot_be_used_is_said_before_anything_runs(tmp_path, base, server, server_key, reason) -> None:
    def begin() -> None:
        with Device(
            tmp_path / "anna", server, server_key, config=world.settings(base), find_keyring=lambda: None
        ) as device:
            device.start()

    with pytest.raises(ConfigError, match=reason.replace("?", r"\?")):
        begin()


def test_a_folder_that_is_no_devices_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    with pytest.raises(ConfigError, match="no device's folder"):
        Device(tmp_path / "letters", find_keyring=lambda: None)
    assert list((tmp_path / "letters").iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("a\0b", "expected a path"),
        ("~nobody-of-that-name/anna", "expected a path"),
        (7, "expected a path"),
        ("x" * 300, "name too long; .* choose another"),
        (f"{__file__}/anna", "Not a directory; .* choose another"),
    ],
)
def test_what_can_be_no_folder_is_said(folder, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        Device(folder, find_keyring=lambda: None)


@contextlib.contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """Inside, this process may not look into the folder, though it be root."""
    is_root = os.geteuid() == 0
    folder.chmod(0)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_a_folder_of_another_user_is_said(devices, tmp_path) -> None:
    owned = devices(is_enrolled=False)
    owned.device.close()
    for place in (owned.folder, tmp_path):
        with forbidden(place), pytest.raises(ConfigError, match="Permission denied; let the user who runs this own it"):
            Device(owned.folder, find_keyring=lambda: None)


def test_a_file_of_it_that_cannot_be_looked_at_is_said(devices) -> None:
    owned = devices(is_enrolled=False)
    owned.device.close()
    (owned.folder / "device.toml").symlink_to("x" * 300)
    with pytest.raises(ConfigError, match="name too long"):
        Device(owned.folder, find_keyring=lambda: None)


def test_a_store_that_cannot_be_made_keeps_no_device_from_opening(devices) -> None:
    owned = devices(examples=[])
    owned.device.close()
    (owned.folder / "examples").rename(owned.folder / "elsewhere")
    (owned.folder / "examples").write_bytes(b"in the way")
    device = devices(examples=[]).device
    assert "can't make a store" in device.status().problem and device.status().num_examples == 0
    with pytest.raises(ConfigError, match="can't make a store"):
        device.add_example("a cab")
    with pytest.raises(StateError, match="delete that folder"):
        device.forget()
    (owned.folder / "examples").unlink()
    device.forget()
    device.add_example("a cab")
    assert device.status().problem is None and device.status().num_examples == 1


def test_start_goes_on_and_comes_again(base: Path, server, devices) -> None:
    owned = devices(a_run(base))
    owned.device.start()
    worker = owned.device._worker
    owned.device.start()
    assert owned.device._worker is worker
    owned.device.stop()
    owned.device.stop()
    owned.device.start()
    assert server.offer(offered(a_run(base))).kind == "ready"
