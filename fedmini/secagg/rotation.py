"""How one operator key follows another: only where the one before signed it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.errors import ProtocolError, UpdateError
from fedmini.secagg import signatures, signing_keys

MAX_ROTATIONS = 256


@dataclass(frozen=True, slots=True)
class Rotation:
    """An operator key's word that another one follows it."""

    old_key: bytes
    new_key: bytes
    signature: bytes  # by the old key, 64 bytes


def rotate(operator: Ed25519PrivateKey, new_key: bytes) -> Rotation:
    """The rotation from the operator's key to a new public key. Raises UpdateError for one that can't be relied on."""
    old_key = signing_keys.public_bytes(operator)
    if not signing_keys.is_usable(new_key) or new_key == old_key:
        raise UpdateError(
            "expected another Ed25519 public key of 32 bytes, not of small order, to follow the operator's"
        )
    return Rotation(old_key, new_key, signatures.sign(operator, "rotation", old_key, new_key))


def follow(pinned: bytes, rotations: Sequence[Rotation]) -> bytes:
    """The operator key that is current, for a device that relies on `pinned`: the last of the chain that has it.

    `rotations` is all there were, in their order; with none, the pinned key is current. Raises ProtocolError where a
    rotation is not signed with the key it leaves, where they are not one chain (a fork, a gap, a circle), and where
    the pinned key is not in it. So who has gone on to a newer key is not led back by who finds an older one.
    """
    if not rotations:
        return pinned
    check_chain(rotations)
    if pinned not in (rotations[0].old_key, *(rotation.new_key for rotation in rotations)):
        raise ProtocolError(
            "the operator's rotations don't go through the key that this device relies on: they are another operator's, "
            "or begin at a key that was left before"
        )
    return rotations[-1].new_key


def check_chain(rotations: Sequence[Rotation]) -> None:
    """Raise ProtocolError unless each rotation is signed with the key that it leaves and begins where the last one ended."""
    if len(rotations) > MAX_ROTATIONS:
        raise ProtocolError(f"expected at most {MAX_ROTATIONS} rotations of the operator's key, got {len(rotations)}")
    for rotation in rotations:
        signed = signatures.is_valid(
            rotation.old_key, rotation.signature, "rotation", rotation.old_key, rotation.new_key
        )
        if not signed or not signing_keys.is_usable(rotation.old_key) or not signing_keys.is_usable(rotation.new_key):
            raise ProtocolError("a rotation of the operator's key is not signed with the key that it leaves")
    keys = [rotations[0].old_key, *(rotation.new_key for rotation in rotations)]
    if any(left.new_key != right.old_key for left, right in pairwise(rotations)) or len(set(keys)) != len(keys):
        raise ProtocolError(
            "the operator's rotations are not one chain: one key was left for two others, or taken up twice"
        )
