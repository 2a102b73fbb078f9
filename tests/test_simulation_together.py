"""Simulated devices trained together: what each contributes is its own, whoever it is computed beside."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini import local, planning
from fedmini.contributor import Contributor, contribute_together
from fedmini.model import together
from fedmini.model.lora import LoraModel
from fedmini.model.together import GradientRequest, LossRequest
from fedmini.privacy import clipping, encoding
from fedmini.privacy.noise import RandomStream
from fedmini.types import EncodedExample, LoraShape, Manifest, TrainTask
from tests import tiny_llama, tiny_run

STREAMS = partial(RandomStream.seeded, 3)
LENGTHS = ((5, 9, 7), (12, 6), (), (8, 8, 8, 21), (9,))
EXAMPLES = tuple(tiny_llama.examples(lengths, seed) for seed, lengths in enumerate(LENGTHS))
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def a_model(trained: str = "B", targets: tuple[str, ...] = ("v_proj", "o_proj"), **options: Any) -> LoraModel:
    shape = LoraShape(2, 4.0, targets, None, trained, 0)  # type: ignore[arg-type]
    return tiny_llama.with_random_adapter(LoraModel(tiny_llama.base(), shape, **options))


def adapters_of(model: LoraModel, num_devices: int) -> list[list[torch.nn.Parameter]]:
    """As many different adapters; the model holds the last."""
    found = []
    for seed in range(num_devices):
        tiny_llama.with_random_adapter(model, seed)
        found.append(model.copies())
    return found


def alone(model: LoraModel, parameters: Sequence[torch.Tensor], request: GradientRequest) -> together.Gradients:
    """The answer of a model that holds this device's adapter and sees no other."""
    with torch.no_grad():
        for own, value in zip(model.parameters(), parameters, strict=True):
            own.copy_(value)
    return together.answer_alone(model, request)


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert (found - expected).double().norm() <= relative * max(1e-9, float(expected.double().norm()))


@pytest.mark.parametrize("of_mean", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 20, 1000])
@pytest.mark.parametrize(
    ("trained", "targets"), [("B", ("v_proj",)), ("AB", EVERYTHING), ("B", EVERYTHING), ("AB", ("q_proj",))]
)
def test_every_device_is_answered_at_its_own_adapter(trained, targets, tokens_at_once, of_mean) -> None:
    model = a_model(trained, targets)
    adapters = adapters_of(model, len(EXAMPLES))
    requests = [GradientRequest(own, adapter, of_mean) for own, adapter in zip(EXAMPLES, adapters, strict=True)]
    answers = together.answer_together(model, requests, tokens_at_once)
    for request, answer in zip(requests, answers, strict=True):
        expected = alone(model, request.parameters, request)
        assert_close(answer.rows, expected.rows)
        assert answer.losses == pytest.approx(expected.losses, rel=1e-5)
        assert answer.num_targets.tolist() == expected.num_targets.tolist()


@pytest.mark.parametrize("tokens_at_once", [1, 20, 1000])
@pytest.mark.parametrize("prefix", [(), (3, 4, 5, 6)])
def test_devices_that_only_measure_are_told_their_own_losses(tokens_at_once: int, prefix: tuple[int, ...]) -> None:
    model = a_model("AB", EVERYTHING, detached_prefix=prefix)
    examples = [
        [_with_prefix(example, prefix if index else ()) for index, example in enumerate(own)] for own in EXAMPLES
    ]
    requests = [LossRequest(own, 2) for own in examples]
    for request, answer in zip(requests, together.answer_together(model, requests, tokens_at_once), strict=True):
        expected = together.answer_alone(model, request)
        assert np.array_equal(expected.losses, model.mean_losses(request.examples, 2))
        assert answer.losses == pytest.approx(expected.losses, rel=1e-5)
        assert answer.num_targets.tolist() == expected.num_targets.tolist()
        assert len(answer.rows) == len(expected.rows) == 0


def test_devices_with_as_many_examples_each_are_multiplied_as_one_and_come_to_the_same() -> None:
    model = a_model("AB", EVERYTHING)
    adapters = adapters_of(model, 4)
    examples = [tiny_llama.examples((9, 9), seed) for seed in range(4)]
    for of_mean in (False, True):
        requests = [GradientRequest(own, adapter, of_mean) for own, adapter in zip(examples, adapters, strict=True)]
        for request, answer in zip(requests, together.answer_together(model, requests, 1000), strict=True):
            assert_close(answer.rows, alone(model, request.parameters, request).rows)


def test_another_devices_adapter_would_not_have_passed_for_ones_own() -> None:
    """The twin: rows handed to the wrong device are far outside the tolerance."""
    model = a_model("AB", EVERYTHING)
    first, second = adapters_of(model, 2)
    requests = [GradientRequest(EXAMPLES[0], adapter, False) for adapter in (first, second)]
    rows, others = (answer.rows for answer in together.answer_together(model, requests, 1000))
    with pytest.raises(AssertionError):
        assert_close(others, rows)


def test_no_device_sees_what_another_holds() -> None:
    """A device's rows stay what they are when all the others' examples and adapters are exchanged."""
    model = a_model("AB", EVERYTHING)
    adapters = adapters_of(model, 5)
    mine = GradientRequest(EXAMPLES[0], adapters[0], False)
    rows = []
    for order in ((1, 2), (3, 4)):
        others = [GradientRequest(EXAMPLES[index], adapters[index], False) for index in order]
        rows.append(together.answer_together(model, [mine, *others], 1000)[0].rows)
    assert_close(rows[0], rows[1])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(2, 24), max_size=4), min_size=1, max_size=5),
    st.integers(1, 120),
    st.integers(0, 1000),
    st.booleans(),
)
def test_whoever_is_beside_it_a_devices_answer_is_its_own(lengths, tokens_at_once, seed, of_mean) -> None:
    model = a_model("AB", ("v_proj", "down_proj"))
    adapters = adapters_of(model, len(lengths))
    examples = [tiny_llama.examples(tuple(own), seed + index) for index, own in enumerate(lengths)]
    requests = [GradientRequest(own, adapter, of_mean) for own, adapter in zip(examples, adapters, strict=True)]
    for request, answer in zip(requests, together.answer_together(model, requests, tokens_at_once), strict=True):
        assert_close(answer.rows, alone(model, request.parameters, request).rows, relative=5e-6)


def test_where_the_adapter_is_shared_the_models_own_is_used() -> None:
    model = a_model()
    requests = [GradientRequest(own, model.parameters(), False) for own in EXAMPLES]
    for request, answer in zip(requests, together.answer_together(model, requests, 60), strict=True):
        assert_close(answer.rows, model.example_gradients(request.examples).gradients)


@pytest.mark.parametrize("trained", ["B", "AB"])
def test_a_detached_prefix_is_read_with_each_devices_own_adapter(trained: str) -> None:
    prefix = (3, 4, 5, 6)
    examples = [
        [_with_prefix(example, prefix if index else ()) for index, example in enumerate(own)] for own in EXAMPLES
    ]
    model = a_model(trained, EVERYTHING, detached_prefix=prefix)
    adapters = adapters_of(model, len(examples))
    for of_mean in (False, True):
        requests = [GradientRequest(own, adapter, of_mean) for own, adapter in zip(examples, adapters, strict=True)]
        for request, answer in zip(requests, together.answer_together(model, requests, 40), strict=True):
            assert_close(answer.rows, alone(model, request.parameters, request).rows)


def _with_prefix(example: EncodedExample, prefix: tuple[int, ...]) -> EncodedExample:
    tokens = np.concatenate([np.array(prefix, np.int32), example.tokens])
    return EncodedExample(tokens, np.concatenate([np.zeros(len(prefix), np.bool_), example.is_target]))


def test_checkpointing_changes_nothing_of_what_devices_are_answered() -> None:
    plain, checkpointed = a_model("AB", EVERYTHING), a_model("AB", EVERYTHING, checkpointing=True)
    answers = []
    for model in (plain, checkpointed):
        adapters = adapters_of(model, len(EXAMPLES))
        requests = [GradientRequest(own, adapter, True) for own, adapter in zip(EXAMPLES, adapters, strict=True)]
        answers.append(together.answer_together(model, requests, 1000))
    for found, expected in zip(*answers, strict=True):
        assert_close(found.rows, expected.rows)


def a_manifest(model: LoraModel, folder: Path, privacy: str, **local_changes: Any) -> Manifest:
    config = tiny_run.config(folder, privacy, {"local": local_changes})
    return planning.make_manifest(config, "run", planning.Base(model.fingerprint, model.template), None)


def a_task(manifest: Manifest) -> TrainTask:
    return TrainTask(manifest.hash, 1, 0, {name: np.full(shape, 0.01, np.float32) for name, shape in manifest.template})


@pytest.mark.parametrize("privacy", sorted(tiny_run.PRIVACY))
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_in_every_mode_devices_together_contribute_what_they_do_one_by_one(tmp_path, privacy, optimizer) -> None:
    """Up to float rounding, which may turn a coin of the stochastic rounding: single units of 2**-13 of the clip norm."""
    if privacy == "example-shared" and optimizer == "adam":
        return  # there is no local optimizer
    model = a_model()
    steps = {} if privacy == "example-shared" else {"num_steps": 3}
    manifest = a_manifest(model, tmp_path, privacy, optimizer=optimizer, learning_rate=0.01, **steps)
    devices = [Contributor(str(index), own, model, manifest, STREAMS) for index, own in enumerate(EXAMPLES)]
    bits = manifest.release.modulus_bits
    one_by_one = sorted(tuple(encoding.unwrap(d.contribute(a_task(manifest)).vector, bits)) for d in devices)
    at_once = sorted(tuple(encoding.unwrap(c.vector, bits)) for c in contribute_together(devices, a_task(manifest)))
    found, expected = np.array(at_once), np.array(one_by_one)
    assert found.shape == expected.shape == (len(EXAMPLES), manifest.num_coordinates)
    tolerance = 2e-4 * manifest.release.encoding_norm * manifest.release.scale if optimizer == "adam" else 2
    assert np.abs(found - expected).max() <= tolerance
    assert np.ptp(expected, axis=0).max() > 100 * tolerance  # devices differ by far more


def test_a_group_of_one_contributes_the_very_bits_of_a_device_alone(tmp_path: Path) -> None:
    model = a_model()
    manifest = a_manifest(model, tmp_path, "device-shared", num_steps=2)
    device = Contributor("a", EXAMPLES[0], model, manifest, STREAMS)
    (found,) = contribute_together([device], a_task(manifest))
    assert np.array_equal(found.vector, device.contribute(a_task(manifest)).vector)


def test_training_together_leaves_the_models_adapter_as_the_task_has_it(tmp_path: Path) -> None:
    model = a_model()
    manifest = a_manifest(model, tmp_path, "none", num_steps=2)
    devices = [Contributor(str(index), own, model, manifest, STREAMS) for index, own in enumerate(EXAMPLES)]
    list(contribute_together(devices, a_task(manifest)))
    assert (model.flat() == np.float32(0.01)).all()


def test_devices_that_ask_more_often_than_others_are_answered_to_the_end(tmp_path: Path) -> None:
    """A physical batch of one: as many requests as examples, and no device is cut short."""
    model = a_model()
    manifest = a_manifest(model, tmp_path, "none", sampling_rate=1.0)
    found = {}
    for size in (1, 16):
        devices = [Contributor(str(index), own, model, manifest, STREAMS, size) for index, own in enumerate(EXAMPLES)]
        vectors = [encoding.unwrap(c.vector, 32) for c in contribute_together(devices, a_task(manifest))]
        found[size] = np.array(sorted(map(tuple, vectors)))
    assert np.abs(found[1] - found[16]).max() <= 16


def test_one_devices_integers_stay_within_the_bound_of_its_noise_beside_any_other(tmp_path: Path) -> None:
    """Clipping is of each example, before any sum, whoever it is computed beside."""
    model = a_model()
    manifest = a_manifest(model, tmp_path, "example-shared", sampling_rate=1.0)
    unit = manifest.release.example
    assert unit is not None
    runs = [local.LocalRun(own[:1], manifest.local, 16, STREAMS) for own in EXAMPLES if own]
    steps = [local.sum_gradients(model.parameters(), run, unit, manifest.release.num_metrics) for run in runs]
    sums = list(local.run_together(model, steps, 1000))
    bound = encoding.sensitivity(unit.clip_norm, unit.scale, manifest.num_coordinates)
    assert len(sums) == len(runs)
    assert all(0 < np.linalg.norm(found.astype(float)) <= bound for found in sums)


def test_without_clipping_the_bound_would_be_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the same check catches devices that don't clip."""
    model = a_model()
    manifest = a_manifest(model, tmp_path, "example-shared", sampling_rate=1.0)
    devices = [Contributor(str(index), own, model, manifest, STREAMS) for index, own in enumerate(EXAMPLES)]
    monkeypatch.setattr(clipping, "factor", lambda norm, clip_norm: 1e3)
    with pytest.raises(Exception, match="expected a clipped vector"):
        list(contribute_together(devices, a_task(manifest)))
