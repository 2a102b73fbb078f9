"""What the server and the devices of one session say to each other: two messages for each of five stages.

Every message names its session: by `Context.digest` up to the list of keys, and by `KeyList.digest` after it. Every answer
names its sender; lists are sorted by device and name nobody twice.
docs/secure-aggregation.md shows the order. No message has a field for one device's update in clear.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from fedmini.secagg import keys
from fedmini.secagg.trust import Certificate, Revocations
from fedmini.types import DeviceId

VERSION = 1
MAX_DEVICES = 150  # of a complete graph; more need neighbours that the server can't choose, which is later work


class Stage(IntEnum):
    """Where a session is: the stage whose answer is the next to come."""

    ADVERTISE = 0
    SHARE = 1
    CONTRIBUTE = 2
    AGREE = 3
    UNMASK = 4
    DONE = 5


@dataclass(frozen=True, slots=True)
class Context:
    """What a session is about. Every signature, sealed share and mask in it is bound to all of these."""

    run_id: str
    round_num: int
    attempt: int
    manifest_hash: bytes  # 32
    model_hash: bytes  # 32, of the model that every device of the cohort is given
    invited: tuple[DeviceId, ...]

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        numbers = f"{self.round_num}/{self.attempt}".encode()
        invited = keys.commit("invited", *(device.encode() for device in self.invited))
        return keys.commit("session", self.run_id.encode(), numbers, self.manifest_hash, self.model_hash, invited)


def hash_model(model: bytes) -> bytes:
    """What stands for a model in a context, 32 bytes."""
    return keys.commit("model", model)


@dataclass(frozen=True, slots=True)
class Invitation:
    """Stage 0, to each device: what the session is about."""

    context: Context


@dataclass(frozen=True, slots=True)
class Advert:
    """Stage 0, from each device: its two public keys of this session, signed with its enrolled key."""

    session: bytes
    sender: DeviceId
    mask_key: bytes  # X25519: masks come from pairs of these
    share_key: bytes  # X25519: shares are sealed with pairs of these
    certificate: Certificate
    signature: bytes  # purpose "advert", over session, sender, mask_key, share_key


@dataclass(frozen=True, slots=True)
class KeyList:
    """Stage 1, to each device: everybody's keys."""

    session: bytes
    threshold: int
    adverts: tuple[Advert, ...]
    revocations: Revocations | None

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the session and everybody's keys in it: the name of the session from here on.

        So nobody can be shown another list than the others: their shares, masks and signatures are bound to it.
        """
        fields = [
            field
            for advert in self.adverts
            for field in (advert.sender.encode(), advert.mask_key, advert.share_key, advert.certificate.device_key)
        ]
        return keys.commit("keys", self.session, str(self.threshold).encode(), *fields)


@dataclass(frozen=True, slots=True)
class SealedShares:
    """Stage 1, from each device: for each peer one share of the seed and one of the mask key, sealed for it."""

    session: bytes
    sender: DeviceId
    seed_commitment: bytes
    share_commitments: bytes  # 64 for each device on the list of keys, in its order: of its seed and its key share
    sealed: tuple[tuple[DeviceId, bytes], ...]  # for each peer


@dataclass(frozen=True, slots=True)
class Work:
    """Stage 2, to each device: the model, and what its peers sealed for it."""

    session: bytes
    shares: tuple[tuple[DeviceId, bytes, bytes], ...]  # from whom, sealed, the 64 bytes that it committed to
    model: bytes


@dataclass(frozen=True, slots=True)
class MaskedVector:
    """Stage 2, from each device: its contribution under all its masks, packed."""

    session: bytes
    sender: DeviceId
    packed: bytes

    def __repr__(self) -> str:
        return f"MaskedVector({self.sender!r}, {len(self.packed)} bytes)"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Stage 3, to each device: whose vectors are in the sum, and whose are not."""

    session: bytes
    survivors: tuple[DeviceId, ...]
    dropped: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Stage 3, from each survivor: that it was told this outcome and will be told no other."""

    session: bytes
    sender: DeviceId
    signature: bytes  # purpose "survivors", over session, survivors, dropped


@dataclass(frozen=True, slots=True)
class Unmasking:
    """Stage 4, to each survivor: the proof that enough others were told the same outcome."""

    session: bytes
    agreements: tuple[tuple[DeviceId, bytes], ...]


@dataclass(frozen=True, slots=True, repr=False)
class Revealed:
    """Stage 4, from each survivor: a share of every survivor's seed, and one of every dropped device's mask key."""

    session: bytes
    sender: DeviceId
    seed_shares: tuple[tuple[DeviceId, bytes], ...]
    key_shares: tuple[tuple[DeviceId, bytes], ...]

    def __repr__(self) -> str:
        return f"Revealed({self.sender!r}, {len(self.seed_shares)} seed shares, {len(self.key_shares)} key shares)"


Request: TypeAlias = Invitation | KeyList | Work | Outcome | Unmasking
Answer: TypeAlias = Advert | SealedShares | MaskedVector | Agreement | Revealed
Message: TypeAlias = Request | Answer
