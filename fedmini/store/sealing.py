"""AES-256-GCM for one row at a time, bound to where the row stands."""

import hashlib
import hmac
import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
OVERHEAD_BYTES = 12 + 16  # the nonce before it and the tag behind
_NONCE_BYTES = 12
_PLACE = struct.Struct(">qq")
_EXAMPLE, _KEY_CHECK = b"fedmini store 1: example", b"fedmini store 1: key check"
_DERIVED, _NAMES = b"fedmini store 1: derived", b"fedmini store 1: names"


class Sealer:
    """One key, by its public name `key_id`. The key never enters a repr or an error.

    Every seal draws a random 96-bit nonce: under one key, 2**32 of them collide with a chance below 2**-32 (NIST SP 800-38D,
    section 8.3), which is far more examples than a person writes.
    """

    __slots__ = ("_aead", "_names", "key_id")

    def __init__(self, key_id: str, key: bytes) -> None:
        self.key_id = key_id
        self._aead = AESGCM(key)
        self._names = HKDF(hashes.SHA256(), KEY_BYTES, None, _NAMES).derive(key)

    def seal_example(self, content: bytes, row: int, added_minute: int) -> bytes:
        """Encrypt an example for one row and one time: opened as any other, it is refused."""
        return self._seal(content, _EXAMPLE + _PLACE.pack(row, added_minute))

    def open_example(self, sealed: bytes, row: int, added_minute: int) -> bytes | None:
        """What was sealed for this row and this time; None where it was not, or was altered."""
        return self._open(sealed, _EXAMPLE + _PLACE.pack(row, added_minute))

    def seal_derived(self, content: bytes, name: bytes) -> bytes:
        """Encrypt what was computed from an example, for one name: opened as any other, it is refused."""
        return self._seal(content, _DERIVED + name)

    def open_derived(self, sealed: bytes | memoryview, name: bytes) -> bytes | None:
        """What was sealed for this name; None where it was not, or was altered."""
        return self._open(sealed, _DERIVED + name)

    def blinded(self, name: bytes) -> str:
        """A name that says nothing of the other to whoever does not have the key: 64 hexadecimal digits."""
        return hmac.new(self._names, name, hashlib.sha256).hexdigest()

    def key_check(self) -> bytes:
        """Bytes that only this key, by this name, is `right_for`."""
        return self._seal(b"", _KEY_CHECK)

    def right_for(self, key_check: bytes) -> bool:
        """Whether this is the key that made the bytes."""
        return self._open(key_check, _KEY_CHECK) is not None

    def _seal(self, content: bytes, place: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, content, self._bound(place))

    def _open(self, sealed: bytes | memoryview, place: bytes) -> bytes | None:
        if len(sealed) < OVERHEAD_BYTES:
            return None
        try:
            return self._aead.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._bound(place))
        except InvalidTag:
            return None

    def _bound(self, place: bytes) -> bytes:
        return self.key_id.encode() + b"\0" + place


def draw_key() -> tuple[str, bytes]:
    """A fresh name and a fresh key, from the operating system's cryptographic generator."""
    return os.urandom(16).hex(), os.urandom(KEY_BYTES)
