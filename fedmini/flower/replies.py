"""A device's answers, signed with its enrolled key: who answers, and to which message, rests on no login.

Flower's login signs the time of day only. An answer's signature covers the id of the very message that it answers, so
it can be neither sent by another device nor used a second time.
"""

import hashlib
import json
from dataclasses import replace

from fedmini.errors import UpdateError
from fedmini.flower.codec import Envelope
from fedmini.secagg import signatures
from fedmini.secagg.trust import Identity

SIGNATURE = "signature"
PURPOSE = "reply"


def sign(identity: Identity, message_id: str, envelope: Envelope) -> Envelope:
    """The envelope with the device's signature in it."""
    signature = identity.sign(PURPOSE, *_signed(message_id, envelope))
    return replace(envelope, fields={**envelope.fields, SIGNATURE: signature.hex()})


def check(device_key: bytes, message_id: str, envelope: Envelope) -> None:
    """Raise UpdateError unless this device signed this envelope as its answer to this message."""
    try:
        signature = bytes.fromhex(envelope.text(SIGNATURE))
    except ValueError:
        raise UpdateError("an answer's signature is no hexadecimal text") from None
    if not signatures.is_valid(device_key, signature, PURPOSE, *_signed(message_id, envelope)):
        raise UpdateError("an answer is not signed by the device that was asked, or answers another message")


def _signed(message_id: str, envelope: Envelope) -> tuple[str, str, str, bytes]:
    plain = {name: value for name, value in sorted(envelope.fields.items()) if name != SIGNATURE}
    return message_id, envelope.kind, json.dumps(plain), hashlib.sha256(envelope.payload).digest()
