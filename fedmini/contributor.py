"""Contributor: turns a TrainTask into a Contribution, the only thing that ever leaves it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmini import local, local_evaluation, metrics, vectors
from fedmini.errors import ModelMismatchError, UpdateError
from fedmini.local import LocalRun
from fedmini.model.lora import LoraModel
from fedmini.privacy import clipping, encoding, noise
from fedmini.privacy.noise import Streams
from fedmini.types import Contribution, DeviceId, EncodedExample, EvaluationManifest, IntVector, Manifest, TrainTask


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
        self._physical_batch_size = physical_batch_size

    def __repr__(self) -> str:
        return f"Contributor({self.device_id!r}, {len(self._examples)} examples)"

    def contribute(self, task: TrainTask) -> Contribution:
        """Train (or measure) as the manifest says, and give what comes of it: clipped, rounded, noised where that is ours.

        Shape (num_coordinates,), uint32. An update that is not finite becomes zeros; the noise is still added.
        Raises UpdateError where the task is another manifest's or its adapter can't be used.
        """
        manifest = self._manifest
        if task.manifest_hash != manifest.hash:
            raise UpdateError(
                f"the task is about manifest {task.manifest_hash[:12]}, this device agreed to {manifest.hash[:12]}"
            )
        vectors.check(task.adapter, manifest.template)
        self._model.set_adapter(task.adapter)
        integers = self._integers(task) + self._noise_share(task)
        return Contribution(encoding.wrap(integers, manifest.release.modulus_bits))

    def _integers(self, task: TrainTask) -> IntVector:
        """The clipped, rounded vector of this round, without the share of the noise that is added to the whole."""
        manifest, release = self._manifest, self._manifest.release
        if isinstance(manifest, EvaluationManifest):
            streams = self._streams_of(task)
            return local_evaluation.sum_losses(
                self._model, self._examples, manifest, self._physical_batch_size, streams
            )
        run = LocalRun(self._examples, self._manifest.local, self._physical_batch_size, self._streams_of(task))
        if release.sums_examples:
            assert release.example is not None
            return local.sum_gradients(self._model, run, release.example, release.num_metrics)
        training = local.train_adapter(self._model, run, release.example)
        vector = self._joint_vector(training)
        bound = encoding.sensitivity(release.encoding_norm, release.scale, len(vector))
        return encoding.round_stochastically(vector, release.scale, bound, run.streams("rounding", "update"))

    def _joint_vector(self, training: local.Training) -> NDArray[np.float64]:
        """The update and its metric coordinates, clipped together."""
        release = self._manifest.release
        if release.num_metrics == 0:
            return clipping.clip(training.delta, release.encoding_norm)
        room = metrics.room_for_vector(release.encoding_norm)
        was_clipped = not vectors.norm(training.delta) <= room  # also where it is not finite
        behind = metrics.coordinates(
            training.loss, training.mean_targets, was_clipped, release.encoding_norm, self._manifest.local.max_length
        )
        joint = np.concatenate([clipping.clip(training.delta, room), behind])
        return clipping.clip(joint, release.encoding_norm)

    def _noise_share(self, task: TrainTask) -> IntVector:
        """This device's share of the noise in the sum; zeros where the noise is local to each step, or the server's."""
        manifest = self._manifest
        for unit in manifest.release.units:
            if unit.noise == "shared":
                stream = self._streams_of(task)("share")
                return noise.discrete_gaussian(unit.noise_variance, manifest.num_coordinates, stream)
        return np.zeros(manifest.num_coordinates, np.int64)

    def _streams_of(self, task: TrainTask) -> Streams:
        kind = "evaluation" if isinstance(self._manifest, EvaluationManifest) else "round"
        return lambda *purpose: self._streams(
            "device", self.device_id, kind, task.round_num, "attempt", task.attempt, *purpose
        )
