"""The caps and the frozen sets against a model in plain lists, over whatever is done to a store, in any order."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st
from stores import IN_MEMORY, open_store, responses

from fedmini.config.device_sections import StoreSection
from fedmini.store import StoredExample

OVERHEAD_BYTES = 8 + 12 + 16  # the length of the prompt, the nonce, the tag
Step: TypeAlias = tuple[str, int]

limits_drawn = st.builds(
    StoreSection,
    max_examples=st.integers(1, 6),
    max_bytes=st.integers(150, 400),
    max_age_days=st.sampled_from([None, 10 / 1440, 60 / 1440]),  # 10 minutes, an hour
)
steps_drawn = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 100)),  # letters
        st.tuples(st.just("add many"), st.integers(0, 9)),  # examples
        st.tuples(st.just("wait"), st.integers(1, 1500)),  # seconds
        st.tuples(st.just("freeze"), st.integers(0, 2)),  # which run, and one example less than it may have
        st.tuples(st.just("thaw"), st.integers(0, 2)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("erase"), st.just(0)),
    ),
    max_size=25,
)


@dataclass
class Model:
    """What a store should hold: (text, minute) of each kept example, and of each run's frozen set."""

    limits: StoreSection
    now_s: float = 1e9
    kept: list[tuple[str, int]] = field(default_factory=list)
    frozen: dict[int, list[tuple[str, int]]] = field(default_factory=dict)

    def add(self, texts: Sequence[str]) -> None:
        self.kept += [(text, math.floor(self.now_s / 60)) for text in texts]
        while len(self.kept) > self.limits.max_examples or self.size_bytes > self.limits.max_bytes:
            self.kept.pop(0)

    def expire(self) -> None:
        age_s = math.inf if self.limits.max_age_days is None else self.limits.max_age_days * 86400
        self.kept = [one for one in self.kept if one[1] * 60 + age_s > self.now_s]
        self.frozen = {
            run: [one for one in members if one[1] * 60 + age_s > self.now_s] for run, members in self.frozen.items()
        }

    @property
    def size_bytes(self) -> int:
        return sum(len(text) + OVERHEAD_BYTES for text, _ in self.kept)


@settings(max_examples=100)
@given(limits=limits_drawn, steps=steps_drawn)
def test_a_store_holds_what_its_caps_allow_and_a_frozen_set_changes_by_age_and_erasure_only(
    limits: StoreSection, steps: list[Step]
) -> None:
    model = Model(limits)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as parent:
        folder = Path(parent) / "store"
        store = open_store(folder, limits, clock=lambda: model.now_s)
        for position, (what, number) in enumerate(steps):
            model.expire()
            match what:
                case "add":
                    text = f"{position}:".ljust(number, "x")
                    store.add(text)
                    model.add([text])
                case "add many":
                    texts = [f"{position}.{index}" for index in range(number)]
                    assert store.add_many(StoredExample(text) for text in texts) == number
                    model.add(texts)
                case "wait":
                    model.now_s += number
                    model.expire()
                case "freeze":
                    expected = model.frozen.setdefault(number, model.kept[-(number + 1) :])
                    assert [one.response for one in store.freeze(f"run {number}", number + 1)] == [
                        text for text, _ in expected
                    ]
                case "thaw":
                    store.thaw(f"run {number}")
                    model.frozen.pop(number, None)
                case "reopen":
                    store.close()
                    store = open_store(folder, limits, clock=lambda: model.now_s)
                case "erase":
                    store.erase()
                    model.kept, model.frozen = [], {}
            assert responses(store) == [text for text, _ in model.kept]
            assert (store.num_examples, store.size_bytes) == (len(model.kept), model.size_bytes)
            assert store.num_examples <= limits.max_examples and store.size_bytes <= limits.max_bytes
        for run, expected in model.frozen.items():
            assert [one.response for one in store.freeze(f"run {run}", 99)] == [text for text, _ in expected]
        store.close()


@settings(max_examples=15)
@given(
    ages_minutes=st.lists(st.integers(0, 30), min_size=2, max_size=8),
    removed=st.integers(0, 7),
    later=st.integers(0, 12),
    waited_minutes=st.integers(0, 40),
)
def test_one_example_less_in_a_frozen_set_stays_one_example_less_whatever_comes_later(
    ages_minutes: list[int], removed: int, later: int, waited_minutes: int
) -> None:
    came = sorted(ages_minutes, reverse=True)
    removed %= len(came)
    limits = StoreSection(max_examples=len(came), max_age_days=35 / 1440)

    def members_at_last(texts: dict[str, int]) -> list[str]:
        now_s = 0.0
        with (
            tempfile.TemporaryDirectory(dir=IN_MEMORY) as parent,
            open_store(Path(parent) / "store", limits, clock=lambda: now_s) as store,
        ):
            for text, age_minutes in texts.items():
                now_s = (30 - age_minutes) * 60.0
                store.add(text)
            now_s = 30 * 60.0
            store.freeze("run", len(came))
            store.add_many(StoredExample(f"later {index}") for index in range(later))
            now_s += waited_minutes * 60.0
            return [one.response for one in store.freeze("run", len(came))]

    whole = {f"example {index}": age for index, age in enumerate(came)}
    neighbour = {text: age for text, age in whole.items() if text != f"example {removed}"}
    with_it, without_it = members_at_last(whole), members_at_last(neighbour)
    assert without_it == [text for text in with_it if text != f"example {removed}"]
    assert with_it == [text for text, age in whole.items() if age + waited_minutes < 35]


def test_evicted_members_of_a_frozen_set_leave_the_disk_when_it_is_thawed(tmp_path: Path) -> None:
    limits = StoreSection(max_examples=1)
    with open_store(tmp_path / "store", limits) as store:
        store.add("a")
        store.freeze("first run", 1)
        store.freeze("second run", 1)
        store.add("b")
        assert responses(store) == ["b"]
        store.thaw("first run")
        assert [one.response for one in store.freeze("second run", 1)] == ["a"]
        store.thaw("second run")
        store.thaw("a run that never was")
        with store._database.transaction() as connection:
            assert connection.execute("SELECT COUNT(*) FROM examples").fetchone() == (1,)
        assert [one.response for one in store.freeze("first run", 1)] == ["b"]


def test_the_model_itself_evicts_by_count_and_by_size() -> None:
    model = Model(StoreSection(max_examples=2, max_bytes=150))
    model.add(["a", "b", "c"])
    assert [text for text, _ in model.kept] == ["b", "c"]
    model.add(["x" * 100])
    assert [text for text, _ in model.kept] == ["x" * 100]
