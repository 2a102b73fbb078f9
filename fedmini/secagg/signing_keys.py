"""Ed25519 keys as bytes and as PEM text: which are usable, and how they are written and read.

A private key never enters an error message, and neither does a passphrase.
"""

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmini.errors import UpdateError
from fedmini.secagg import signatures

MAX_PEM_BYTES = 4096
# PKCS8 as `cryptography` writes it stretches a passphrase by 2048 rounds of PBKDF2 only: a short one would be guessed.
MIN_PASSPHRASE_BYTES = 16

# The y coordinates of the curve's points of small order, sign bit cleared: under such a key anybody can sign.
_SMALL_ORDER = frozenset(
    bytes.fromhex(encoding)
    for encoding in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


def is_usable(public_key: object) -> bool:
    """Whether this can be an Ed25519 public key under which nobody but its owner can sign: 32 bytes, not of small order."""
    if not isinstance(public_key, bytes) or len(public_key) != signatures.KEY_BYTES:
        return False
    return public_key[:-1] + bytes([public_key[-1] & 0x7F]) not in _SMALL_ORDER


def draw() -> Ed25519PrivateKey:
    """A fresh key from the operating system's generator."""
    return Ed25519PrivateKey.generate()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The public key of a private one, 32 bytes."""
    return key.public_key().public_bytes_raw()


def write_private(key: Ed25519PrivateKey, passphrase: bytes | None) -> bytes:
    """A private key as PKCS8 in PEM, encrypted where there is a passphrase.

    Raises UpdateError for a passphrase of less than 16 bytes.
    """
    if passphrase is not None and len(passphrase) < MIN_PASSPHRASE_BYTES:
        raise UpdateError(f"expected a passphrase of at least {MIN_PASSPHRASE_BYTES} bytes: take six random words")
    hidden: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        hidden = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


def is_encrypted(content: bytes) -> bool:
    """Whether a private key in PEM needs a passphrase."""
    return content.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")


def read_private(content: bytes, passphrase: bytes | None) -> Ed25519PrivateKey:
    """The private key that `write_private` wrote. Raises UpdateError, which says nothing of it, where it can't be read."""
    if len(content) > MAX_PEM_BYTES:
        raise UpdateError(f"expected a private key of at most {MAX_PEM_BYTES} bytes, got {len(content)}")
    needed = passphrase if is_encrypted(content) else None
    if is_encrypted(content) and not needed:
        raise UpdateError("the private key is encrypted: its passphrase is needed")
    try:
        key = serialization.load_pem_private_key(content, needed)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError):
        key = None  # what the library says of it goes no further
    if isinstance(key, Ed25519PrivateKey):
        return key
    if needed:
        raise UpdateError("the passphrase is not this private key's, or its file is damaged")
    raise UpdateError("expected an Ed25519 private key in PEM (PKCS8): bring the file back from a backup")


def write_public(public_key: bytes) -> bytes:
    """A public key as SubjectPublicKeyInfo in PEM."""
    key = Ed25519PublicKey.from_public_bytes(public_key)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_public(content: bytes) -> bytes:
    """The 32 bytes of a public key in PEM. Raises UpdateError for anything but a usable Ed25519 key, a private one too."""
    if b"PRIVATE KEY-----" in content:
        raise UpdateError(
            "expected a public key, got a private one: keep that where it was made, and hand over the .pub file"
        )
    try:
        key = serialization.load_pem_public_key(content[: MAX_PEM_BYTES + 1])
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey) or not is_usable(key.public_bytes_raw()):
        raise UpdateError(
            "expected an Ed25519 public key in PEM, as `fedmini device init` writes it, got something else"
        )
    return key.public_bytes_raw()
