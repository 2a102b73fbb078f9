"""The frozen values that cross a boundary: between server and device, or between a run and its saved state.

There is deliberately no type here for one device's update on the server's side: `CohortSum` is all that a server
ever holds of a round.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedmini.types.plans import NoiseSource, Unit

DeviceId: TypeAlias = str
Vector: TypeAlias = NDArray[np.float32]  # (num_coordinates,)
IntVector: TypeAlias = NDArray[np.int64]  # (num_coordinates,)
Residues: TypeAlias = NDArray[np.uint32]  # (num_coordinates,), integers mod 2**modulus_bits
Adapter: TypeAlias = Mapping[str, NDArray[np.float32]]  # trainable LoRA tensors by PEFT name


@dataclass(frozen=True, slots=True, repr=False)
class EncodedExample:
    """One example as the model sees it. Position i is trained on where `is_target[i]`: it is predicted from i - 1.

    Its repr never shows tokens: they are text.
    """

    tokens: NDArray[np.int32]  # (length,)
    is_target: NDArray[np.bool_]  # (length,), never true at 0, true somewhere

    def __repr__(self) -> str:
        return f"EncodedExample({len(self.tokens)} tokens, {int(self.is_target.sum())} targets)"


@dataclass(frozen=True, slots=True)
class TrainTask:
    """One round's work for a device. Nothing a device must agree to travels outside the manifest."""

    manifest_hash: str
    round_num: int
    attempt: int
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Contribution:
    """The only thing that leaves a device: clipped, rounded, noised. Shape (num_coordinates,), uint32."""

    vector: Residues


@dataclass(frozen=True, slots=True)
class Roster:
    """The devices that one attempt at a round is about, fixed once, sorted."""

    run_id: str
    round_num: int
    attempt: int
    devices: tuple[DeviceId, ...]

    @property
    def hash(self) -> str:
        """SHA-256 over run, round, attempt and the sorted devices, in hex."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class CohortSum:
    """All the server ever holds of a round: the survivors' vectors, summed mod 2**modulus_bits."""

    total: Residues
    num_devices: int


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A sum as it is released: decoded to integers, with the server's noise in it where that is the plan's."""

    roster: Roster
    num_devices: int
    integers: IntVector


SumCohort: TypeAlias = Callable[[Sequence[DeviceId], TrainTask, Callable[[Roster], None]], CohortSum]
"""The one seam between the algorithm and the devices. The last argument debits the ledger; it is called exactly
once, when the roster is fixed and before any contribution is asked for."""


@dataclass(frozen=True, slots=True)
class PrivacyEvent:
    """One release, as the accountant sees it: `num_steps` subsampled Gaussians at multiplier `z_eff`."""

    unit: Unit
    noise: NoiseSource
    z_eff: float
    sampling_rate: float  # 1.0 for a device
    num_steps: int
    clip_norm: float


@dataclass(frozen=True, slots=True)
class LedgerPosition:
    """Where a ledger stood: the number of lines written, and the hash of the last one."""

    seq: int
    hash: str


@dataclass(frozen=True, slots=True)
class Participation:
    """How often one device was on a committed roster, and when last."""

    count: int
    last_round: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """What is checkpointed, together: the weights and what they cost."""

    round_num: int  # rounds committed
    adapter: Adapter
    num_updates: int  # server optimizer steps taken, for bias correction
    momentum: Vector | None
    second_moment: Vector | None
    participations: Mapping[DeviceId, Participation]
    ledger: LedgerPosition


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What an operator may log of a round: decoded from the sum only, in a simulation too."""

    round_num: int
    num_sampled: int
    num_survivors: int
    upload_bytes_per_device: int
    download_bytes_per_device: int
    seconds: float
    noise_to_signal: float | None  # norm of the noise expected in the mean over the norm of the decoded mean
    epsilon: Mapping[Unit, float]  # spent so far, the worst device's
    train_loss: float | None = None  # nats a token, noised like the rest; None where no metrics travel
    train_loss_error: float | None = None  # one standard deviation of the noise in it
    clipped_fraction: float | None = None
    clipped_fraction_error: float | None = None
    eval_loss: float | None = None  # nats a token on people who took no part
    device_loss: float | None = None  # nats a token on what devices hold back: a release of its own, noised
    device_loss_error: float | None = None  # one standard deviation of the noise in it
