"""Ed25519 over typed records: what is signed always says what it is for."""

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_BYTES = 64
KEY_BYTES = 32


def sign(key: Ed25519PrivateKey, purpose: str, *fields: bytes | str | int | list[str] | list[bytes]) -> bytes:
    """A signature over a purpose and its fields, 64 bytes. Two purposes never sign the same bytes."""
    return key.sign(_record(purpose, fields))


def is_valid(
    public_key: bytes, signature: bytes, purpose: str, *fields: bytes | str | int | list[str] | list[bytes]
) -> bool:
    """Whether `signature` is the key's over exactly this purpose and these fields. False for a key that is none."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _record(purpose, fields))
    except (InvalidSignature, ValueError):
        return False
    return True


def _record(purpose: str, fields: tuple[object, ...]) -> bytes:
    """MessagePack of one array: every field carries its type and length, so no two records share an encoding."""
    packed: bytes = msgpack.packb([f"fedmini/{purpose}/v1", *fields], use_bin_type=True)
    return packed
