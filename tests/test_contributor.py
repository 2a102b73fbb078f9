"""A device turns a task into one contribution: clipped, rounded, noised, and nothing else leaves it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fedmini import planning
from fedmini.contributor import Contributor
from fedmini.errors import ModelMismatchError, UpdateError
from fedmini.model.lora import LoraModel
from fedmini.privacy import encoding, noise
from fedmini.privacy.noise import RandomStream
from fedmini.types import Contribution, Manifest, TrainTask
from tests import tiny_llama, tiny_run

EXAMPLES = tiny_llama.examples((5, 9, 7, 12, 6, 8))
STREAMS = partial(RandomStream.seeded, 3)


@pytest.fixture
def model() -> LoraModel:
    return LoraModel(tiny_llama.base(), tiny_llama.SHAPE)


def a_manifest(model: LoraModel, tmp_path, privacy: str, **changes) -> Manifest:
    config = tiny_run.config(tmp_path, privacy, changes)
    return planning.make_manifest(config, "run", planning.Base(model.fingerprint, model.template), None)


def a_task(model: LoraModel, manifest: Manifest, fill: float = 0.01) -> TrainTask:
    adapter = {name: np.full(shape, fill, np.float32) for name, shape in manifest.template}
    return TrainTask(manifest.hash, 1, 0, adapter)


def contribute(model: LoraModel, manifest: Manifest, task: TrainTask, examples=EXAMPLES) -> np.ndarray:
    """The integers of a contribution, centred, before the server sees any other."""
    contribution = Contributor("d", examples, model, manifest, STREAMS).contribute(task)
    assert isinstance(contribution, Contribution)
    assert contribution.vector.dtype == np.uint32
    assert contribution.vector.shape == (manifest.num_coordinates,)
    return encoding.unwrap(contribution.vector, manifest.release.modulus_bits)


def share_of(manifest: Manifest) -> np.ndarray:
    """The noise share that the seeded device adds: tests may know it, nobody else does."""
    (unit,) = (unit for unit in manifest.release.units if unit.noise == "shared")
    stream = STREAMS("device", "d", "round", 1, "attempt", 0, "share")
    return noise.discrete_gaussian(unit.noise_variance, manifest.num_coordinates, stream)


@pytest.mark.parametrize("privacy", sorted(tiny_run.PRIVACY))
def test_every_mode_gives_one_vector_of_residues_below_the_modulus(model, tmp_path, privacy) -> None:
    manifest = a_manifest(model, tmp_path, privacy)
    contribution = Contributor("d", EXAMPLES, model, manifest, STREAMS).contribute(a_task(model, manifest))
    assert contribution.vector.max() < 2**manifest.release.modulus_bits


def test_under_shared_example_noise_what_leaves_is_the_gradient_sum_and_a_share_of_noise(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "example-shared", local={"sampling_rate": 1.0})
    task = a_task(model, manifest)
    found = (contribute(model, manifest, task) - share_of(manifest)) / manifest.release.scale
    model.set_adapter(task.adapter)
    rows = model.example_gradients(EXAMPLES).gradients.double().numpy()
    room = manifest.release.encoding_norm * (1 - 0.1**2) ** 0.5
    expected = (rows * np.minimum(1, room / np.linalg.norm(rows, axis=1))[:, None]).sum(axis=0)
    assert np.abs(found[:-4] - expected).max() <= len(EXAMPLES) / manifest.release.scale
    assert found[-4] == pytest.approx(len(EXAMPLES) * 0.1 / 2, abs=0.01)  # the count, scaled as metrics are


def test_a_device_update_and_its_metrics_together_stay_within_the_bound(model, tmp_path) -> None:
    manifest = a_manifest(
        model, tmp_path, "device-shared", local={"sampling_rate": 1.0, "learning_rate": 1e4, "num_steps": 2}
    )
    integers = contribute(model, manifest, a_task(model, manifest)) - share_of(manifest)
    bound = encoding.sensitivity(manifest.release.encoding_norm, manifest.release.scale, manifest.num_coordinates)
    assert 0.98 * 2**13 < np.linalg.norm(integers.astype(float)) <= bound


def test_an_update_that_is_not_finite_leaves_as_zeros_and_noise(model, tmp_path) -> None:
    """An adapter of huge numbers overflows the forward pass; the device still answers, and reveals nothing more."""
    manifest = a_manifest(model, tmp_path, "device-shared", local={"sampling_rate": 1.0})
    integers = contribute(model, manifest, a_task(model, manifest, fill=1e30)) - share_of(manifest)
    assert not integers[:-4].any()


def test_gradients_that_are_not_finite_leave_as_zeros_and_noise(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "example-shared", local={"sampling_rate": 1.0})
    integers = contribute(model, manifest, a_task(model, manifest, fill=1e30)) - share_of(manifest)
    assert not integers[:-4].any()


@pytest.mark.parametrize("privacy", ["example-shared", "device-shared"])
def test_a_device_that_drew_no_example_still_sends_its_noise(model, tmp_path, privacy) -> None:
    manifest = a_manifest(model, tmp_path, privacy, local={"sampling_rate": 1e-9, "expected_batch_size": 1.0})
    integers = contribute(model, manifest, a_task(model, manifest))
    assert np.array_equal(integers[:-4], share_of(manifest)[:-4])


def test_where_the_noise_is_local_no_metrics_leave(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "example-local")
    assert manifest.num_coordinates == model.num_parameters


def test_where_the_noise_is_the_servers_the_device_adds_none(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "device-server", local={"sampling_rate": 1e-9, "expected_batch_size": 1.0})
    assert not contribute(model, manifest, a_task(model, manifest))[:-4].any()


def test_a_device_with_another_base_refuses_before_any_training(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "example-shared")
    other = LoraModel(replace(tiny_llama.base(seed=1), weights_digest="1" * 64), tiny_llama.SHAPE)
    with pytest.raises(ModelMismatchError, match="install the run's base model"):
        Contributor("d", EXAMPLES, other, manifest, STREAMS)


def test_a_device_whose_frozen_a_differs_refuses(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "example-shared")
    other = LoraModel(tiny_llama.base(), replace(tiny_llama.SHAPE, seed=1))
    with pytest.raises(ModelMismatchError):
        Contributor("d", EXAMPLES, other, manifest, STREAMS)


def test_a_task_of_another_manifest_is_refused(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "example-shared")
    task = replace(a_task(model, manifest), manifest_hash="f" * 64)
    with pytest.raises(UpdateError, match="this device agreed to"):
        Contributor("d", EXAMPLES, model, manifest, STREAMS).contribute(task)


def test_an_adapter_that_is_not_the_runs_is_refused_by_name(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "example-shared")
    name = manifest.template[0][0]
    task = replace(a_task(model, manifest), adapter={name: np.zeros((1, 1), np.float32)})
    with pytest.raises(UpdateError, match="lora_B"):
        Contributor("d", EXAMPLES, model, manifest, STREAMS).contribute(task)


def test_a_device_shows_nothing_of_its_examples(model, tmp_path) -> None:
    manifest = a_manifest(model, tmp_path, "none")
    assert repr(Contributor("d", EXAMPLES, model, manifest, STREAMS)) == "Contributor('d', 6 examples)"
