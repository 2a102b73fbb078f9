"""The root of trust: certificates and revocations, signed by the operator's key, which the server never holds.

Everything here is made with the operator's private key, on the operator's own machine, and checked with its public key
on a device. `rotation.py` has how one operator key follows another, `signed_manifest.py` what a device agrees to,
`trust_text.py` how all of it is written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.errors import ProtocolError, UpdateError
from fedmini.secagg import rotation, signatures, signing_keys
from fedmini.secagg.rotation import Rotation
from fedmini.types import DeviceId

MAX_DEVICE_ID_BYTES = 128
MAX_REVOKED = 4096
MAX_SEQUENCE = 2**31 - 1
MAX_REMEMBERED = 4096  # verified certificates that a device keeps in mind: a few hundred kilobytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """The operator's word that a signing key is an enrolled device's."""

    device_id: DeviceId
    device_key: bytes  # Ed25519 public key, 32 bytes
    signature: bytes  # the operator's, 64 bytes


class Identity:
    """A device's own signing key and its certificate. The private key never enters its repr."""

    __slots__ = ("_key", "certificate")

    def __init__(self, key: Ed25519PrivateKey, certificate: Certificate) -> None:
        self._key = key
        self.certificate = certificate

    def __repr__(self) -> str:
        return f"Identity({self.certificate.device_id!r})"

    def sign(self, purpose: str, *fields: bytes | str | int | list[str] | list[bytes]) -> bytes:
        """A signature with the device's enrolled key, 64 bytes."""
        return signatures.sign(self._key, purpose, *fields)


@dataclass(frozen=True, slots=True)
class Revocations:
    """Every device key that is no longer enrolled. A later list has a higher sequence and all that was on the earlier."""

    sequence: int  # from 1
    device_keys: tuple[bytes, ...]  # strictly sorted
    signature: bytes  # the operator's, 64 bytes


def certify(operator: Ed25519PrivateKey, device_id: DeviceId, device_key: bytes) -> Certificate:
    """The operator's certificate for a device's Ed25519 public key.

    Raises UpdateError where the id can't name a device, or the key is none that only its owner can sign with.
    """
    if not is_device_id(device_id):
        raise UpdateError(f"expected a device id of 1 to {MAX_DEVICE_ID_BYTES} bytes of printable text")
    if not signing_keys.is_usable(device_key):
        raise UpdateError("expected an Ed25519 public key of 32 bytes, not of small order: let the device make another")
    return Certificate(device_id, device_key, signatures.sign(operator, "certificate", device_id, device_key))


def revoke(operator: Ed25519PrivateKey, previous: Revocations | None, device_keys: Iterable[bytes]) -> Revocations:
    """The list that follows `previous`: all that was on it, and these keys. Raises UpdateError where it grows too long."""
    before = previous.device_keys if previous is not None else ()
    keys = tuple(sorted({*before, *device_keys}))
    if len(keys) > MAX_REVOKED or not all(signing_keys.is_usable(key) for key in keys):
        raise UpdateError(
            f"expected at most {MAX_REVOKED} Ed25519 public keys to revoke: enrol everybody under a new operator"
        )
    sequence = previous.sequence + 1 if previous is not None else 1
    return Revocations(sequence, keys, signatures.sign(operator, "revocations", sequence, list(keys)))


def is_device_id(value: object) -> bool:
    """Whether this can name a device: printable text of 1 to 128 bytes."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= MAX_DEVICE_ID_BYTES


class Trust:
    """Whom a device believes: the operator key it relies on now, and the newest revocations it has seen.

    Raises ProtocolError where the key is none, or the revocations are not signed with it.
    """

    __slots__ = ("_revoked", "_verified", "operator_key", "revocations")

    def __init__(self, operator_key: bytes, revocations: Revocations | None = None) -> None:
        if not signing_keys.is_usable(operator_key):
            raise ProtocolError("expected an operator's Ed25519 public key of 32 bytes: enrol this device again")
        if revocations is not None:
            check_revocations(operator_key, revocations)
        self.operator_key = operator_key
        self.revocations = revocations
        self._revoked = frozenset(revocations.device_keys if revocations is not None else ())
        self._verified: dict[Certificate, None] = {}

    def __repr__(self) -> str:
        return f"Trust({self.operator_key.hex()}, revocations {self.revocations_sequence})"

    @property
    def revocations_sequence(self) -> int:
        """Which list of revocations this is; 0 where none has been seen."""
        return self.revocations.sequence if self.revocations is not None else 0

    def check_certificate(self, certificate: Certificate) -> None:
        """Raise ProtocolError unless the operator enrolled this device with this key, and has not revoked it.

        A certificate that was found good is not verified again, as long as it is among the last 4096 such.
        """
        check_not_revoked(certificate, self._revoked)
        if certificate in self._verified:
            return
        check_issued(self.operator_key, certificate)
        if len(self._verified) >= MAX_REMEMBERED:
            del self._verified[next(iter(self._verified))]
        self._verified[certificate] = None

    def updated(self, revocations: Revocations) -> "Trust":
        """This trust with the given revocations, where they are newer; itself, where they are the same.

        Raises ProtocolError for an older list (a server that plays one back), another one with the same sequence, one
        that lacks a key that was revoked, and one that the operator did not sign.
        """
        if revocations == self.revocations:
            return self
        check_follows(self.revocations, revocations)
        updated = Trust(self.operator_key, revocations)
        updated._verified = self._verified.copy()
        return updated

    def rotated(self, rotations: Sequence[Rotation], revocations: Revocations | None = None) -> "Trust":
        """Trust in the operator's current key, with the revocations that were signed anew with it; itself, where none.

        Raises ProtocolError as `follow` and `updated` do: what was revoked before a rotation stays revoked after it.
        """
        key = rotation.follow(self.operator_key, rotations)
        if key == self.operator_key:
            return self if revocations is None else self.updated(revocations)
        if revocations is None and self.revocations is not None:
            raise ProtocolError("the operator's key was rotated, and its revocations were not signed with the new one")
        if revocations is not None:
            check_follows(self.revocations, revocations)
        return Trust(key, revocations)


def check_issued(operator_key: bytes, certificate: Certificate) -> None:
    """Raise ProtocolError unless the certificate is well-formed and signed with the operator's key."""
    device_id, device_key = certificate.device_id, certificate.device_key
    if (
        not is_device_id(device_id)
        or not signing_keys.is_usable(device_key)
        or type(certificate.signature) is not bytes
    ):
        raise ProtocolError("a certificate is malformed: expected a printable device id and an Ed25519 public key")
    if not signatures.is_valid(operator_key, certificate.signature, "certificate", device_id, device_key):
        raise ProtocolError(
            f"the certificate of device {device_id!r} is not signed by the operator key {_relied_on(operator_key)}"
        )


def check_not_revoked(certificate: Certificate, revoked: frozenset[bytes]) -> None:
    """Raise ProtocolError where the certificate's key is revoked."""
    if certificate.device_key in revoked:
        raise ProtocolError(f"the certificate of device {certificate.device_id!r} was revoked by the operator")


def check_revocations(operator_key: bytes, revocations: Revocations) -> None:
    """Raise ProtocolError unless the list is well-formed and signed with the operator's key."""
    sequence, keys = revocations.sequence, revocations.device_keys
    is_sorted = all(left < right for left, right in pairwise(keys))
    if not 1 <= sequence <= MAX_SEQUENCE or len(keys) > MAX_REVOKED or not is_sorted:
        raise ProtocolError(f"a list of revocations is malformed: expected at most {MAX_REVOKED} keys, strictly sorted")
    if not signatures.is_valid(operator_key, revocations.signature, "revocations", sequence, list(keys)):
        raise ProtocolError(f"the list of revocations is not signed by the operator key {_relied_on(operator_key)}")


def check_follows(previous: Revocations | None, revocations: Revocations) -> None:
    """Raise ProtocolError unless the list is newer than the previous one, and revokes all that that one did."""
    if previous is None:
        return
    if revocations.sequence <= previous.sequence:
        raise ProtocolError(
            f"expected revocations later than number {previous.sequence}, got another list with number "
            f"{revocations.sequence}: the server plays back an old one"
        )
    if not set(previous.device_keys) <= set(revocations.device_keys):
        raise ProtocolError(
            f"revocations number {revocations.sequence} lack a key that number {previous.sequence} has: a revoked key "
            "stays revoked"
        )


def _relied_on(operator_key: bytes) -> str:
    return f"{operator_key.hex()[:8]}... that this device relies on; after a rotation give all files to `fedmini device follow`"
