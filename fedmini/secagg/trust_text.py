"""Certificates, revocations, rotations and signed manifests as JSON and back: one form for each, every field checked.

Binary fields are in hex. Whatever doesn't encode to itself again is refused, so that nothing is read in two ways.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from fedmini import manifest_file
from fedmini.errors import UpdateError
from fedmini.secagg import signatures, signing_keys
from fedmini.secagg.rotation import MAX_ROTATIONS, Rotation
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import MAX_DEVICE_ID_BYTES, MAX_REVOKED, MAX_SEQUENCE, Certificate, Revocations, is_device_id
from fedmini.types import Manifest

MAX_BYTES = 2**20  # of a list; a signed manifest may have as much beside the manifest's own bytes

Reader = Callable[[Any, str], Any]
Record = TypeVar("Record")


def write_certificate(certificate: Certificate) -> bytes:
    """A certificate as JSON, with a newline at its end."""
    return _write(
        "certificate",
        device_id=certificate.device_id,
        device_key=certificate.device_key.hex(),
        signature=certificate.signature.hex(),
    )


def read_certificate(content: bytes) -> Certificate:
    """The certificate in these bytes. Raises UpdateError; who signed it is not looked at."""
    values = _read(content, "certificate", device_id=_device_id, device_key=_key, signature=_signature)
    return _same_form(Certificate(**values), write_certificate, content)


def write_revocations(revocations: Revocations) -> bytes:
    """A list of revocations as JSON, with a newline at its end."""
    keys = [key.hex() for key in revocations.device_keys]
    return _write("revocations", sequence=revocations.sequence, device_keys=keys, signature=revocations.signature.hex())


def read_revocations(content: bytes) -> Revocations:
    """The list in these bytes, strictly sorted. Raises UpdateError; who signed it is not looked at."""
    keys = _list_of(_key, MAX_REVOKED)
    revocations = Revocations(
        **_read(content, "revocations", sequence=_number(1, MAX_SEQUENCE), device_keys=keys, signature=_signature)
    )
    if list(revocations.device_keys) != sorted(set(revocations.device_keys)):
        raise UpdateError("device_keys: expected sorted keys, each once")
    return _same_form(revocations, write_revocations, content)


def write_rotations(rotations: Sequence[Rotation]) -> bytes:
    """All rotations of an operator's key, in their order, as JSON, with a newline at its end."""
    rows = [[rotation.old_key.hex(), rotation.new_key.hex(), rotation.signature.hex()] for rotation in rotations]
    return _write("rotations", rotations=rows)


def read_rotations(content: bytes) -> tuple[Rotation, ...]:
    """The rotations in these bytes. Raises UpdateError; `rotation.follow` looks at whether they are a chain."""
    rows = _list_of(_row(_key, _key, _signature), MAX_ROTATIONS)
    values = _read(content, "rotations", rotations=rows)
    rotations = tuple(Rotation(*row) for row in values["rotations"])
    return _same_form(rotations, write_rotations, content)


def write_signed_manifest(signed: SignedManifest) -> bytes:
    """A signed manifest as JSON, with a newline at its end."""
    return _write(
        "signed-manifest",
        manifest=json.loads(manifest_file.canonical(signed.manifest)),
        min_revocations=signed.min_revocations,
        operator_key=signed.operator_key.hex(),
        signature=signed.signature.hex(),
    )


def read_signed_manifest(content: bytes) -> SignedManifest:
    """The signed manifest in these bytes, every field in range. Raises UpdateError; who signed it is not looked at."""
    values = _read(
        content,
        "signed-manifest",
        manifest=_manifest,
        min_revocations=_number(0, MAX_SEQUENCE),
        operator_key=_key,
        signature=_signature,
    )
    return _same_form(SignedManifest(**values), write_signed_manifest, content)


def _write(kind: str, **fields: Any) -> bytes:
    return _encode({"format": f"fedmini/{kind}/v1", **fields}) + b"\n"


def _encode(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _read(content: bytes, kind: str, **readers: Reader) -> dict[str, Any]:
    most = MAX_BYTES + (manifest_file.MAX_BYTES if "manifest" in readers else 0)
    if len(content) > most:
        raise UpdateError(f"expected at most {most} bytes of {kind}, got {len(content)}")
    try:
        values = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        what = kind if kind.endswith("s") else f"a {kind}"
        raise UpdateError(f"expected {what} in JSON, got something else: was it cut or changed?") from None
    if not isinstance(values, dict) or values.get("format") != f"fedmini/{kind}/v1":
        raise UpdateError(
            f'expected a file that says "format": "fedmini/{kind}/v1": this is another, or of another version'
        )
    if set(values) != {"format", *readers}:
        raise UpdateError(f"expected the keys format, {', '.join(readers)} and no others")
    return {name: read(values[name], name) for name, read in readers.items()}


def _same_form(record: Record, write: Callable[[Record], bytes], content: bytes) -> Record:
    if write(record) != content:
        raise UpdateError("the file was written anew by something else: take it as fedmini wrote it, byte for byte")
    return record


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _device_id(value: Any, name: str) -> str:
    if not is_device_id(value):
        raise UpdateError(f"{name}: expected printable text of 1 to {MAX_DEVICE_ID_BYTES} bytes")
    return str(value)


def _manifest(value: Any, name: str) -> Manifest:
    try:
        content = _encode(value)
    except RecursionError:
        raise UpdateError(f"{name}: expected a manifest, got lists in lists") from None
    return manifest_file.parse(content)


def _hex(size: int) -> Reader:
    def read(value: Any, name: str) -> bytes:
        try:
            found = bytes.fromhex(value) if isinstance(value, str) else b""
        except ValueError:
            found = b""
        if len(found) != size:
            raise UpdateError(f"{name}: expected {size} bytes in hex")
        return found

    return read


def _key(value: Any, name: str) -> bytes:
    key: bytes = _hex(signatures.KEY_BYTES)(value, name)
    if not signing_keys.is_usable(key):
        raise UpdateError(f"{name}: expected an Ed25519 public key, not one of small order")
    return key


_signature = _hex(signatures.SIGNATURE_BYTES)


def _number(least: int, most: int) -> Reader:
    def read(value: Any, name: str) -> int:
        if type(value) is not int or not least <= value <= most:
            raise UpdateError(f"{name}: expected a number from {least} to {most}")
        return value

    return read


def _list_of(item: Reader, most: int) -> Reader:
    def read(value: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise UpdateError(f"{name}: expected a list of at most {most}")
        return tuple(item(one, name) for one in value)

    return read


def _row(*items: Reader) -> Reader:
    def read(value: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(items):
            raise UpdateError(f"{name}: expected rows of {len(items)}")
        return tuple(item(one, name) for item, one in zip(items, value, strict=True))

    return read
