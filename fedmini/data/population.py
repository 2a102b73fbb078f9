"""Which device holds which examples, and who is held out for evaluation.

People are chosen by a hash of the seed and their name, not by a shuffle: a person who joins moves at most one other in
or out. None of this randomness protects anybody, so it may be seeded anywhere.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmini.config import DataSection
from fedmini.data import jsonl, sources
from fedmini.data.examples import Example, Record, parse_record
from fedmini.errors import ConfigError
from fedmini.types import DeviceId

Rows = Iterable[Mapping[str, Any]] | Mapping[Any, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Population:
    """Who trains and who is evaluated on, both sorted by device; nobody is in both."""

    devices: Mapping[DeviceId, tuple[Example, ...]]
    held_out: Mapping[DeviceId, tuple[Example, ...]]


def load_population(section: DataSection, rows: Rows | None = None) -> Population:
    """The devices that `section` describes, each with min_examples to max_examples_per_device examples.

    `rows` takes the place of `section.source`: mappings like the lines of a JSONL file, or lists of them by device.
    Held-out people come first in the order of the hash, then those who train: max_devices changes nobody's side.
    Raises ConfigError, which never holds what a row says.
    """
    needs_client = section.split == "people"
    records = _read_source(section.source, needs_client) if rows is None else _read_rows(rows, needs_client)
    groups = _group_by_person(records) if needs_client else _split_by_dirichlet(list(records), section)
    return _choose(groups, section)


def load_evaluation(source: str) -> tuple[Example, ...]:
    """Every example of a named data set or a JSONL file, in its order; there, `client` may be left out."""
    examples = tuple(record.example for record in _read_source(source, needs_client=False))
    if not examples:
        raise ConfigError(f"there is no example in {source}: evaluation needs at least one")
    return examples


def _read_source(source: str, needs_client: bool) -> Iterable[Record]:
    if source in sources.SOURCES:
        return sources.read_named_source(source)
    if source.endswith(jsonl.SUFFIXES):
        return jsonl.read_jsonl(Path(source), needs_client)
    nearest = difflib.get_close_matches(source, sources.SOURCES, n=1)
    hint = f"did you mean {nearest[0]}" if nearest else f"expected one of {', '.join(sources.SOURCES)}"
    raise ConfigError(f"unknown data source {source!r}: {hint}, or a file that ends in {', '.join(jsonl.SUFFIXES)}?")


def _read_rows(rows: Rows, needs_client: bool) -> Iterator[Record]:
    if not isinstance(rows, Mapping):
        for row_num, row in enumerate(_iterate(rows, "data"), start=1):
            yield parse_record(row, f"data, row {row_num}", needs_client)
        return
    for device_num, (client, device_rows) in enumerate(rows.items(), start=1):
        where = f"data, device {device_num}"
        for row_num, row in enumerate(_iterate(device_rows, where), start=1):
            named_row = {**row, "client": client} if isinstance(row, Mapping) else row
            yield parse_record(named_row, f"{where}, row {row_num}", needs_client)


def _iterate(rows: Any, where: str) -> Iterator[Any]:
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise ConfigError(f"{where}: expected a list of mappings, got {type(rows).__name__}")
    return iter(rows)


def _group_by_person(records: Iterable[Record]) -> dict[DeviceId, list[Example]]:
    groups: dict[DeviceId, list[Example]] = {}
    for record in records:
        groups.setdefault(str(record.client), []).append(record.example)
    return groups


def _split_by_dirichlet(records: Sequence[Record], section: DataSection) -> dict[DeviceId, list[Example]]:
    """Examples dealt to `num_devices` devices: each client value (a topic) in Dirichlet proportions of its own.

    A small concentration gives a topic to few devices (arXiv:1909.06335). Without topics, the sizes are skewed.
    Every example goes to exactly one device. The same person's lines can be on several: only for data without people.
    """
    num_devices = section.num_devices or 1
    generator = np.random.Generator(np.random.PCG64(section.split_seed))
    topics: dict[str, list[Example]] = {}
    for record in records:
        topics.setdefault(record.client or "", []).append(record.example)
    devices: list[list[Example]] = [[] for _ in range(num_devices)]
    for topic in sorted(topics):
        examples = topics[topic]
        proportions = generator.dirichlet(np.full(num_devices, section.dirichlet_concentration))  # (num_devices,)
        if not np.isfinite(proportions).all():  # a concentration beyond float64: its limit is the even split
            proportions = np.full(num_devices, 1 / num_devices)
        ends = np.cumsum(generator.multinomial(len(examples), proportions))  # (num_devices,)
        for device, indices in zip(devices, np.split(generator.permutation(len(examples)), ends[:-1]), strict=True):
            device.extend(examples[index] for index in indices)
    width = len(str(num_devices - 1))
    return {f"device-{device_num:0{width}}": examples for device_num, examples in enumerate(devices)}


def _choose(groups: Mapping[DeviceId, Sequence[Example]], section: DataSection) -> Population:
    seed, min_examples, num_held_out = section.split_seed, section.min_examples, section.held_out_devices
    eligible = [device for device, examples in groups.items() if len(examples) >= min_examples]
    if not eligible:
        largest = max(map(len, groups.values()), default=0)
        raise ConfigError(
            f"no device has data.min_examples = {min_examples} examples: there are {len(groups)} devices, the largest "
            f"with {largest}; " + ("lower data.min_examples" if largest else "the data is empty, give other data")
        )
    if num_held_out >= len(eligible):
        raise ConfigError(
            f"data.held_out_devices = {num_held_out} leaves nobody to train: {len(eligible)} of {len(groups)} devices "
            f"have data.min_examples = {min_examples} examples; hold out fewer than {len(eligible)}"
        )
    eligible.sort(key=lambda device: _hash(seed, device).digest())
    training = eligible[num_held_out:][: section.max_devices]

    def capped(devices: Sequence[DeviceId]) -> dict[DeviceId, tuple[Example, ...]]:
        return {
            device: _cap(groups[device], _hash(seed, device), section.max_examples_per_device)
            for device in sorted(devices)
        }

    return Population(devices=capped(training), held_out=capped(eligible[:num_held_out]))


def _cap(examples: Sequence[Example], device_hash: "hashlib._Hash", cap: int) -> tuple[Example, ...]:
    """At most `cap` of the examples, in their order: those whose place has the smallest hash."""
    if len(examples) <= cap:
        return tuple(examples)

    def rank(index: int) -> bytes:
        place_hash = device_hash.copy()
        place_hash.update(index.to_bytes(8))
        return place_hash.digest()

    return tuple(examples[index] for index in sorted(sorted(range(len(examples)), key=rank)[:cap]))


def _hash(seed: int, device: DeviceId) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps([seed, device]).encode())
