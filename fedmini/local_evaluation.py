"""What a device measures on the examples that it holds back from training: their losses, bounded, summed as integers."""

import hashlib
from collections.abc import Generator, Sequence

import numpy as np

from fedmini import metrics
from fedmini.model.together import Gradients, LossRequest
from fedmini.privacy import clipping, encoding
from fedmini.privacy.noise import Streams
from fedmini.types import EncodedExample, EvaluationManifest, IntVector, Manifest


def is_held_back(example: EncodedExample, manifest: Manifest) -> bool:
    """Whether an example is measured on, and never trained on, in a run or its evaluations.

    Decided by a hash of this example alone, whatever else the device holds: one example more or less changes either what
    is trained on or what is measured on, by one. It is the same hash in all runs: none trains on what another measures on
    with as large a fraction, where both cut the text into the same tokens.
    """
    if manifest.evaluation is None:
        return False
    digest = hashlib.sha256(b"fedmini: held back\0")
    digest.update(np.ascontiguousarray(example.tokens, np.int32).tobytes())
    digest.update(example.is_target.tobytes())
    return int.from_bytes(digest.digest()[:8], "big") < manifest.evaluation.fraction * 2**64


def own_part(examples: Sequence[EncodedExample], manifest: Manifest) -> tuple[EncodedExample, ...]:
    """The examples that a run trains on, or those that its evaluations measure on: each is in one of the two."""
    is_evaluation = isinstance(manifest, EvaluationManifest)
    return tuple(example for example in examples if is_held_back(example, manifest) is is_evaluation)


def sum_losses(
    examples: Sequence[EncodedExample], manifest: EvaluationManifest, physical_batch_size: int, streams: Streams
) -> Generator[LossRequest, Gradients, IntVector]:
    """What the examples say of the adapter that the model holds, each rounded by itself; no noise yet. Shape (2,), int64.

    Where an example is the unit, their coordinates are summed; else one vector stands for the device: that of its mean
    loss. No examples give zeros.
    """
    release = manifest.release
    losses = metrics.capped((yield LossRequest(examples, physical_batch_size)).losses)
    if release.example is None and len(losses):
        losses = np.array([np.mean(losses)])
    rows, _ = clipping.clip_rows(metrics.evaluation_coordinates(losses, release.encoding_norm), release.encoding_norm)
    bound = encoding.sensitivity(release.encoding_norm, release.scale, manifest.num_coordinates)
    return encoding.round_sum(rows, release.scale, bound, streams("rounding", "losses"))
