"""The root of trust: certificates, revocations and key rotations, all signed by the operator's key."""

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.secagg import signatures
from fedmini.types import DeviceId


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
