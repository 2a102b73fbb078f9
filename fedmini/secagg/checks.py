"""What a device checks before it goes on, one function for each lie it would otherwise fall for.

Each raises ProtocolError; the session is over then, and nothing more leaves the device. tests/secagg has, for each, the
lie that it answers, and a twin where the check is switched off and the lie works. The reasons are in
docs/secure-aggregation.md.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedmini.errors import DealerError, ProtocolError
from fedmini.secagg import shamir, signatures
from fedmini.secagg.messages import MAX_DEVICES, Advert, Context, Stage, hash_model
from fedmini.secagg.trust import Revocations, Trust
from fedmini.types import DeviceId, Manifest

# Points of order 1, 2, 4 and 8 on Curve25519 and its twist, as they may be written (RFC 7748; cr.yp.to/ecdh.html#validate).
# With one of these as a peer's key, whatever the device's own key is, the secret in common is zero.
SMALL_ORDER = frozenset(
    bytes.fromhex(text)
    for point in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
    # X25519 ignores the last bit.
    for text in (point, point[:62] + f"{int(point[62:], 16) ^ 0x80:02x}")
)


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a device agreed to before a session begins: all that its checks compare with."""

    device_id: DeviceId
    manifest: Manifest
    trust: Trust

    @property
    def manifest_hash(self) -> bytes:
        return bytes.fromhex(self.manifest.hash)


def stage(expected: Stage, got: Stage) -> None:
    """A request comes once, in its turn: a second unmasking would open a second sum."""
    if expected != got:
        raise ProtocolError(f"expected a request of stage {expected.name}, got one of stage {got.name}")


def manifest(context: Context, agreed: Agreed) -> None:
    """The session is about the manifest that this device agreed to, and one of its rounds."""
    expected = (agreed.manifest.run_id, agreed.manifest_hash)
    if (context.run_id, context.manifest_hash) != expected:
        raise ProtocolError(
            f"the session is about run {context.run_id!r} with manifest {context.manifest_hash.hex()[:12]}, this device "
            f"agreed to {expected[0]!r} with {expected[1].hex()[:12]}"
        )
    if not 1 <= context.round_num <= agreed.manifest.num_rounds:  # one far off would use up all that come before it
        raise ProtocolError(f"expected a round from 1 to {agreed.manifest.num_rounds}, got {context.round_num}")


def invited(context: Context, agreed: Agreed) -> None:
    """This device is one of a cohort of a size that the manifest allows."""
    if agreed.device_id not in context.invited:
        raise ProtocolError(f"{agreed.device_id} is not among the devices that are invited")
    cohort_size(len(context.invited), agreed)


def cohort_size(num_devices: int, agreed: Agreed) -> None:
    """Neither fewer devices than the noise counts on, nor more than the modulus has room for."""
    least, most = agreed.manifest.release.min_survivors, min(agreed.manifest.release.max_devices, MAX_DEVICES)
    if not least <= num_devices <= most:
        raise ProtocolError(f"expected {least} to {most} devices, as the manifest says, got {num_devices}")


def session(expected: bytes, got: bytes) -> None:
    """The request is about this session and no other."""
    if expected != got:
        raise ProtocolError("a request is about another session than the one that this device was invited to")


def lowest_threshold(num_devices: int) -> int:
    """More than two thirds: then two views of a round, both accepted, share an honest device (docs, "Why two thirds")."""
    return 2 * num_devices // 3 + 1


def threshold(value: int, num_devices: int) -> None:
    """No fewer than two thirds and one more can open anything."""
    least = lowest_threshold(num_devices)
    if not least <= value <= num_devices:
        raise ProtocolError(f"expected a threshold from {least} to {num_devices}, got {value}")


def roster(adverts: Sequence[Advert], own: Advert, context: Context) -> None:
    """Everybody on the list was invited, and this device stands there with its own keys."""
    strangers = {advert.sender for advert in adverts} - set(context.invited)
    if strangers:
        raise ProtocolError(f"{min(strangers)} is on the list of keys, and was never invited")
    if own not in adverts:
        raise ProtocolError("this device is not on the list with the keys that it sent")


def distinct_keys(adverts: Sequence[Advert]) -> None:
    """No key comes twice: one device that stands for two would count twice among those that agree."""
    found = [key for advert in adverts for key in (advert.mask_key, advert.share_key)]
    found += [advert.certificate.device_key for advert in adverts]
    if len(set(found)) != len(found):
        raise ProtocolError("a public key is on the list twice")


def key_order(adverts: Sequence[Advert]) -> None:
    """No key makes the secret in common with it predictable."""
    for advert in adverts:
        if SMALL_ORDER & {advert.mask_key, advert.share_key}:
            raise ProtocolError(f"{advert.sender}: a public key is of small order: expected one that a device drew")


def revocations(found: Revocations | None, trust: Trust) -> Trust:
    """The newest list of revoked devices that this device has seen; an older one than before is refused."""
    if found is None:
        if trust.revocations_sequence > 0:
            raise ProtocolError("the list of revoked devices is missing: this device has seen one before")
        return trust
    return trust.updated(found)


def certificates(adverts: Sequence[Advert], trust: Trust) -> None:
    """Every key belongs to a device that the operator enrolled, under the name it goes by here, and has not revoked."""
    for advert in adverts:
        if advert.certificate.device_id != advert.sender:
            raise ProtocolError(f"{advert.sender} came with the certificate of {advert.certificate.device_id}")
        trust.check_certificate(advert.certificate)


def advert_signatures(adverts: Sequence[Advert], session_digest: bytes) -> None:
    """Each device itself made these keys for this very session: same round, manifest, model and cohort."""
    for advert in adverts:
        fields = (session_digest, advert.sender, advert.mask_key, advert.share_key)
        if advert.session != session_digest or not signatures.is_valid(
            advert.certificate.device_key, advert.signature, "advert", *fields
        ):
            raise ProtocolError(
                f"{advert.sender}: its keys are not signed for this session: another round, manifest, model or cohort, "
                "or keys that are not its own"
            )


def holders(devices: Collection[DeviceId], roster_devices: Collection[DeviceId], least: int) -> None:
    """Those who hold shares are on the list of keys, and enough."""
    strangers = set(devices) - set(roster_devices)
    if strangers:
        raise ProtocolError(f"{min(strangers)} sent shares, and is not on the list of keys")
    if len(devices) < least:
        raise ProtocolError(f"expected at least {least} devices that hold shares, got {len(devices)}")


def share_commitments(dealer: DeviceId, shares: tuple[bytes, bytes], expected: bytes, found: bytes) -> None:
    """Two shares are possible ones, and those that their dealer committed to: else their holder would be blamed later."""
    if not all(shamir.is_share(share) for share in shares):
        raise DealerError(f"{dealer} sealed what can't be a share", dealer)
    if expected != found:
        raise DealerError(f"{dealer} sealed other shares than it committed to", dealer)


def model(content: bytes, context: Context) -> None:
    """The model is the one that every device of the cohort signed for."""
    if hash_model(content) != context.model_hash:
        raise ProtocolError("the model is another than the one that the cohort was invited for")


def partition(
    survivors: Sequence[DeviceId], dropped: Sequence[DeviceId], holders: Collection[DeviceId], own: DeviceId
) -> None:
    """Each device is alive or dropped and not both, and this one, which sent its vector, is alive."""
    if sorted([*survivors, *dropped]) != sorted(holders):
        raise ProtocolError("the devices that are alive and those that are dropped don't make up the roster, each once")
    if own not in survivors:
        raise ProtocolError("this device sent its vector, and is said to have dropped")


def enough_survivors(num_survivors: int, least: int) -> None:
    """Enough noise shares are in the sum, and nobody is alone in it."""
    if num_survivors < least:
        raise ProtocolError(f"expected at least {least} survivors, got {num_survivors}: this device gives up the round")


def agreements(
    found: Mapping[DeviceId, bytes], outcome: tuple[bytes, list[DeviceId], list[DeviceId]],
    device_keys: Mapping[DeviceId, bytes], least: int,
) -> None:  # fmt: skip
    """At least `least` survivors signed that they were told this same outcome."""
    digest, survivors, dropped = outcome
    valid = sum(
        device in survivors
        and signatures.is_valid(device_keys[device], signature, "survivors", digest, survivors, dropped)
        for device, signature in found.items()
    )
    if valid < least:
        raise ProtocolError(f"expected {least} survivors that were told the same outcome, got {valid}")
