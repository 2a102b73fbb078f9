"""Who is enrolled with a server, read from its folder: nothing is taken that the operator and the device did not sign.

A running server reads while a command writes, and takes no lock for it: a command writes rotations first, then
revocations, then devices, and a reader goes the other way. What it reads then is signed by a key that it comes to know.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedmini.errors import ConfigError, ProtocolError, StateError, UpdateError
from fedmini.secagg import device_keys, rotation, signing_keys, trust, trust_text
from fedmini.secagg.device_keys import DeviceKeys
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.trust import Certificate, Revocations, Trust
from fedmini.server_folder import layout

FORMAT = "fedmini/enrolled-device/v1"
RESTORE = "bring it back from a backup"

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class EnrolledDevice:
    """A device that may log in: the operator's word for its device key, and that key's word for its login key."""

    certificate: Certificate
    login_key_bytes: bytes  # P-384 public key, SubjectPublicKeyInfo in PEM
    signature: bytes  # of the login key by the device key, 64 bytes

    @property
    def device_keys(self) -> DeviceKeys:
        """What the device itself has signed."""
        return DeviceKeys(self.certificate.device_key, self.login_key_bytes, self.signature)


@dataclass(frozen=True, slots=True)
class Roll:
    """Whom a server believes, and who may log in to it."""

    operator_keys: tuple[bytes, ...]  # from the one that the folder began with to the one of now
    rotations: tuple[Rotation, ...]  # all that there were, from the first of these on or before
    trust: Trust  # the operator's key of now, and the newest revocations
    devices: Mapping[str, EnrolledDevice]  # by name, sorted; none that is revoked

    def is_current(self, device: EnrolledDevice) -> bool:
        """Whether a device's certificate is by the operator's key of now: it takes no part in a round before."""
        return is_signed(self.trust.operator_key, device.certificate)


def write_device(device: EnrolledDevice) -> bytes:
    """An enrolled device as JSON, with a newline at its end."""
    certificate = json.loads(trust_text.write_certificate(device.certificate))
    keys = json.loads(device_keys.write(device.device_keys))
    return device_keys.encode({"format": FORMAT, "certificate": certificate, "device_keys": keys})


def read_device(content: bytes) -> EnrolledDevice:
    """The device in these bytes, whose keys are its own. Raises UpdateError; who certified it is not looked at."""
    values = device_keys.decode(content, FORMAT, "certificate", "device_keys")
    try:
        certificate = trust_text.read_certificate(device_keys.encode(values["certificate"]))
        keys = device_keys.read(device_keys.encode(values["device_keys"]))
    except RecursionError:
        raise UpdateError("expected a certificate and device keys, got lists in lists") from None
    device = pair(keys, certificate)
    if write_device(device) != content:
        raise UpdateError("the file was written anew by something else: take it as fedmini wrote it, byte for byte")
    return device


def pair(keys: DeviceKeys, certificate: Certificate) -> EnrolledDevice:
    """A device with its certificate. Raises UpdateError where they are two devices'."""
    if keys.device_key != certificate.device_key:
        raise UpdateError(
            f"the certificate of {certificate.device_id!r} is for the key {certificate.device_key.hex()[:16]}..., and the "
            f"device's is {keys.device_key.hex()[:16]}...: take both from the same device"
        )
    return EnrolledDevice(certificate, keys.login_key, keys.signature)


def read(folder: Path) -> Roll:
    """Whom the server of a folder believes, and who is enrolled with it.

    Raises ConfigError where it has no operator yet; StateError where a file is damaged, or not signed as it should be.
    """
    found = _read_devices(folder / layout.DEVICES)
    revocations = _read_revocations(folder / layout.REVOCATIONS)
    pinned, rotations = _read_operator(folder / layout.OPERATOR), _read_rotations(folder / layout.ROTATIONS)
    try:
        keys = lead_on(pinned, rotations)
    except ProtocolError as error:
        raise StateError(f"{folder / layout.ROTATIONS}: {error}; {RESTORE}") from error
    for name, device in found.items():
        if not any(is_signed(key, device.certificate) for key in keys):
            raise StateError(
                f"{folder / layout.DEVICES / name}.json is not certified by this server's operator: remove it, and find out "
                "who put it there"
            )
    keys, trust = _newest_trust(keys, revocations, folder)
    revoked = () if revocations is None else revocations.device_keys
    devices = {name: device for name, device in found.items() if device.certificate.device_key not in revoked}
    return Roll(keys, rotations, trust, devices)


def lead_on(pinned: bytes, rotations: tuple[Rotation, ...]) -> tuple[bytes, ...]:
    """The operator's keys from the pinned one on. Raises ProtocolError where the rotations don't lead on from it."""
    rotation.follow(pinned, rotations)
    keys = [*(one.old_key for one in rotations[:1]), *(one.new_key for one in rotations)]
    return tuple(keys[keys.index(pinned) :]) if keys else (pinned,)


def is_signed(operator_key: bytes, certificate: Certificate) -> bool:
    """Whether an operator's key has signed a certificate."""
    return _passes(trust.check_issued, operator_key, certificate)


def is_list_of(operator_key: bytes, revocations: Revocations) -> bool:
    """Whether an operator's key has signed a list of revocations."""
    return _passes(trust.check_revocations, operator_key, revocations)


def _newest_trust(
    keys: tuple[bytes, ...], revocations: Revocations | None, folder: Path
) -> tuple[tuple[bytes, ...], Trust]:
    """Trust in the newest key, or where a rotation was cut short before its revocations came, in the one before it."""
    if revocations is None:
        return keys, Trust(keys[-1])
    for end in range(len(keys), 0, -1):
        if is_list_of(keys[end - 1], revocations):
            return keys[:end], Trust(keys[end - 1], revocations)
    raise StateError(f"{folder / layout.REVOCATIONS} is not signed by this server's operator: {RESTORE}")


def _passes(check: Callable[[bytes, Found], None], key: bytes, record: Found) -> bool:
    try:
        check(key, record)
    except ProtocolError:
        return False
    return True


def _read_devices(folder: Path) -> dict[str, EnrolledDevice]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = layout.read_file(path)
        except StateError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue  # its device was revoked just now
            raise
        device = _parse(path, content, read_device)
        if device.certificate.device_id != path.stem:
            raise StateError(
                f"{path} holds another device than its name says: remove it, and find out who put it there"
            )
        found[path.stem] = device
    return found


def _read_operator(path: Path) -> bytes:
    if not path.exists():
        raise ConfigError(
            f"{path.parent} has no operator yet: `fedmini server follow {path.parent} OPERATOR.pub` takes the public key that "
            "`fedmini operator init` made"
        )
    return _parse(path, layout.read_file(path), signing_keys.read_public)


def _read_rotations(path: Path) -> tuple[Rotation, ...]:
    return _parse(path, layout.read_file(path), trust_text.read_rotations) if path.exists() else ()


def _read_revocations(path: Path) -> Revocations | None:
    return _parse(path, layout.read_file(path), trust_text.read_revocations) if path.exists() else None


def _parse(path: Path, content: bytes, parse: Callable[[bytes], Found]) -> Found:
    try:
        return parse(content)
    except UpdateError as error:
        raise StateError(f"{path}: {error}; {RESTORE}") from error
