"""What an operator signed so far, read from its folder: nothing is taken that it did not sign."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedmini.errors import ProtocolError, StateError, UpdateError
from fedmini.operator_keys.key_files import read_file
from fedmini.secagg import rotation, trust, trust_text
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.trust import Certificate, Revocations

Record = TypeVar("Record")


def read_certificates(path: Path, *operator_keys: bytes) -> dict[str, Certificate]:
    """The enrolled devices' certificates by name, sorted. Raises StateError where none of these operator keys signed one."""
    certificates = {}
    for file in sorted((path / "devices").glob("*.json")):
        certificate = _parse(file, trust_text.read_certificate)
        known = certificate.device_id == file.stem
        if not known or not any(is_signed(trust.check_issued, key, certificate) for key in operator_keys):
            raise StateError(
                f"{file} is not this operator's certificate for {file.stem}: remove it, and find out who put it there"
            )
        certificates[file.stem] = certificate
    return certificates


def read_revocations(path: Path, *operator_keys: bytes) -> Revocations | None:
    """The newest list of revocations. Raises StateError where none of these operator keys signed it."""
    file = path / "revocations.json"
    if not file.exists():
        return None
    revocations = _parse(file, trust_text.read_revocations)
    if not any(is_signed(trust.check_revocations, key, revocations) for key in operator_keys):
        raise StateError(f"{file} is not signed by this operator: bring it back from a backup")
    return revocations


def read_rotations(path: Path, *operator_keys: bytes) -> tuple[Rotation, ...]:
    """All rotations so far. Raises StateError where they are no chain that ends at one of these operator keys."""
    file = path / "rotations.json"
    if not file.exists():
        return ()
    chain = _parse(file, trust_text.read_rotations)
    if not is_signed(rotation.check_chain, chain) or chain[-1].new_key not in operator_keys:
        raise StateError(f"{file} is no chain of rotations to this operator's key: bring it back from a backup")
    return chain


def is_signed(check: Callable[..., None], *record: Any) -> bool:
    """Whether a check of a signature lets the record pass."""
    try:
        check(*record)
    except ProtocolError:
        return False
    return True


def _parse(file: Path, parse: Callable[[bytes], Record]) -> Record:
    try:
        return parse(read_file(file))
    except UpdateError as error:
        raise StateError(f"{file}: {error}") from error
