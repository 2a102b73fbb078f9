"""Who holds which example, and who is held out: fedmini/data/population.py."""

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.config import DataSection
from fedmini.data import Example, Population, load_evaluation, load_population
from fedmini.errors import ConfigError


def rows_of(sizes):
    """`sizes` maps a person to how many examples they have, each of which names its owner."""
    return [
        {"client": person, "prompt": f"ask {person} {index}", "response": f"{person} {index}"}
        for person, size in sizes.items()
        for index in range(size)
    ]


def section(**settings):
    return DataSection(source="chitchat", **settings)


def owners(devices):
    return {device: {example.response.split()[0] for example in examples} for device, examples in devices.items()}


def test_every_person_is_a_device_that_holds_their_own_examples_in_order():
    population = load_population(section(), rows_of({"ann": 2, "bob": 1}))

    assert population.devices == {
        "ann": (Example("ask ann 0", "ann 0"), Example("ask ann 1", "ann 1")),
        "bob": (Example("ask bob 0", "bob 0"),),
    }
    assert population.held_out == {}


def test_rows_may_come_as_lists_by_device():
    by_device = {7: [{"text": "one"}, {"prompt": "p", "response": "two"}], "x": [{"text": "three"}]}

    assert load_population(section(), by_device).devices == {
        "7": (Example(None, "one"), Example("p", "two")),
        "x": (Example(None, "three"),),
    }


def test_a_number_and_the_same_number_as_text_are_one_device():
    population = load_population(section(), [{"client": 1, "text": "a"}, {"client": "1", "text": "b"}])

    assert population.devices == {"1": (Example(None, "a"), Example(None, "b"))}


@given(
    sizes=st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 12), min_size=1, max_size=12),
    min_examples=st.integers(1, 4),
    extra_cap=st.integers(0, 6),
    held_out=st.integers(0, 3),
    max_devices=st.none() | st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_nobody_is_on_both_sides_and_everybody_is_within_the_limits(
    sizes, min_examples, extra_cap, held_out, max_devices, seed
):
    chosen = section(
        min_examples=min_examples,
        max_examples_per_device=min_examples + extra_cap,
        held_out_devices=held_out,
        max_devices=max_devices,
        split_seed=seed,
    )
    num_eligible = sum(size >= min_examples for size in sizes.values())
    if num_eligible <= held_out:
        with pytest.raises(ConfigError):
            load_population(chosen, rows_of(sizes))
        return

    population = load_population(chosen, rows_of(sizes))

    assert not population.devices.keys() & population.held_out.keys()
    assert len(population.held_out) == held_out
    assert len(population.devices) == min(num_eligible - held_out, max_devices or num_eligible)
    for device, examples in (population.devices | population.held_out).items():
        assert len(examples) == min(sizes[device], min_examples + extra_cap)
        numbers = [int(example.response.removeprefix(f"{device} ")) for example in examples]
        assert numbers == sorted(set(numbers)), "the examples are the device's own, in order, none twice"
    assert population == load_population(chosen, rows_of(sizes))


def test_the_cap_takes_examples_from_everywhere_and_another_seed_takes_others():
    rows = rows_of({"ann": 1000})

    kept = [
        [
            int(example.response.split()[1])
            for example in load_population(section(max_examples_per_device=100, split_seed=seed), rows).devices["ann"]
        ]
        for seed in (0, 1)
    ]

    assert kept[0] != kept[1]
    assert all(350 < sum(numbers) / 100 < 650 for numbers in kept), "not the first or the last hundred"


def test_a_person_who_joins_moves_at_most_one_other():
    people = {f"person{number}": 3 for number in range(40)}
    chosen = section(held_out_devices=10, max_devices=20)
    before = load_population(chosen, rows_of(people))

    after = load_population(chosen, rows_of({"newcomer": 3} | people))

    assert len(before.held_out.keys() - after.held_out.keys()) <= 1
    assert len(before.devices.keys() - after.devices.keys()) <= 1


def test_the_order_of_the_people_in_the_data_changes_nothing():
    people = {f"person{number}": 3 for number in range(20)}
    chosen = section(held_out_devices=5, max_devices=7)

    forward, backward = (
        load_population(chosen, rows_of(dict(items))) for items in (people.items(), reversed(people.items()))
    )

    assert forward == backward
    assert list(forward.devices) == list(backward.devices) == sorted(forward.devices)


def test_max_devices_does_not_change_who_is_held_out():
    people = {f"person{number}": 3 for number in range(20)}

    held_out = [
        load_population(section(held_out_devices=5, max_devices=most), rows_of(people)).held_out for most in (None, 1)
    ]

    assert held_out[0] == held_out[1]


def test_nobody_below_the_minimum_is_held_out():
    people = {f"small{number}": 1 for number in range(50)} | {"big1": 5, "big2": 5}

    population = load_population(section(min_examples=5, held_out_devices=1), rows_of(people))

    assert population.devices.keys() | population.held_out.keys() == {"big1", "big2"}


def test_too_high_a_minimum_says_how_many_devices_there_are_and_what_the_largest_has():
    with pytest.raises(
        ConfigError, match=r"no device has data.min_examples = 9 .* 2 devices, the largest with 7; lower"
    ):
        load_population(section(min_examples=9), rows_of({"ann": 7, "bob": 2}))


def test_holding_everybody_out_is_refused():
    with pytest.raises(ConfigError, match=r"data.held_out_devices = 2 leaves nobody .* 2 of 3 devices .* fewer than 2"):
        load_population(section(min_examples=2, held_out_devices=2), rows_of({"ann": 7, "bob": 2, "cy": 1}))


@pytest.mark.parametrize("rows", [[], {}, {"ann": []}, iter(())])
def test_data_without_a_single_example_is_refused(rows):
    with pytest.raises(ConfigError, match="the data is empty"):
        load_population(section(), rows)


GOOD = {"client": "SECRET", "text": "SECRET"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "SECRET"], r"data, row 2: expected an object .* got str"),
        ([GOOD, {"client": "SECRET", "prompt": "SECRET"}], r'row 2: "response" is missing'),
        ([GOOD, {"client": "SECRET", "response": "SECRET"}], r'row 2: "prompt" is missing'),
        ([{"text": "SECRET"}], r'row 1: "client" is missing'),
        ([{"client": True, "text": "SECRET"}], r'"client": expected .* got bool'),
        ([{"client": 1.5, "text": "SECRET"}], r'"client": expected .* got float'),
        ([{"client": 10**5000, "text": "SECRET"}], r'"client": expected .* got int'),
        ([{"client": " ", "text": "SECRET"}], r'"client": expected .* got an empty one'),
        ([{"client": "SECRET", "text": " \n"}], r'"text": expected .* got an empty one'),
        ([{"client": "SECRET", "text": ["SECRET"]}], r'"text": expected .* got list'),
        (
            [{"client": "SECRET", "prompt": None, "response": "SECRET"}],
            r'"prompt": expected .* give "text"\), got None',
        ),
        ([{"client": "SECRET", "text": "SECRET", "response": "SECRET"}], r'"text" stands beside'),
        ([{"client": "SECRET", "text": "SECRET\ud800"}], r'"text": it holds half of a surrogate pair'),
        ({"SECRET": [GOOD], "SECRET2": [GOOD, 3]}, r"data, device 2, row 2: expected an object .* got int"),
        ({"SECRET": "SECRET"}, r"data, device 1: expected a list of mappings, got str"),
        ("SECRET", r"data: expected a list of mappings, got str"),
        (5, r"data: expected a list of mappings, got int"),
    ],
)
def test_a_wrong_row_is_named_by_its_number_and_never_shown(rows, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_population(section(), rows)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_mean_nothing_here_are_ignored():
    population = load_population(section(), [{"client": "ann", "text": "hi", "when": 5, "mood": None}])

    assert population.devices == {"ann": (Example(None, "hi"),)}


@given(
    topics=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=60),
    num_devices=st.integers(1, 8),
    concentration=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0, 1e300]),
    seed=st.integers(0, 2**64),
)
@settings(max_examples=60)
def test_a_dirichlet_split_deals_every_example_exactly_once(topics, num_devices, concentration, seed):
    chosen = section(split="dirichlet", num_devices=num_devices, dirichlet_concentration=concentration, split_seed=seed)
    rows = [{"text": str(number)} | ({} if topic is None else {"client": topic}) for number, topic in enumerate(topics)]

    population = load_population(chosen, rows)

    dealt = [int(example.response) for examples in population.devices.values() for example in examples]
    assert sorted(dealt) == list(range(len(topics)))
    assert len(population.devices) <= num_devices
    assert population == load_population(chosen, rows)


def test_a_small_concentration_gives_a_topic_to_few_devices_and_a_large_one_to_all():
    rows = [{"client": f"topic{number % 5}", "text": f"topic{number % 5}"} for number in range(2000)]

    def mean_topics(concentration):
        chosen = section(
            split="dirichlet", num_devices=20, dirichlet_concentration=concentration, max_examples_per_device=2000
        )
        held = owners(load_population(chosen, rows).devices)
        return sum(map(len, held.values())) / len(held)

    assert mean_topics(0.01) < 2 < 4.9 < mean_topics(100.0)


def test_a_dirichlet_split_without_topics_skews_the_sizes():
    rows = [{"text": str(number)} for number in range(2000)]

    def spread(concentration):
        chosen = section(
            split="dirichlet", num_devices=20, dirichlet_concentration=concentration, max_examples_per_device=2000
        )
        sizes = [len(examples) for examples in load_population(chosen, rows).devices.values()]
        return max(sizes) / (2000 / 20)

    assert spread(0.1) > 3 > 1.5 > spread(1000.0)


def test_some_devices_of_a_dirichlet_split_are_held_out():
    chosen = section(split="dirichlet", num_devices=10, dirichlet_concentration=100.0, held_out_devices=3)

    population = load_population(chosen, [{"text": str(number)} for number in range(500)])

    assert (len(population.devices), len(population.held_out)) == (7, 3)
    assert all(device.startswith("device-") for device in population.devices)


def test_the_reprs_of_examples_and_populations_show_no_text():
    population = load_population(section(), [{"client": "ann", "prompt": "SECRET", "response": "SECRET"}])

    assert "SECRET" not in repr(population) + str(population) + repr(population.devices["ann"][0])
    with pytest.raises(FrozenInstanceError):
        population.devices["ann"][0].response = "other"


def test_an_unknown_source_names_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean shakespeare, or a file that ends in"):
        load_population(DataSection(source="shakespear"))
    with pytest.raises(ConfigError, match="expected one of chitchat, shakespeare, sotu, chatterbot"):
        load_evaluation("data.csv")


def test_an_evaluation_file_needs_no_clients(tmp_path):
    path = tmp_path / "public.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n" + json.dumps({"client": 1, "text": "t"}) + "\n")

    assert load_evaluation(str(path)) == (Example("p", "r"), Example(None, "t"))


def test_an_empty_evaluation_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")

    with pytest.raises(ConfigError, match="there is no example in"):
        load_evaluation(str(tmp_path / "empty.jsonl"))


def test_rows_take_the_place_of_the_source():
    population = load_population(DataSection(source="/nowhere/missing.jsonl"), [{"client": 1, "text": "t"}])

    assert population == Population(devices={"1": (Example(None, "t"),)}, held_out={})
