"""Contributor: turns a TrainTask into a Contribution, the only thing that ever leaves it."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmini import local, local_evaluation, metrics, vectors
from fedmini.errors import ModelMismatchError, UpdateError
from fedmini.local import LocalRun, Steps
from fedmini.model.lora import LoraModel
from fedmini.privacy import clipping, encoding, noise
from fedmini.privacy.noise import Streams
from fedmini.types import (
    Contribution,
    DeviceId,
    EncodedExample,
    EvaluationManifest,
    IntVector,
    Manifest,
    Residues,
    TrainTask,
)

FEWEST_TOKENS = 1024  # of devices together: with fewer at once, much of the time goes into dequantising the base


class Contributor:
    """One device: its examples, the model it trains, and the manifest it agreed to, or that of the run's evaluations.

    `streams` gives all of its randomness: which examples a step draws, how a vector is rounded, and the noise.
    Raises ModelMismatchError, before any training, where its base or LoRA tensors are not the manifest's.
    """

    def __init__(
        self,
        device_id: DeviceId,
        examples: Sequence[EncodedExample],
        model: LoraModel,
        manifest: Manifest,
        streams: Streams,
        physical_batch_size: int = 16,
    ) -> None:
        if model.fingerprint != manifest.base_fingerprint:
            raise ModelMismatchError(
                f"this device's base is {model.fingerprint[:12]}, the run's is {manifest.base_fingerprint[:12]}: "
                "install the run's base model, or leave the run"
            )
        if model.template != manifest.template:
            raise ModelMismatchError("this device's LoRA tensors are not the run's: update the device")
        self.device_id = device_id
        self._examples = local_evaluation.own_part(examples, manifest)
        self._model, self._manifest, self._streams = model, manifest, streams
        self._manifest_hash, self._num_coordinates = manifest.hash, manifest.num_coordinates  # worked out once
        self._physical_batch_size = physical_batch_size

    def __repr__(self) -> str:
        return f"Contributor({self.device_id!r}, {len(self._examples)} examples)"

    def contribute(self, task: TrainTask) -> Contribution:
        """Train (or measure) as the manifest says, and give what comes of it: clipped, rounded, noised where that is ours.

        Shape (num_coordinates,), uint32. An update that is not finite becomes zeros; the noise is still added.
        Raises UpdateError where the task is another manifest's or its adapter can't be used.
        """
        self._begin(task)
        return local.run_alone(self._model, self._steps(task, self._model.parameters()))

    def _begin(self, task: TrainTask) -> None:
        """Give the model the task's adapter."""
        if task.manifest_hash != self._manifest_hash:
            raise UpdateError(
                f"the task is about manifest {task.manifest_hash[:12]}, this device agreed to {self._manifest_hash[:12]}"
            )
        vectors.check(task.adapter, self._manifest.template)
        self._model.set_adapter(task.adapter)

    def _steps(self, task: TrainTask, parameters: local.Parameters) -> Steps[Contribution]:
        """All that this device does for a task, at these tensors: they hold the task's adapter, and are moved."""
        integers = yield from self._integers(task, parameters)
        integers += self._noise_share(task)
        return Contribution(encoding.wrap(integers, self._manifest.release.modulus_bits))

    def _integers(self, task: TrainTask, parameters: local.Parameters) -> Steps[IntVector]:
        """The clipped, rounded vector of this round, without the share of the noise that is added to the whole."""
        manifest, release = self._manifest, self._manifest.release
        if isinstance(manifest, EvaluationManifest):
            streams = self._streams_of(task)
            size = self._physical_batch_size
            return (yield from local_evaluation.sum_losses(self._examples, manifest, size, streams))
        run = LocalRun(self._examples, self._manifest.local, self._physical_batch_size, self._streams_of(task))
        if release.sums_examples:
            assert release.example is not None
            return (yield from local.sum_gradients(parameters, run, release.example, release.num_metrics))
        training = yield from local.train_adapter(parameters, run, release.example)
        vector = self._joint_vector(training)
        bound = encoding.sensitivity(release.encoding_norm, release.scale, len(vector))
        return encoding.round_stochastically(vector, release.scale, bound, run.streams("rounding", "update"))

    def _joint_vector(self, training: local.Training) -> NDArray[np.float64]:
        """The update, clipped to what its metric coordinates leave of the norm, and those behind it. (num_coordinates,)"""
        release, num_trained = self._manifest.release, len(training.delta)
        room = release.encoding_norm if release.num_metrics == 0 else metrics.room_for_vector(release.encoding_norm)
        factor = clipping.factor(vectors.norm(training.delta), room)
        joint = np.zeros(self._num_coordinates)
        if factor > 0:
            np.multiply(training.delta, np.float64(factor), out=joint[:num_trained])
        if release.num_metrics:
            joint[num_trained:] = metrics.coordinates(
                training.loss, training.mean_targets, factor < 1, release.encoding_norm, self._manifest.local.max_length
            )
        return joint

    def _noise_share(self, task: TrainTask) -> IntVector:
        """This device's share of the noise in the sum; zeros where the noise is local to each step, or the server's."""
        for unit in self._manifest.release.units:
            if unit.noise == "shared":
                stream = self._streams_of(task)("share")
                return noise.discrete_gaussian(unit.noise_variance, self._num_coordinates, stream)
        return np.zeros(self._num_coordinates, np.int64)

    def _streams_of(self, task: TrainTask) -> Streams:
        kind = "evaluation" if isinstance(self._manifest, EvaluationManifest) else "round"
        return lambda *purpose: self._streams(
            "device", self.device_id, kind, task.round_num, "attempt", task.attempt, *purpose
        )


def contribute_together(devices: Sequence[Contributor], task: TrainTask) -> Iterator[Contribution]:
    """What each of several devices contributes, in any order, computed in one forward and backward over one model.

    The devices (at least one) are one run's, share a model, and know nothing of each other. Each contribution is what
    `contribute` gives, but that gradients may differ by float rounding: about 1e-6 of their norm in float32. As many tokens are
    in memory at once as one device's largest physical batch has, or FEWEST_TOKENS. Raises as `contribute` does.
    """
    first = devices[0]
    if len(devices) == 1:
        yield first.contribute(task)
        return
    model, manifest = first._model, first._manifest
    first._begin(task)
    # Where nothing moves, all compute at one adapter.
    moves = not (manifest.release.sums_examples or isinstance(manifest, EvaluationManifest))
    steps = [device._steps(task, model.copies() if moves else model.parameters()) for device in devices]
    tokens_at_once = max(FEWEST_TOKENS, first._physical_batch_size * manifest.local.max_length)
    yield from local.run_together(model, steps, tokens_at_once)


def sum_together(
    devices: Sequence[Contributor], task: TrainTask, on_answer: Callable[[], None] = lambda: None
) -> Residues:
    """The sum of what `contribute_together` gives, one contribution in memory at a time; `on_answer` hears of each."""
    manifest = devices[0]._manifest
    total: Residues = np.zeros(manifest.num_coordinates, np.uint32)
    for contribution in contribute_together(devices, task):
        total = encoding.add(total, contribution.vector, manifest.release.modulus_bits)
        on_answer()
    return total
