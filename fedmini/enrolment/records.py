"""The files of a device's folder: each verified whenever it is read, several put in place at once."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedmini import files
from fedmini.errors import ConfigError, ProtocolError, StateError, UpdateError
from fedmini.operator_keys import key_files
from fedmini.operator_keys.key_files import SigningKey
from fedmini.secagg import device_keys, rotation, signed_manifest, signing_keys, trust, trust_text
from fedmini.secagg.device_keys import LoginKey
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Certificate, Identity, Trust

KEY, LOGIN_KEY, PUBLIC_KEYS = key_files.DEVICE_KEY, key_files.LOGIN_KEY, key_files.DEVICE_PUBLIC_KEYS
OPERATOR, ENROLLED = key_files.OPERATOR_PUBLIC_KEY, "enrolled.pub"
CERTIFICATE, ROTATIONS, REVOCATIONS = "certificate.json", "rotations.json", "revocations.json"
LEDGER, CONFIG, MANIFESTS = "ledger.jsonl", "device.toml", "manifests"
ACCEPTED, WITHDRAWN = ".json", ".withdrawn"
NEXT, PARTIAL = "next", ".next"
NO_REVOCATIONS = b"null\n"

RESTORE = (
    "bring it back from a backup; or make another folder with `fedmini device init`, put this one's ledger.jsonl into it "
    "(what was spent stays spent), and be enrolled anew"
)
NEW_LOGIN = (
    "bring it back from a backup; or make another with `fedmini device new-login`, and give device.pub to the server"
)
MAKE_READABLE = "let the user who runs this own the folder and its files"
RESTORE_LEDGER = "bring the newest copy back: without it nobody knows what this device has spent"
ASK_AGAIN = "ask the operator for it again, and take it with `fedmini device enrol`"

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Believed:
    """Whom a device believes, and how it came to."""

    operator_keys: tuple[bytes, ...]  # from the one that it was enrolled with to the one that it relies on now
    rotations: tuple[Rotation, ...]  # all that there were of the operator's key, as far as this device knows
    trust: Trust

    def contents(self) -> dict[str, bytes]:
        """The files that say this."""
        newest = self.trust.revocations
        return {
            ENROLLED: signing_keys.write_public(self.operator_keys[0]),
            OPERATOR: signing_keys.write_public(self.operator_keys[-1]),
            ROTATIONS: trust_text.write_rotations(self.rotations),
            REVOCATIONS: NO_REVOCATIONS if newest is None else trust_text.write_revocations(newest),
        }


def operator_keys(enrolled: bytes, rotations: tuple[Rotation, ...]) -> tuple[bytes, ...]:
    """The operator's keys from the one of the enrolment on. Raises ProtocolError where the rotations don't lead on from it."""
    rotation.follow(enrolled, rotations)
    keys = [*(rotation.old_key for rotation in rotations[:1]), *(rotation.new_key for rotation in rotations)]
    return tuple(keys[keys.index(enrolled) :]) if keys else (enrolled,)


def is_enrolled(folder: Path) -> bool:
    """Whether an operator has enrolled the device of this folder, though its files may be damaged."""
    return any((folder / name).exists() for name in (ENROLLED, ROTATIONS, REVOCATIONS))


def read_device_key(folder: Path) -> bytes:
    """The device's public key, 32 bytes. Raises StateError where the private one is missing or damaged."""
    return signing_keys.public_bytes(read_private_key(folder))


def read_private_key(folder: Path) -> SigningKey:
    """The device's own key. Raises StateError."""
    return _read_private(folder / KEY, lambda path: key_files.read_private_key(path, bytes), RESTORE)


def read_login_key(folder: Path, device_key: bytes) -> LoginKey:
    """What the device logs in with. Raises StateError where it is missing, damaged, or not what device.pub says."""
    login_key = _read_private(folder / LOGIN_KEY, key_files.read_login_key, NEW_LOGIN)
    public = _read(folder / PUBLIC_KEYS, key_files.read_device_keys, NEW_LOGIN)
    for name, half, own in (
        (KEY, public.device_key, device_key),
        (LOGIN_KEY, public.login_key, device_keys.login_bytes(login_key)),
    ):
        if half != own:
            raise StateError(f"{folder / PUBLIC_KEYS} does not hold the public half of {name}: {NEW_LOGIN}")
    return login_key


def read_identity(folder: Path, certificate: Certificate) -> Identity:
    """The device's signing key with its certificate. Raises StateError."""
    return Identity(read_private_key(folder), certificate)


def read_believed(folder: Path) -> Believed:
    """Whom the device believes. Raises StateError where a file is missing, damaged, or doesn't go with the others."""
    enrolled = _read(folder / ENROLLED, key_files.read_public_key, RESTORE)
    current = _read(folder / OPERATOR, key_files.read_public_key, RESTORE)

    def read_chain(path: Path) -> tuple[tuple[Rotation, ...], tuple[bytes, ...]]:
        rotations = trust_text.read_rotations(key_files.read_file(path))
        return rotations, operator_keys(enrolled, rotations)

    def read_trust(path: Path) -> Trust:
        content = key_files.read_file(path)
        return Trust(current, None if content == NO_REVOCATIONS else trust_text.read_revocations(content))

    rotations, keys = _read(folder / ROTATIONS, read_chain, RESTORE)
    if keys[-1] != current:
        raise StateError(f"{folder / OPERATOR} is not the key that {ROTATIONS} leads to from {ENROLLED}: {RESTORE}")
    return Believed(keys, rotations, _read(folder / REVOCATIONS, read_trust, RESTORE))


def read_certificate(folder: Path, device_key: bytes, believed: Believed) -> Certificate:
    """The device's certificate, by the operator's key of now or an earlier one. Raises StateError."""

    def read(path: Path) -> Certificate:
        certificate = trust_text.read_certificate(key_files.read_file(path))
        _by_one_of(believed.operator_keys, lambda key: trust.check_issued(key, certificate))
        check_own(certificate, device_key)
        return certificate

    return _read(folder / CERTIFICATE, read, ASK_AGAIN)


def read_manifests(folder: Path, believed: Believed, kind: str) -> dict[str, SignedManifest]:
    """The manifests that were accepted, or withdrawn, by hash. Raises StateError where one is not as it was put there."""

    def read(path: Path) -> SignedManifest:
        signed = trust_text.read_signed_manifest(key_files.read_file(path))
        _by_one_of(believed.operator_keys, lambda key: signed_manifest.check_manifest_signature(key, signed))
        if signed.manifest.hash != path.stem:
            raise UpdateError("it holds another manifest than its name says")
        if signed.min_revocations > believed.trust.revocations_sequence:
            raise UpdateError(f"when it was accepted, {REVOCATIONS} was newer: that file went back")
        return signed

    if not (folder / MANIFESTS).is_dir():
        raise StateError(f"{folder / MANIFESTS} is missing: {RESTORE}")
    return {path.stem: _read(path, read, RESTORE) for path in sorted((folder / MANIFESTS).glob(f"*{kind}"))}


def check_own(certificate: Certificate, device_key: bytes) -> None:
    """Raise ProtocolError where a certificate is another device's."""
    if certificate.device_key != device_key:
        raise ProtocolError(
            f"the certificate of {certificate.device_id!r} is for the key {certificate.device_key.hex()[:16]}..., this "
            f"device's is {device_key.hex()[:16]}...: have the operator certify this folder's device.pub"
        )


def make_folder(path: Path) -> None:
    """A folder for its owner only; the next `commit` beside it brings it to the disk. Raises StateError."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StateError(f"can't make {path}: {error.strerror}; mend that, then do the same again") from error


def commit(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put files in place, all of them or none, after a kill or a power cut too.

    Raises StateError; then they may still come into place when `finish` is called, all of them or none.
    """
    partial = folder / PARTIAL
    try:
        partial.mkdir(mode=0o700)
        for name, content in contents.items():
            files.write_synced(partial / name, content)  # in a folder for its owner only
            if name.endswith(".key"):
                (partial / name).chmod(0o600)
        files.sync_folder(partial)
        partial.rename(folder / NEXT)
        files.sync_folder(folder)
    except OSError as error:
        raise StateError(f"can't write {folder}: {error.strerror}; mend that, then do the same again") from error
    finish(folder)


def finish(folder: Path) -> None:
    """Bring into place what a `commit` that was cut short has promised, and clear the rest away. Raises StateError."""
    pending = folder / NEXT
    try:
        if pending.exists():
            for path in sorted(pending.iterdir()):
                path.replace(folder / path.name)
            files.sync_folder(folder)
            pending.rmdir()
            files.sync_folder(folder)
        if (folder / PARTIAL).exists():
            shutil.rmtree(folder / PARTIAL)
        for litter in (folder / MANIFESTS).glob(".*"):
            litter.unlink()
    except OSError as error:
        raise StateError(f"can't write {folder}: {error.strerror}; mend that, then open it again") from error


def _read_private(path: Path, read: Callable[[Path], Found], remedy: str) -> Found:
    """What is made of a private key. Raises StateError, the same for a file that is missing and a damaged one."""
    if not path.exists():
        raise StateError(f"{path} is missing or damaged: {remedy}")
    try:
        return _read(path, read, remedy)
    except StateError as error:
        if isinstance(error.__cause__, ConfigError) or not key_files.is_for_owner_only(path):
            raise
    raise StateError(f"{path} is missing or damaged: {remedy}")


def _by_one_of(keys: tuple[bytes, ...], check: Callable[[bytes], None]) -> None:
    """Raise what the check of a signature raises for the last of these keys, unless it passes for one."""
    for key in reversed(keys[:-1]):
        try:
            return check(key)
        except ProtocolError:
            continue
    return check(keys[-1])


def _read(path: Path, read: Callable[[Path], Found], remedy: str) -> Found:
    try:
        return read(path)
    except (ConfigError, ProtocolError, UpdateError) as error:
        where = "" if str(path) in str(error) else f"{path}: "
        remedy = MAKE_READABLE if isinstance(error.__cause__, PermissionError) else remedy
        raise StateError(f"{where}{error}; {remedy}") from error
