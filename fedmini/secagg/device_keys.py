"""A device's two public keys in one file: the one that it signs with, and the one that it logs in to a server with.

The device key vouches for the login key, so whoever knows the one knows the other too; a login key may be replaced
while the device stays enrolled. Login keys are on NIST's curve P-384 and written as flwr writes its own. Private keys
never enter an error message.
"""

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.errors import UpdateError
from fedmini.secagg import signatures, signing_keys

FORMAT = "fedmini/device-keys/v1"
MAX_BYTES = 4096

LoginKey: TypeAlias = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """A device's public keys, and its own word that both are its."""

    device_key: bytes  # Ed25519 public key, 32 bytes
    login_key: bytes  # P-384 public key, SubjectPublicKeyInfo in PEM
    signature: bytes  # of the login key by the device key, 64 bytes


def draw_login() -> LoginKey:
    """A fresh login key from the operating system's generator."""
    return ec.generate_private_key(ec.SECP384R1())


def login_bytes(key: LoginKey) -> bytes:
    """The public key of a login key, as flwr writes it: SubjectPublicKeyInfo in PEM."""
    return _public_bytes(key.public_key())


def write_login(key: LoginKey) -> bytes:
    """A login key as PKCS8 in PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_login(content: bytes) -> LoginKey:
    """The login key that `write_login` wrote. Raises UpdateError, which says nothing of it, where it can't be read."""
    try:
        key = serialization.load_pem_private_key(content[: MAX_BYTES + 1], None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError):
        key = None  # what the library says of it goes no further
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UpdateError("expected a P-384 private key in PEM (PKCS8)")
    return key


def vouch(device: Ed25519PrivateKey, login_key: bytes) -> DeviceKeys:
    """A device's public keys, the login key signed with the device key."""
    return DeviceKeys(signing_keys.public_bytes(device), login_key, signatures.sign(device, "login", login_key))


def check(keys: DeviceKeys) -> None:
    """Raise UpdateError unless both keys are usable and the device key has signed the login key."""
    if not signing_keys.is_usable(keys.device_key):
        raise UpdateError("device_key: expected an Ed25519 public key, not one of small order")
    if not _is_login_key(keys.login_key):
        raise UpdateError("login_key: expected a P-384 public key in PEM, as fedmini writes it")
    if not signatures.is_valid(keys.device_key, keys.signature, "login", keys.login_key):
        raise UpdateError("the login key is not signed with the device key beside it: take both from the device itself")


def write(keys: DeviceKeys) -> bytes:
    """A device's public keys as JSON, with a newline at its end."""
    return encode({"format": FORMAT, **_fields(keys)})


def read(content: bytes) -> DeviceKeys:
    """The public keys in these bytes, checked as by `check`. Raises UpdateError."""
    _refuse_pem(content)
    values = decode(content, FORMAT, *DeviceKeys.__slots__)
    try:
        device_key, login_key, signature = (values[name] for name in DeviceKeys.__slots__)
        keys = DeviceKeys(bytes.fromhex(device_key), login_key.encode("ascii"), bytes.fromhex(signature))
    except (ValueError, TypeError, AttributeError):
        raise UpdateError("expected device_key and signature in hex, and login_key in PEM") from None
    check(keys)
    if write(keys) != content:
        raise UpdateError("the file was written anew by something else: take it as fedmini wrote it, byte for byte")
    return keys


def encode(values: dict[str, Any]) -> bytes:
    """An object as JSON, in the one form that is read, with a newline at its end."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def decode(content: bytes, expected_format: str, *names: str) -> dict[str, Any]:
    """The JSON object in these bytes: of this format, with these fields and no others. Raises UpdateError."""
    if len(content) > MAX_BYTES:
        raise UpdateError(f"expected at most {MAX_BYTES} bytes of {expected_format}, got more")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise UpdateError("expected a device's keys in JSON, got something else: was it cut or changed?") from None
    if not isinstance(values, dict) or values.get("format") != expected_format:
        raise UpdateError(
            f'expected a file that says "format": "{expected_format}": this is another, or of another version'
        )
    if values.keys() != {"format", *names}:
        raise UpdateError(f"expected the keys format, {', '.join(names)} and no others")
    return values


def _fields(keys: DeviceKeys) -> dict[str, str]:
    return {
        "device_key": keys.device_key.hex(),
        "login_key": keys.login_key.decode("ascii"),
        "signature": keys.signature.hex(),
    }


def _refuse_pem(content: bytes) -> None:
    """Raise UpdateError for a key by itself, a private one above all."""
    if b"PRIVATE KEY-----" in content:
        raise UpdateError(
            "expected public keys, got a private one: keep that where it was made, and hand over device.pub"
        )
    if content.startswith(b"-----BEGIN PUBLIC KEY-----"):
        raise UpdateError(
            "expected a device's public keys, got one key by itself: hand over the device.pub that `fedmini device init` made, "
            "or for a folder of an earlier version `fedmini device new-login`"
        )


def _is_login_key(content: bytes) -> bool:
    """Whether this is a P-384 public key, in the one form that is written."""
    try:
        key = serialization.load_pem_public_key(content[: MAX_BYTES + 1])
    except (ValueError, UnsupportedAlgorithm, InternalError):
        return False
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        return False
    return _public_bytes(key) == content


def _public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
