"""What a server checks before it takes a device in or follows its operator. An operator's or a device's signature decides."""

from collections.abc import Mapping

from fedmini.errors import ConfigError, ProtocolError
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.trust import Certificate, Revocations, Trust
from fedmini.server_folder import roll
from fedmini.server_folder.roll import EnrolledDevice, Roll

NO_CHAIN = "the rotations don't lead on from the keys that this server has followed"


def follow(before: Roll, chain: tuple[Rotation, ...], revocations: Revocations | None) -> Trust:
    """Trust in the operator key that a chain leads to. Raises ProtocolError."""
    try:
        keys = roll.lead_on(before.operator_keys[0], chain)
    except ProtocolError as error:
        raise ProtocolError(f"{NO_CHAIN}: another operator's, or changed") from error
    if keys[: len(before.operator_keys)] != before.operator_keys:
        raise ProtocolError(f"{NO_CHAIN}: old ones, or by somebody who found a key that the operator has left")
    if revocations is not None and not roll.is_list_of(keys[-1], revocations):
        raise ProtocolError(
            f"the revocations are not signed by the operator key {keys[-1].hex()[:8]}... that the rotations lead to: give those "
            "that the operator has beside them"
        )
    return before.trust.rotated(chain, revocations)


def update(before: Roll, revocations: Revocations | None) -> Trust:
    """Trust with these revocations, where there are any. Raises ProtocolError."""
    if revocations is None:
        return before.trust
    if not roll.is_list_of(before.trust.operator_key, revocations):
        raise ProtocolError(f"the revocations are not signed by {_relied_on(before.trust)}")
    return before.trust.updated(revocations)


def check_certified(certificate: Certificate, trust: Trust) -> None:
    """Raise ProtocolError unless the operator's key of now has certified a device and not revoked it."""
    if not roll.is_signed(trust.operator_key, certificate):
        raise ProtocolError(f"the certificate of {certificate.device_id!r} is not signed by {_relied_on(trust)}")
    trust.check_certificate(certificate)


def check_free(device: EnrolledDevice, known: Mapping[str, EnrolledDevice]) -> None:
    """Raise ConfigError where a device has another's name, device key or login key."""
    name = device.certificate.device_id
    for other, found in known.items():
        has_name, has_key = other == name, found.certificate.device_key == device.certificate.device_key
        if has_name != has_key:
            what = "there is a device of this name with another key" if has_name else "this device is enrolled"
            raise ConfigError(f"{what}, as {other}: a device has one name and one key; revoke {other} first")
        if found.login_key_bytes == device.login_key_bytes and not has_name:
            raise ConfigError(
                f"{name} has the login key of {other}: it is not its own; let it make one with `fedmini device new-login`"
            )


def check_unspent(device: EnrolledDevice, is_spent: bool) -> None:
    """Raise ConfigError where a device's login key is one that the SuperLink lets in no more."""
    if is_spent:
        raise ConfigError(
            f"the login key of {device.certificate.device_id} was cut off, which is for good: run `fedmini device new-login` on "
            "the device, and enroll the device.pub that it has then"
        )


def renew(certificate: Certificate, known: Mapping[str, EnrolledDevice], trust: Trust) -> tuple[str, EnrolledDevice]:
    """An enrolled device with its certificate signed anew."""
    name = certificate.device_id
    before = known.get(name)
    if before is None or before.certificate.device_key != certificate.device_key:
        raise ConfigError(
            f"no device is enrolled here as {name!r} with this key: enroll it with `fedmini server enroll`"
        )
    check_certified(certificate, trust)
    return name, EnrolledDevice(certificate, before.login_key_bytes, before.signature)


def _relied_on(trust: Trust) -> str:
    return (
        f"the operator key {trust.operator_key.hex()[:8]}... that this server relies on; after a rotation give all files of the "
        "operator to `fedmini server follow`"
    )
