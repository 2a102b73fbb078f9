"""What the secrets of a session are, and what each share, commitment and mask made from them is bound to.

`session` is a KeyList's digest throughout: it stands for everybody's keys, the threshold, and by the Context's digest for
run, round, attempt, manifest, model and cohort. Devices that were told different ones derive masks that don't cancel,
can't open each other's shares, and don't sign the same outcome.
"""

from typing import NoReturn

from fedmini.errors import ProtocolError
from fedmini.secagg import keys, shamir
from fedmini.secagg.keys import SecretKey
from fedmini.secagg.shamir import Random
from fedmini.types import DeviceId

SEALED_BYTES = 2 * shamir.SHARE_BYTES + keys.TAG_BYTES  # a holder's two shares
COMMITMENT_BYTES = 32
COMMITMENTS_BYTES = 2 * COMMITMENT_BYTES  # to a holder's two shares


class Secrets:
    """What one device draws for one session. Never in a repr, never serialised, erased when its vector has left."""

    __slots__ = ("mask_key", "seed", "share_key")

    def __init__(self, random: Random) -> None:
        self.seed = shamir.random_secret(random)  # of the device's own mask
        self.mask_key = SecretKey.draw(random)  # of the masks it has in common with each peer
        self.share_key = SecretKey.draw(random)  # of the shares it seals and opens

    def __repr__(self) -> str:
        return "Secrets(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the secrets of a session are never serialised")

    def erase(self) -> None:
        """Overwrite all three."""
        seed, self.seed = self.seed, bytearray()
        keys.erase(seed)
        self.mask_key.erase()
        self.share_key.erase()


def seed_mask_key(seed: bytes | bytearray, session: bytes) -> bytes:
    """The AES key of a device's own mask. Raises ProtocolError for a seed that was erased."""
    if len(seed) != shamir.SHARE_BYTES:
        raise ProtocolError("the seed was erased: a session's secrets serve once")
    return keys.derive(bytes(seed), "self-mask", session)


def pair_mask_key(secret: bytes, session: bytes, one: DeviceId, other: DeviceId) -> bytes:
    """The AES key of the mask that two devices have in common, whichever comes first.

    Bound to their names: a third device that put one's public key forward as its own, in another form, would else have
    the same mask, and the two would take each other away.
    """
    first, second = sorted((one, other))
    return keys.derive(secret, "mask", session, first.encode(), second.encode())


def sealing_key(secret: bytes, session: bytes, dealer: DeviceId, holder: DeviceId) -> bytes:
    """The key under which `dealer` seals for `holder`: another one in each direction."""
    return keys.derive(secret, "share", session, dealer.encode(), holder.encode())


def sealed_about(session: bytes, dealer: DeviceId, holder: DeviceId) -> bytes:
    """What a sealed share says of itself beside its content."""
    return keys.commit("sealed", session, dealer.encode(), holder.encode())


def commit_seed(session: bytes, dealer: DeviceId, seed: bytes | bytearray) -> bytes:
    """What a dealer says of its seed beforehand, 32 bytes."""
    return keys.commit("seed", session, dealer.encode(), bytes(seed))


def commit_share(session: bytes, dealer: DeviceId, holder: DeviceId, kind: str, share: bytes) -> bytes:
    """What a dealer says of one share beforehand, 32 bytes; `kind` is "seed" or "key"."""
    return keys.commit(f"share/{kind}", session, dealer.encode(), holder.encode(), share)


def commit_shares(session: bytes, dealer: DeviceId, holder: DeviceId, shares: tuple[bytes, bytes]) -> bytes:
    """The commitments to a holder's share of the seed and of the mask key, 64 bytes."""
    seed_share, key_share = shares
    return commit_share(session, dealer, holder, "seed", seed_share) + commit_share(
        session, dealer, holder, "key", key_share
    )
