"""A manifest as a file: what is signed, hashed and read is one and the same sequence of bytes."""

import contextlib
import hashlib
import json
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmini import manifest_file, planning
from fedmini.errors import UpdateError
from fedmini.types import LocalPlan, LoraShape, Manifest, ReleasePlan, UnitPlan
from tests import tiny_run

BASE = planning.Base("ab" * 32, (("x.lora_A.weight", (2, 64)), ("x.lora_B.weight", (64, 2))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifest")


def a_manifest(folder: Path, privacy: str = "both") -> Manifest:
    return planning.make_manifest(tiny_run.config(folder, privacy), "tiny-0a1b2c3d", BASE, None)


def dumped(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("privacy", tiny_run.PRIVACY)
def test_a_manifest_comes_back_and_its_bytes_are_those_that_its_hash_is_of(folder: Path, privacy: str) -> None:
    manifest = a_manifest(folder, privacy)
    content = manifest_file.canonical(manifest)
    assert manifest_file.parse(content) == manifest
    assert hashlib.sha256(content).hexdigest() == manifest.hash


@pytest.mark.parametrize("optimum", [{"target_epsilon": 4.0}, {"noise_multiplier": 3}])
def test_a_manifest_comes_back_however_its_noise_was_found_and_whatever_form_numbers_had(
    folder: Path, optimum: dict[str, float]
) -> None:
    privacy = {"device": {"noise": "shared", "clip_norm": 2, "target_delta": 1e-5} | optimum}
    chosen = tiny_run.config(
        folder, changes={"privacy": privacy, "lora": {"lora_alpha": 8}, "local": {"learning_rate": 1}}
    )
    manifest = planning.make_manifest(chosen, "tiny", BASE, None)
    assert manifest_file.parse(manifest_file.canonical(manifest)) == manifest


def floats(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most, allow_subnormal=False)


positive, count = floats(1e-6, 1e6), st.integers(1, 10**6)
printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
loras = st.builds(
    LoraShape,
    lora_rank=st.integers(1, 1024),
    lora_alpha=positive,
    target_modules=st.lists(printable, min_size=1, max_size=3).map(tuple),
    layers=st.none() | st.lists(st.integers(0, 1000), max_size=3).map(tuple),
    trained=st.sampled_from(["B", "AB"]),
    seed=st.integers(0, 2**63 - 1),
)
locals_ = st.builds(
    LocalPlan,
    num_steps=count,
    sampling_rate=floats(1e-9, 1),
    expected_batch_size=positive,
    learning_rate=positive,
    optimizer=st.sampled_from(["sgd", "adam"]),
    max_length=st.integers(8, 2**20),
    detach_prefix=st.booleans(),
)


def units(unit: str) -> st.SearchStrategy[UnitPlan | None]:
    return st.none() | st.builds(
        UnitPlan,
        unit=st.just(unit),
        noise=st.sampled_from(["local", "shared", "server"]),
        clip_norm=positive,
        noise_multiplier=positive,
        scale=positive,
        noise_variance=st.integers(1, 2**44),
        num_shares=count,
        z_eff=positive,
        target_delta=floats(1e-30, 0.999),
    )


releases = st.builds(
    ReleasePlan,
    example=units("example"),
    device=units("device"),
    encoding_norm=positive,
    scale=positive,
    modulus_bits=st.sampled_from([24, 32]),
    num_metrics=st.integers(0, 16),
    cohort_size=count,
    max_devices=count,
    min_survivors=count,
    n_honest=count,
    max_participations=count,
    max_releases=count,
    min_separation=count,
)
manifests = st.builds(
    Manifest,
    run_id=st.from_regex(r"\A[A-Za-z0-9._-]{1,128}\Z"),
    base_fingerprint=st.from_regex(r"\A[0-9a-f]{64}\Z"),
    lora=loras,
    template=st.dictionaries(
        printable, st.lists(st.integers(1, 50), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4
    ).map(lambda shapes: tuple(sorted(shapes.items()))),
    local=locals_,
    release=releases,
    num_rounds=count,
    target_epsilon=st.dictionaries(st.sampled_from(["example", "device"]), positive).map(lambda b: tuple(b.items())),
)


@given(manifest=manifests)
def test_any_manifest_in_range_comes_back_exactly(manifest: Manifest) -> None:
    content = manifest_file.canonical(manifest)
    assert manifest_file.parse(content) == manifest
    assert manifest_file.canonical(manifest_file.parse(content)) == content


def test_every_field_has_a_range() -> None:
    def same(ranges: Any, kind: Any) -> None:
        hints = get_type_hints(kind)
        assert list(ranges.model_fields) == [field.name for field in fields(kind)]
        for name, field in ranges.model_fields.items():
            for ours in [hints[name], *get_args(hints[name])]:
                if is_dataclass(ours):
                    theirs = [one for one in (field.annotation, *get_args(field.annotation)) if one is not NoneType]
                    same(next(one for one in theirs if isinstance(one, type)), ours)

    same(manifest_file._Manifest, Manifest)


WRONG = [
    ("run_id", "", "run_id"),
    ("run_id", "../etc/passwd", "run_id"),
    ("run_id", "x" * 129, "run_id"),
    ("base_fingerprint", "unknown until the base is loaded", "base_fingerprint"),
    ("lora.lora_rank", 0, "greater than or equal to 1"),
    ("lora.lora_rank", True, "valid integer"),
    ("lora.lora_alpha", float("nan"), "finite"),
    ("lora.target_modules", [], "lora.target_modules"),
    ("lora.layers", [-1], "lora.layers"),
    ("lora.trained", "A", "'B' or 'AB'"),
    ("template", [], "template"),
    ("template", [["b", [1]], ["a", [1]]], "not sorted by name"),
    ("template", [["a", [1]], ["a", [1]]], "has a name twice"),
    ("template", [["a", [10**6, 10**6, 10**6, 10**6]]], "more than 67108864 coordinates"),
    ("template", [["a", [0]]], "template"),
    ("template", [["a\n", [1]]], "template"),
    ("local.num_steps", 0, "local.num_steps"),
    ("local.num_steps", 1.0, "valid integer"),
    ("local.num_steps", "1", "valid integer"),
    ("local.sampling_rate", 1.5, "less than or equal to 1"),
    ("local.sampling_rate", 0.0, "greater than 0"),
    ("local.expected_batch_size", float("inf"), "finite"),
    ("local.learning_rate", -1.0, "greater than 0"),
    ("local.optimizer", "lion", "'sgd' or 'adam'"),
    ("local.detach_prefix", 1, "valid boolean"),
    ("release.example", 3, "release.example"),
    ("release.example.unit", "device", "plan of another unit"),
    ("release.device.clip_norm", 1e7, "release.device.clip_norm"),
    ("release.device.noise", "none", "release.device.noise"),
    ("release.device.noise_variance", 0, "noise_variance"),
    ("release.device.noise_variance", 2**44 + 1, "noise_variance"),
    ("release.device.target_delta", 1.0, "less than 1"),
    ("release.device.z_eff", 0.0, "z_eff"),
    ("release.modulus_bits", 16, "24 or 32"),
    ("release.num_metrics", -1, "num_metrics"),
    ("release.min_survivors", 0, "min_survivors"),
    ("release.n_honest", 10**7, "n_honest"),
    ("num_rounds", 2**200, "num_rounds"),
    ("target_epsilon", [["person", 1.0]], "target_epsilon"),
    ("target_epsilon", [["device", 1.0], ["device", 2.0]], "two budgets for one unit"),
    ("target_epsilon", [["device", -1.0]], "target_epsilon"),
]


def changed(manifest: Manifest, path: str, value: Any) -> dict[str, Any]:
    values = json.loads(manifest_file.canonical(manifest))
    *folders, name = path.split(".")
    table = values
    for folder in folders:
        table = table[folder]
    assert name in table
    table[name] = value
    return values


@pytest.mark.parametrize(("path", "value", "says"), WRONG)
def test_a_value_out_of_range_is_refused_and_its_field_is_named(folder: Path, path: str, value: Any, says: str) -> None:
    with pytest.raises(UpdateError) as caught:
        manifest_file.parse(dumped(changed(a_manifest(folder), path, value)))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_twin_without_the_ranges_a_sampling_rate_of_1000_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_file._Manifest, "model_validate_json", lambda content: None)
    content = dumped(changed(a_manifest(folder), "local.sampling_rate", 1000.0))
    assert manifest_file.parse(content).local.sampling_rate == 1000.0


def test_a_key_that_is_missing_or_unknown_is_refused_and_what_it_says_is_not_shown(folder: Path) -> None:
    values = asdict(a_manifest(folder))
    del values["release"]["n_honest"]
    with pytest.raises(UpdateError, match=r"release\.n_honest: field required"):
        manifest_file.parse(dumped(values))
    values = asdict(a_manifest(folder))
    values["release"]["a\nsecret"] = 1
    with pytest.raises(UpdateError, match="release has a key that is unknown here") as caught:
        manifest_file.parse(dumped(values))
    assert "secret" not in str(caught.value)


def test_another_spelling_of_a_manifest_is_refused(folder: Path) -> None:
    manifest = a_manifest(folder)
    content = manifest_file.canonical(manifest)
    values = json.loads(content)
    spellings = [
        content + b"\n",
        b" " + content,
        json.dumps(values, sort_keys=True).encode(),
        json.dumps(dict(reversed(values.items())), separators=(",", ":")).encode(),
        content.replace(b'"num_rounds":3', b'"num_rounds":4,"num_rounds":3'),
        content.replace(b'"clip_norm":1.0', b'"clip_norm":1.00'),
        content.replace(b'"clip_norm":1.0', b'"clip_norm":1'),
        content.replace(b'"clip_norm":1.0', b'"clip_norm":1e0'),
        content.replace(b'"sgd"', b'"\\u0073gd"'),
    ]
    for spelling in spellings:
        assert spelling != content
        with pytest.raises(UpdateError, match="its one form"):
            manifest_file.parse(spelling)


def test_twin_without_the_one_form_two_files_are_one_manifest_with_one_hash(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever compared files would then see two, whoever compared manifests one."""
    manifest = a_manifest(folder)
    other = manifest_file.canonical(manifest).replace(b'"clip_norm":1.0', b'"clip_norm":1.00')
    monkeypatch.setattr(manifest_file, "canonical", lambda manifest: other)
    assert manifest_file.parse(other).hash == manifest.hash != hashlib.sha256(other).hexdigest()


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"[" * 100_000, b"{" + b'"a":{' * 50_000, b"\xff\xfe", b'{"run_id":', b"9" * 10_000],
)
def test_what_is_no_manifest_is_refused_in_our_own_words(content: bytes) -> None:
    with pytest.raises(UpdateError, match="no manifest that fedmini wrote"):
        manifest_file.parse(content)


def test_a_manifest_of_more_than_a_mebibyte_is_not_even_looked_at() -> None:
    with pytest.raises(UpdateError, match="at most 1048576 bytes, got 1048577"):
        manifest_file.parse(b" " * (2**20 + 1))


@given(content=st.binary(max_size=300))
def test_whatever_bytes_come_are_refused_in_our_own_words(content: bytes) -> None:
    with pytest.raises(UpdateError):
        manifest_file.parse(content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(manifest=manifests, data=st.data())
def test_whatever_a_field_holds_is_refused_in_our_own_words_or_comes_back_as_it_was(
    manifest: Manifest, data: st.DataObject
) -> None:
    values = json.loads(manifest_file.canonical(manifest))
    table = data.draw(st.sampled_from([values, values["lora"], values["local"], values["release"]]))
    table[data.draw(st.sampled_from(sorted(table)))] = data.draw(JSON_VALUES)
    content = dumped(values)
    with contextlib.suppress(UpdateError):
        assert manifest_file.canonical(manifest_file.parse(content)) == content


def test_a_manifest_that_was_changed_has_another_hash(folder: Path) -> None:
    manifest = a_manifest(folder)
    assert replace(manifest, num_rounds=4).hash != manifest.hash
