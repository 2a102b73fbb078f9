"""Messages as bytes and back: MessagePack, one array a message, every field checked when it is read.

MessagePack because it is small (a binary field costs 2 to 5 bytes), kept by a maintained library, needs no generated
code, and can be made to have one encoding for each message: arrays only, and whatever doesn't encode to itself again
is refused. An array begins with the protocol's version and the message's kind, whatever comes after them.
"""

import dataclasses
from typing import Any, TypeVar

import msgpack

from fedmini.errors import ProtocolError, UpdateError
from fedmini.secagg import bindings, fields, keys, masks, shamir, signatures
from fedmini.secagg.fields import Field, Reader
from fedmini.secagg.messages import (
    MAX_DEVICES,
    VERSION,
    Advert,
    Agreement,
    Answer,
    Context,
    Invitation,
    KeyList,
    MaskedVector,
    Message,
    Outcome,
    Request,
    Revealed,
    SealedShares,
    Unmasking,
    Work,
)
from fedmini.secagg.trust import MAX_DEVICE_ID_BYTES, MAX_REVOKED, Certificate, Revocations

MAX_NUMBER = 2**31 - 1
DIGEST_BYTES = 32
OVERHEAD = 2048  # of any message beside its large fields and its entries for each device
PER_DEVICE = 512 + 2 * MAX_DEVICE_ID_BYTES  # the largest entry for one device in any message
REVOKED_BYTES = 40 * MAX_REVOKED

AnyMessage = TypeVar("AnyMessage", bound=Message)
AnyAnswer = TypeVar("AnyAnswer", bound=Answer)


def encode(message: Message) -> bytes:
    """A message as bytes; equal messages give equal bytes."""
    kind = _KINDS[type(message)]
    values = [field.write(getattr(message, name)) for name, field in _FIELDS[type(message)].items()]
    packed: bytes = msgpack.packb([VERSION, kind, *values], use_bin_type=True)
    return packed


def decode(content: bytes, expected: type[AnyMessage], max_bytes: int) -> AnyMessage:
    """The message in these bytes. Raises UpdateError for anything but an `expected` one, each field in its range.

    At most `max_bytes` are looked at, and memory stays within a small multiple of them. Another version of the protocol
    raises ProtocolError that says which side to update.
    """
    reader, kind, num_fields = _begin(content, max_bytes)
    if kind is not expected:
        raise UpdateError(f"expected a message of kind {expected.__name__}, got another")
    return _read(reader, expected, num_fields, content)


def decode_request(content: bytes, max_bytes: int) -> Request:
    """The request in these bytes, of whatever stage; as `decode`."""
    reader, kind, num_fields = _begin(content, max_bytes)
    if kind not in (Invitation, KeyList, Work, Outcome, Unmasking):
        raise UpdateError("expected a request of one of the five stages")
    request: Request = _read(reader, kind, num_fields, content)
    return request


def is_invitation(content: bytes) -> bool:
    """Whether these bytes can only be a request to begin a session: cheap, and no promise that they are a good one."""
    return content[1:3] == bytes([VERSION, _KINDS[Invitation]])


def _begin(content: bytes, max_bytes: int) -> tuple[Reader, type[Any] | None, int]:
    """A reader behind the version and the kind, what kind that is, and how many fields follow."""
    if len(content) > max_bytes:
        raise UpdateError(f"expected a message of at most {max_bytes} bytes, got {len(content)}")
    reader = Reader(content)
    num_values = reader.length("message")
    if num_values < 1:
        raise UpdateError("message: expected a version, a kind and fields, got nothing")
    _check_version(reader.value("version"))
    number = reader.value("kind")
    kind = next((kind for kind, known in _KINDS.items() if type(number) is int and known == number), None)
    return reader, kind, num_values - 2


def _check_version(version: object) -> None:
    """Every version of the protocol puts its number first, whatever comes behind it."""
    if type(version) is not int:
        raise UpdateError("a message doesn't begin with the version of its protocol")
    if version != VERSION:
        older = "the other side" if version < VERSION else "this side"
        raise ProtocolError(
            f"the other side speaks version {version} of the secure-aggregation protocol, this side version {VERSION}: "
            f"update {older}"
        )


def _read(reader: Reader, expected: type[AnyMessage], num_fields: int, content: bytes) -> AnyMessage:
    names = _FIELDS[expected]
    if num_fields != len(names):
        raise UpdateError(f"{expected.__name__}: expected {len(names)} fields, got {num_fields}")
    message = expected(**{name: field.read(reader, f"{expected.__name__}.{name}") for name, field in names.items()})
    reader.end()
    if not _is_canonical(message, content):
        raise UpdateError(f"this {expected.__name__} is not in the one form that it has: send it as it is encoded here")
    return message


def max_answer_bytes(num_coordinates: int, modulus_bits: int) -> int:
    """The most that an answer may take: a packed vector, or an entry for each device."""
    return max(masks.packed_size(num_coordinates, modulus_bits), MAX_DEVICES * PER_DEVICE) + OVERHEAD


def max_request_bytes(model_bytes: int) -> int:
    """The most that a request may take: a model, the revocations, and an entry for each device."""
    return model_bytes + MAX_DEVICES * PER_DEVICE + REVOKED_BYTES + OVERHEAD


def _is_canonical(message: Message, content: bytes) -> bool:
    """Whether `encode` gives these bytes; a large field, which is always the last, is not copied to find out."""
    *_, name = _FIELDS[type(message)]
    if _FIELDS[type(message)][name] is not _LARGE:
        return encode(message) == content
    size = len(getattr(message, name))
    header_bytes = 2 if size < 2**8 else 3 if size < 2**16 else 5  # of a binary field in its shortest form
    replaced: Any = {name: b""}
    before = encode(dataclasses.replace(message, **replaced))[:-2]
    return len(content) == len(before) + header_bytes + size and content.startswith(before)


_DIGEST = fields.blob(DIGEST_BYTES)
_KEY = fields.blob(keys.KEY_BYTES)
_SIGNATURE = fields.blob(signatures.SIGNATURE_BYTES)
_ID = fields.DEVICE_ID
_COUNT = fields.number(0, MAX_NUMBER)
_IDS = fields.sorted_list(_ID, fields.same)
_LARGE = fields.blob(0, 2**31)  # its size is the message's, which is limited first; the last field of its message

_CONTEXT = fields.record(
    Context,
    {
        "run_id": _ID,
        "round_num": _COUNT,
        "attempt": _COUNT,
        "manifest_hash": _DIGEST,
        "model_hash": _DIGEST,
        "invited": _IDS,
    },
)
_CERTIFICATE = fields.record(Certificate, {"device_id": _ID, "device_key": _KEY, "signature": _SIGNATURE})
_REVOCATIONS = fields.record(
    Revocations,
    {"sequence": _COUNT, "device_keys": fields.sorted_list(_KEY, fields.same, MAX_REVOKED), "signature": _SIGNATURE},
)
_ADVERT_FIELDS = {
    "session": _DIGEST, "sender": _ID, "mask_key": _KEY, "share_key": _KEY, "certificate": _CERTIFICATE,
    "signature": _SIGNATURE,
}  # fmt: skip
_ADVERTS = fields.sorted_list(fields.record(Advert, _ADVERT_FIELDS), lambda advert: advert.sender)
_SEALED = fields.blob(bindings.SEALED_BYTES)
_FOR_PEERS = fields.sorted_list(fields.record(fields.row, {"device": _ID, "sealed": _SEALED}), fields.first)
_FROM_PEERS = fields.sorted_list(
    fields.record(
        fields.row, {"device": _ID, "sealed": _SEALED, "commitments": fields.blob(bindings.COMMITMENTS_BYTES)}
    ),
    fields.first,
)
_SIGNED = fields.sorted_list(fields.record(fields.row, {"device": _ID, "signature": _SIGNATURE}), fields.first)
_SHARES = fields.sorted_list(
    fields.record(fields.row, {"device": _ID, "share": fields.blob(shamir.SHARE_BYTES)}), fields.first
)
_ANSWER = {"session": _DIGEST, "sender": _ID}

_FIELDS: dict[type[Any], dict[str, Field]] = {
    Invitation: {"context": _CONTEXT},
    Advert: _ADVERT_FIELDS,
    KeyList: {
        "session": _DIGEST, "threshold": fields.number(1, MAX_DEVICES), "adverts": _ADVERTS,
        "revocations": fields.optional(_REVOCATIONS),
    },
    SealedShares: _ANSWER | {
        "seed_commitment": _DIGEST, "share_commitments": fields.blob(0, MAX_DEVICES * bindings.COMMITMENTS_BYTES),
        "sealed": _FOR_PEERS,
    },
    Work: {"session": _DIGEST, "shares": _FROM_PEERS, "model": _LARGE},
    MaskedVector: _ANSWER | {"packed": _LARGE},
    Outcome: {"session": _DIGEST, "survivors": _IDS, "dropped": _IDS},
    Agreement: _ANSWER | {"signature": _SIGNATURE},
    Unmasking: {"session": _DIGEST, "agreements": _SIGNED},
    Revealed: _ANSWER | {"seed_shares": _SHARES, "key_shares": _SHARES},
}  # fmt: skip
_KINDS: dict[type[Any], int] = {kind: number for number, kind in enumerate(_FIELDS, 1)}
