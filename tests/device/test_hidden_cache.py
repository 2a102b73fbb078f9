"""What is kept on a device's disk of its examples' hidden states: sealed, bounded, gone with what it was made of."""

import os
from pathlib import Path

import pytest

from fedmini.config import StoreSection
from fedmini.device.hidden_cache import HiddenCache
from fedmini.model.lora import LoraModel
from fedmini.store import ExampleStore
from fedmini.store.sealing import OVERHEAD_BYTES
from fedmini.types import LoraShape
from tests import tiny_llama
from tests.device.test_device_rounds import begin
from tests.device.world import a_run

CONTENT = b"what was computed from what a person wrote"


@pytest.fixture
def store(tmp_path: Path):
    with ExampleStore.open(tmp_path / "examples", StoreSection(), find_keyring=lambda: None) as opened:
        yield opened


@pytest.fixture
def cache(tmp_path: Path, store: ExampleStore) -> HiddenCache:
    return HiddenCache(tmp_path / "hidden", 1000, store.sealer)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "hidden").iterdir()) if (folder / "hidden").exists() else []


def test_what_is_kept_is_read_again_also_after_a_restart(tmp_path: Path, store, cache) -> None:
    assert cache.read(b"one") is None
    cache.keep(b"one", CONTENT)
    assert cache.read(b"one") == CONTENT and cache.read(b"two") is None
    assert HiddenCache(tmp_path / "hidden", 1000, store.sealer).read(b"one") == CONTENT


def test_nothing_of_it_can_be_read_on_the_disk_and_by_nobody_else(tmp_path: Path, cache) -> None:
    cache.keep(b"one", CONTENT)
    (path,) = files(tmp_path)
    assert CONTENT not in path.read_bytes() and b"one".hex() not in path.name and len(path.name) == 64
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    other = ExampleStore.open(tmp_path / "other", StoreSection(), find_keyring=lambda: None)
    with other:
        assert other.sealer().blinded(b"one") != path.name
        path.rename(path.with_name(other.sealer().blinded(b"one")))
        assert HiddenCache(tmp_path / "hidden", 1000, other.sealer).read(b"one") is None


def test_what_was_altered_or_put_in_another_place_is_missing(tmp_path: Path, cache, store) -> None:
    cache.keep(b"one", CONTENT)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.with_name(store.sealer().blinded(b"two")).write_bytes(whole)
    assert cache.read(b"two") is None
    for damaged in (
        b"",
        whole[:20],
        whole[:-1],
        bytes([whole[0] ^ 1]) + whole[1:],
        whole[:-1] + bytes([whole[-1] ^ 1]),
    ):
        path.write_bytes(damaged)
        assert cache.read(b"one") is None
    cache.keep(b"one", CONTENT)
    assert cache.read(b"one") == CONTENT


def test_an_example_of_the_store_is_no_state_and_a_state_no_example(store) -> None:
    sealer = store.sealer()
    assert sealer.open_derived(sealer.seal_example(CONTENT, 1, 2), b"") is None
    assert sealer.open_example(sealer.seal_derived(CONTENT, b"one"), 1, 2) is None


def test_it_never_takes_more_room_than_it_may_and_keeps_what_came_first(tmp_path: Path, store) -> None:
    each = 100 + OVERHEAD_BYTES
    cache = HiddenCache(tmp_path / "hidden", 3 * each, store.sealer)
    for name in (b"a", b"b", b"c", b"d"):
        cache.keep(name, bytes(100))
    assert [cache.read(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, True, True, False]
    cache.keep(b"a", bytes(100))  # again: it takes its own place
    assert sum(path.stat().st_size for path in files(tmp_path)) == 3 * each


def test_however_much_is_kept_the_folder_is_looked_through_once(tmp_path: Path, store, monkeypatch) -> None:
    looked, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looked.append(folder) or scan(folder))
    cache = HiddenCache(tmp_path / "hidden", 10**6, store.sealer)
    for place in range(50):
        cache.keep(str(place).encode(), CONTENT)
    assert len(looked) == 1 and len(files(tmp_path)) == 50


def test_what_makes_room_is_counted_whoever_made_it(tmp_path: Path, store) -> None:
    """A smaller state in a larger one's place, what `keep_only` lets go of, a folder that is erased, a restart."""
    each = 100 + OVERHEAD_BYTES
    cache = HiddenCache(tmp_path / "hidden", 2 * each, store.sealer)
    cache.keep(b"a", bytes(150)), cache.keep(b"b", bytes(100))
    assert cache.read(b"b") is None
    cache.keep(b"a", bytes(100)), cache.keep(b"b", bytes(100)), cache.keep(b"c", bytes(100))
    assert cache.read(b"b") is not None and cache.read(b"c") is None
    cache.keep_only({b"b"})
    cache.keep(b"c", bytes(100)), cache.keep(b"d", bytes(100))
    assert cache.read(b"c") is not None and cache.read(b"d") is None
    again = HiddenCache(tmp_path / "hidden", 2 * each, store.sealer)
    again.keep(b"d", bytes(100))
    assert again.read(b"d") is None
    cache.erase()
    cache.keep(b"d", bytes(100)), cache.keep(b"e", bytes(100))
    assert cache.read(b"d") is not None and cache.read(b"e") is not None


def test_only_what_is_still_an_example_stays(tmp_path: Path, cache) -> None:
    for name in (b"a", b"b"):
        cache.keep(name, CONTENT)
    (tmp_path / "hidden" / "partial-killed").write_bytes(b"half")
    cache.keep_only({b"b", b"c"})
    assert cache.read(b"a") is None and cache.read(b"b") == CONTENT
    assert len(files(tmp_path)) == 1


def test_what_was_kept_before_the_store_was_erased_can_not_be_opened(tmp_path: Path, store, cache) -> None:
    cache.keep(b"one", CONTENT)
    (path,) = files(tmp_path)
    sealed = path.read_bytes()
    store.erase()
    assert store.sealer().open_derived(sealed, b"one") is None
    cache.keep_only({b"one"})
    assert files(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_costs_nothing_but_time(tmp_path: Path, cache) -> None:
    tmp_path.chmod(0o500)
    try:
        cache.keep(b"one", CONTENT)
        assert cache.read(b"one") is None
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_is_no_folder_costs_nothing_but_time(tmp_path: Path, cache) -> None:
    (tmp_path / "hidden").write_bytes(b"")
    cache.keep(b"one", CONTENT)
    cache.keep_only(set())
    assert cache.read(b"one") is None


def test_a_models_gradients_are_the_same_from_the_disk(cache, tmp_path: Path) -> None:
    cache = HiddenCache(tmp_path / "hidden", 10**6, cache._sealer)
    shape = LoraShape(2, 4.0, ("v_proj",), (1,), "B", 0)
    plain, keeping = (tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), shape)) for _ in range(2))
    keeping.set_adapter(plain.adapter())
    keeping.keep_states(cache)
    examples = tiny_llama.examples((5, 9))
    expected = plain.example_gradients(examples).gradients
    for _ in range(2):
        assert (keeping.example_gradients(examples).gradients - expected).norm() <= 1e-6 * expected.norm()
    assert len(files(tmp_path)) == 2


def top_run(base: Path, **changes):
    """A run of the tiny model's upper layer alone, where each example is drawn in every other round."""
    return a_run(base, "top", lora_layers=(1,), most=6, **changes)


def test_a_device_keeps_states_while_it_trains_and_forgets_them_with_the_rest(base: Path, server, devices) -> None:
    manifest = top_run(base)
    owned = devices(manifest)
    work = begin(server, owned, manifest)
    work.run(1), work.run(2)
    assert owned.device.status().rounds_joined == 2 and files(owned.folder)
    owned.device.forget()
    assert files(owned.folder) == []


def test_a_device_lets_go_of_them_when_it_leaves_a_run(base: Path, server, devices) -> None:
    manifest = top_run(base)
    owned = devices(manifest)
    begin(server, owned, manifest).run(1)
    assert files(owned.folder)
    owned.device.stop()
    owned.device.withdraw(manifest.hash)
    assert files(owned.folder) == []


def test_without_room_or_where_an_example_is_drawn_but_once_nothing_is_kept(base: Path, server, devices) -> None:
    manifest = top_run(base)
    owned = devices(manifest, training={"max_memory_bytes": 2**34, "max_hidden_bytes": 0})
    begin(server, owned, manifest).run(1)
    assert files(owned.folder) == []
    owned.device.close()
    rare = top_run(base, sampling_rate=0.1)
    other = devices(rare, name="bea")
    begin(server, other, rare).run(1)
    assert files(other.folder) == []
