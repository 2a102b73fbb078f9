"""What a server offers a device: a run that the operator signed, and whatever the operator has signed since.

A server only carries it: the device believes the operator's signatures and nothing else in it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fedmini.errors import UpdateError
from fedmini.secagg import trust_text
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Certificate, Revocations

FORMAT = "fedmini/offer/v1"
MAX_BYTES = 2 * 2**20
KEYS = {"format", "manifest", "rotations", "revocations", "certificate"}

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Offer:
    """A run, and the operator's records that a device may need before it can agree to it."""

    signed: SignedManifest
    rotations: tuple[Rotation, ...]
    revocations: Revocations | None
    certificate: Certificate | None  # the device's own, where it was signed anew


def write(offer: Offer) -> bytes:
    """An offer as it travels."""
    record = {
        "format": FORMAT,
        "manifest": trust_text.write_signed_manifest(offer.signed).decode(),
        "rotations": trust_text.write_rotations(offer.rotations).decode() if offer.rotations else None,
        "revocations": _text(offer.revocations, trust_text.write_revocations),
        "certificate": _text(offer.certificate, trust_text.write_certificate),
    }
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def read(content: bytes) -> Offer:
    """The offer in these bytes. Raises UpdateError; the signatures in it are not checked here."""
    if len(content) > MAX_BYTES:
        raise UpdateError(f"expected an offer of at most {MAX_BYTES} bytes, got {len(content)}")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise UpdateError("an offer is not JSON") from None
    if not isinstance(record, dict) or set(record) != KEYS or record["format"] != FORMAT:
        raise UpdateError(f"expected an offer of the form {FORMAT}: is this device up to date?")
    return Offer(
        trust_text.read_signed_manifest(_bytes(record["manifest"])),
        _read(record["rotations"], trust_text.read_rotations) or (),
        _read(record["revocations"], trust_text.read_revocations),
        _read(record["certificate"], trust_text.read_certificate),
    )


def _text(value: Found | None, write_one: Callable[[Found], bytes]) -> str | None:
    return None if value is None else write_one(value).decode()


def _read(text: Any, read_one: Callable[[bytes], Found]) -> Found | None:
    return None if text is None else read_one(_bytes(text))


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise UpdateError("an offer holds something else than text")
    return text.encode("utf-8", "surrogatepass")
