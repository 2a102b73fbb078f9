"""An operator and the devices that it enrolled, with fresh keys at every call."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.secagg import trust
from fedmini.secagg.trust import Identity, Trust
from fedmini.types import DeviceId


def an_operator() -> Ed25519PrivateKey:
    """The signing key of somebody who enrols devices."""
    return Ed25519PrivateKey.generate()


def enrol(operator: Ed25519PrivateKey, device_id: DeviceId) -> Identity:
    """A device with a fresh key that the operator certified."""
    key = Ed25519PrivateKey.generate()
    return Identity(key, trust.certify(operator, device_id, key.public_key().public_bytes_raw()))


def trust_in(operator: Ed25519PrivateKey) -> Trust:
    """What a device believes that this operator enrolled, before anything was revoked."""
    return Trust(operator.public_key().public_bytes_raw())
