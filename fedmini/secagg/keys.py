"""Key agreement, key derivation and sealed shares: thin names over `cryptography`, and secrets that can be erased."""

import hashlib
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmini.errors import ProtocolError
from fedmini.secagg.shamir import Random, random_secret

KEY_BYTES = 32
TAG_BYTES = 16
NONCE = bytes(12)  # every sealing key is used for one message: it is derived from fresh keys, session and direction


class SecretKey:
    """An X25519 private key that can be shared, used, and erased. It never enters a repr, and can't be serialised."""

    __slots__ = ("_key", "_scalar")

    def __init__(self, scalar: bytes | bytearray) -> None:
        self._scalar = bytearray(scalar)
        self._key: X25519PrivateKey | None = None  # the library's, made once; it overwrites its own when it is let go

    @classmethod
    def draw(cls, random: Random) -> "SecretKey":
        """A fresh key. Its 32 bytes are below 2**255 - 19, so that they can be shared; X25519 ignores the top bit anyway."""
        return cls(random_secret(random))

    def __repr__(self) -> str:
        return "SecretKey(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is never serialised")

    @property
    def scalar(self) -> bytes:
        """The 32 bytes that are shared among the peers."""
        return bytes(self._scalar)

    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._private().public_key().public_bytes_raw()

    def agree(self, peer: bytes) -> bytes:
        """The 32 bytes that this key and the peer's public key have in common; the peer computes the same.

        A peer's key of small order would make them predictable: raises ProtocolError.
        """
        try:
            return self._private().exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:
            raise ProtocolError("a public key is of small order: expected one that a device drew") from error

    def erase(self) -> None:
        """Overwrite the key. It can't be used afterwards."""
        self._key = None
        scalar, self._scalar = self._scalar, bytearray()
        erase(scalar)

    def _private(self) -> X25519PrivateKey:
        if len(self._scalar) != KEY_BYTES:
            raise ProtocolError("the key was erased: a session's keys serve once")
        if self._key is None:
            self._key = X25519PrivateKey.from_private_bytes(bytes(self._scalar))
        return self._key


def erase(secret: bytearray) -> None:
    """Overwrite a secret with zeros. Copies that Python or a library made are beyond reach; none is kept on purpose."""
    secret[:] = bytes(len(secret))


def derive(secret: bytes, purpose: str, *context: bytes) -> bytes:
    """A 32-byte key for one purpose in one context, by HKDF-SHA256 (RFC 5869). Each context field is length-prefixed."""
    fields = (f"fedmini/{purpose}/v1".encode(), *context)
    info = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """AES-256-GCM of the content, bound to what it is `about`; 16 bytes longer. A key seals one message only."""
    return AESGCM(key).encrypt(NONCE, content, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """The content of what `seal` gave for this key and `about`. Anything else raises ProtocolError."""
    try:
        return AESGCM(key).decrypt(NONCE, sealed, about)
    except InvalidTag as error:
        raise ProtocolError("a sealed share was changed, or was meant for somebody else") from error


def commit(purpose: str, *fields: bytes) -> bytes:
    """SHA-256 over a purpose and fields, 32 bytes: binds to them, and hides what can't be guessed."""
    digest = hashlib.sha256()
    for field in (f"fedmini/{purpose}/v1".encode(), *fields):
        digest.update(len(field).to_bytes(4, "big") + field)
    return digest.digest()
