"""What an operator hands out as files: read, and told apart by what they say that they are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedmini.errors import ConfigError, UpdateError
from fedmini.operator_keys.key_files import read_file
from fedmini.secagg import trust_text
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.trust import Certificate, Revocations

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class SignedFiles:
    """What a device or a server follows its operator with. Who signed it is not looked at."""

    rotations: tuple[Rotation, ...] = ()
    revocations: Revocations | None = None
    certificates: tuple[Certificate, ...] = ()


def read_signed(paths: Sequence[Path], many_certificates: bool = False) -> SignedFiles:
    """Rotations, revocations and certificates, in any order, one file of each. Raises ConfigError."""
    found: dict[str, list[Any]] = {"rotations": [], "revocations": [], "certificate": []}
    readers: dict[str, Callable[[bytes], Any]] = {
        "rotations": trust_text.read_rotations,
        "revocations": trust_text.read_revocations,
        "certificate": trust_text.read_certificate,
    }
    each = "one file of each, but for certificates" if many_certificates else "one file of each"
    for path in paths:
        name = kind(path)
        if name not in found or (found[name] and not (many_certificates and name == "certificate")):
            raise ConfigError(f"{path}: expected rotations, revocations or a certificate, {each}")
        found[name].append(parse(path, readers[name]))
    revocations = found["revocations"][0] if found["revocations"] else None
    return SignedFiles(found["rotations"][0] if found["rotations"] else (), revocations, tuple(found["certificate"]))


def parse(path: Path, read: Callable[[bytes], Found]) -> Found:
    """What a reader makes of a file. Raises ConfigError that names the file."""
    try:
        return read(read_file(path))
    except UpdateError as error:
        raise ConfigError(f"{path}: {error}") from None


def kind(path: Path) -> str:
    """What a file says that it is: `rotations`, say; empty where it says nothing."""
    name = fields(path).get("format")
    return name.removeprefix("fedmini/").removesuffix("/v1") if isinstance(name, str) else ""


def is_public_key(path: Path) -> bool:
    """Whether a file says that it is a public key by itself."""
    return read_file(path).startswith(b"-----BEGIN PUBLIC KEY-----")


def fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found = json.loads(read_file(path))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
