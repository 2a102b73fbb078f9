"""What an operator does with its key: enrol and revoke devices, sign manifests, put a new key in the old one's place."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.errors import ConfigError, StateError, UpdateError
from fedmini.files import sync_folder
from fedmini.operator_keys import key_files, records
from fedmini.operator_keys.key_files import AskPassphrase
from fedmini.secagg import rotation, signed_manifest, signing_keys, trust, trust_text
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Certificate, Revocations
from fedmini.types import Manifest

KEY, PUBLIC_KEY = key_files.OPERATOR_KEY, key_files.OPERATOR_PUBLIC_KEY
NEXT_KEY = "operator.key.next"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class OperatorFolder:
    """An operator's key and records, opened by `opened`. Its repr shows the public key only."""

    __slots__ = ("_key", "path")

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        self.path = path
        self._key = key

    def __repr__(self) -> str:
        return f"OperatorFolder({str(self.path)!r}, {self.public_key.hex()})"

    @property
    def public_key(self) -> bytes:
        """What devices rely on, 32 bytes."""
        return signing_keys.public_bytes(self._key)

    def revocations(self) -> Revocations | None:
        """The newest list, None before the first. Raises StateError where this operator did not sign it."""
        return records.read_revocations(self.path, self.public_key)

    def certify(self, device_key: bytes, name: str | None = None) -> Certificate:
        """Enrol a device; the certificate is in devices/NAME.json too. The same key and name give the same once more.

        Without a name, it is called after its key. Raises ConfigError where the name or the key is another device's, or
        the key was revoked.
        """
        name = f"device-{device_key[:6].hex()}" if name is None else name
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} can't name a device: expected 1 to 64 of A-Z a-z 0-9 . _ -, no sign first")
        revoked = self.revocations()
        if device_key == self.public_key:
            raise ConfigError("this is the operator's own key: certify the device.pub that `fedmini device init` made")
        if revoked is not None and device_key in revoked.device_keys:
            raise ConfigError("this key was revoked: let the device make another with `fedmini device init`")
        for other, certificate in records.read_certificates(self.path, self.public_key).items():
            if (other == name) != (certificate.device_key == device_key):
                what = "there is a device of this name with another key" if other == name else "this key is enrolled"
                raise ConfigError(f"{what}, as {other}: a device has one name and one key; revoke {other} first")
        try:
            certificate = trust.certify(self._key, name, device_key)
        except UpdateError as error:
            raise ConfigError(str(error)) from error
        key_files.write_file(self.path / "devices" / f"{name}.json", trust_text.write_certificate(certificate))
        return certificate

    def revoke(self, name: str) -> Revocations:
        """The list of revocations with this device's key on it; its certificate is removed.

        Raises ConfigError where no device is enrolled by this name.
        """
        enrolled, revoked = records.read_certificates(self.path, self.public_key), self.revocations()
        if name not in enrolled:
            nearest = get_close_matches(name, enrolled, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"{len(enrolled)} are, in {self.path / 'devices'}"
            gone = f"; perhaps it was revoked already, as {len(revoked.device_keys)} of them were" if revoked else ""
            raise ConfigError(f"no device is enrolled as {name!r}: {hint}{gone}")
        device_key = enrolled[name].device_key
        if revoked is None or device_key not in revoked.device_keys:  # else: an earlier `revoke` was cut short here
            revoked = trust.revoke(self._key, revoked, [device_key])
            key_files.write_file(self.path / "revocations.json", trust_text.write_revocations(revoked))
        (self.path / "devices" / f"{name}.json").unlink()
        sync_folder(self.path / "devices")
        return revoked

    def sign_manifest(self, manifest: Manifest) -> SignedManifest:
        """The manifest, signed; devices must have seen the newest revocations before they agree to it."""
        return signed_manifest.sign_manifest(self._key, manifest, self.revocations())


def check_folder(path: Path) -> None:
    """Raise ConfigError where there is no operator's key in a folder."""
    if not (path / KEY).is_file():
        raise ConfigError(f"{path} is no operator's folder: make one with `fedmini operator init {path}`")


@contextmanager
def opened(path: Path, ask: AskPassphrase) -> Iterator[OperatorFolder]:
    """An operator's folder, locked. `ask` is called where the key is encrypted.

    Raises StateError where it is damaged, in use, or in the middle of a rotation; ConfigError where it is none.
    """
    with _locked(path):
        if (path / NEXT_KEY).exists():
            raise StateError(f"a rotation in {path} was cut short: finish it with `fedmini operator rotate {path}`")
        key = key_files.read_private_key(path / KEY, ask)
        if key_files.read_public_key(path / PUBLIC_KEY) != signing_keys.public_bytes(key):
            raise StateError(f"{path / PUBLIC_KEY} is not the public half of {KEY}: bring both back from one backup")
        yield OperatorFolder(path, key)


def rotate(path: Path, ask: AskPassphrase) -> bytes:
    """Put a new key, signed by the old one, in its place, and sign everything anew; the new public key.

    Cut short anywhere, it is finished by calling it again. The old key is removed: it has nothing left to sign, and
    whoever found it could lead devices that still rely on it elsewhere. The passphrase stays. Errors as in `opened`.
    """
    with _locked(path):
        passphrase = ask() if signing_keys.is_encrypted(key_files.read_file(path / KEY)) else None
        old = key_files.read_private_key(path / KEY, lambda: passphrase or b"")
        begun = (path / NEXT_KEY).exists()
        new = key_files.read_private_key(path / NEXT_KEY, lambda: passphrase or b"") if begun else signing_keys.draw()
        _sign_anew(path, old, new, None if begun else signing_keys.write_private(new, passphrase))
        key_files.write_file(path / PUBLIC_KEY, signing_keys.write_public(signing_keys.public_bytes(new)))
        (path / NEXT_KEY).replace(path / KEY)  # and the old key is gone
        sync_folder(path)
        return signing_keys.public_bytes(new)


def _sign_anew(path: Path, old: Ed25519PrivateKey, new: Ed25519PrivateKey, key_file: bytes | None) -> None:
    """The rotation, the revocations and the certificates, signed with the new key, which is kept first of all.

    Only what the operator signed is signed anew: where somebody put another certificate there, nothing is written.
    """
    old_key, new_key = signing_keys.public_bytes(old), signing_keys.public_bytes(new)
    chain = records.read_rotations(path, old_key, new_key)
    revoked = records.read_revocations(path, old_key, new_key)
    certificates = records.read_certificates(path, old_key, new_key)
    if not chain or chain[-1].new_key != new_key:
        chain = (*chain, rotation.rotate(old, new_key))
        rotation.check_chain(chain)
    if key_file is not None:
        key_files.write_file(path / NEXT_KEY, key_file, 0o600)
    key_files.write_file(path / "rotations.json", trust_text.write_rotations(chain))
    if revoked is not None and not records.is_signed(trust.check_revocations, new_key, revoked):
        revoked = trust.revoke(new, revoked, ())
        key_files.write_file(path / "revocations.json", trust_text.write_revocations(revoked))
    for name, certificate in certificates.items():
        if revoked is None or certificate.device_key not in revoked.device_keys:
            anew = trust.certify(new, name, certificate.device_key)
            key_files.write_file(path / "devices" / f"{name}.json", trust_text.write_certificate(anew))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other command works in the folder meanwhile. Raises ConfigError where it is no operator's."""
    check_folder(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StateError(f"another command works in {path}: wait until it has ended") from error
