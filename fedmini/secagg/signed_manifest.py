"""What a device agrees to once, for a whole run: a manifest that the operator signed."""

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini import manifest_file
from fedmini.errors import ProtocolError
from fedmini.secagg import signatures, signing_keys
from fedmini.secagg.trust import MAX_SEQUENCE, Revocations, Trust
from fedmini.types import Manifest


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest, with the least list of revocations that a device must have seen before it agrees to it."""

    manifest: Manifest
    min_revocations: int  # the sequence of the newest list when this was signed; 0 where there was none
    operator_key: bytes  # whose signature it is, for a clear refusal: what counts is the key that a device trusts
    signature: bytes  # 64 bytes


def sign_manifest(operator: Ed25519PrivateKey, manifest: Manifest, revocations: Revocations | None) -> SignedManifest:
    """The operator's word for a manifest. Signed again after a revocation, it keeps its hash and asks for the newer list."""
    least = revocations.sequence if revocations is not None else 0
    signature = signatures.sign(operator, "manifest", manifest_file.canonical(manifest), least)
    return SignedManifest(manifest, least, signing_keys.public_bytes(operator), signature)


def check_manifest(trust: Trust, signed: SignedManifest) -> None:
    """Raise ProtocolError unless the operator signed this manifest, and the device has seen the revocations it asks for.

    Whether the values in it are good enough is another question: floors.py answers it.
    """
    check_manifest_signature(trust.operator_key, signed)
    check_freshness(trust, signed)


def check_manifest_signature(operator_key: bytes, signed: SignedManifest) -> None:
    """Raise ProtocolError unless the manifest is signed with this key."""
    if signed.operator_key != operator_key:
        raise ProtocolError(
            f"the manifest is signed with the operator key {signed.operator_key.hex()[:16]}..., this device relies on "
            f"{operator_key.hex()[:16]}...: it needs the rotation from the one to the other, or another signature"
        )
    content = manifest_file.canonical(signed.manifest)
    in_range = 0 <= signed.min_revocations <= MAX_SEQUENCE
    if not in_range or not signatures.is_valid(
        operator_key, signed.signature, "manifest", content, signed.min_revocations
    ):
        raise ProtocolError("the manifest's signature is not the operator's: it was changed after it was signed")


def check_freshness(trust: Trust, signed: SignedManifest) -> None:
    """Raise ProtocolError where the device's revocations are older than the manifest asks for."""
    if trust.revocations_sequence < signed.min_revocations:
        raise ProtocolError(
            f"the manifest asks for revocations number {signed.min_revocations} or later, this device has seen number "
            f"{trust.revocations_sequence}: take the newer list with `fedmini device follow DIR REVOCATIONS.json`"
        )
