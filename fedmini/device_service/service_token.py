"""The token of a loopback address: to be on this machine is no authentication, any local user is."""

import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from fedmini.errors import ConfigError, StateError
from fedmini.phrases import quoted

HEADER = "fedmini-token"
MIN_CHARACTERS, MAX_BYTES = 16, 4096


def read_or_make(path: Path) -> str:
    """The token of a file; the file is made (0600), with a fresh one, where there is none.

    Raises StateError where others can read it, ConfigError where it is no token or can't be read or made.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return _read(path)
    except OSError as error:
        raise ConfigError(f"--token-file: can't make {quoted(path)}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(token := secrets.token_hex(32))
    return token


def is_shown(metadata: Iterable[tuple[str, str | bytes]], token: str) -> bool:
    """Whether a call shows the token, once; as long for a wrong one as for the right one."""
    shown = [value for name, value in metadata if name == HEADER]
    if len(shown) != 1:
        return False
    value = shown[0] if isinstance(shown[0], bytes) else shown[0].encode("utf-8", "replace")
    return hmac.compare_digest(value, token.encode("ascii"))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise StateError(f"{quoted(path)} can be read by others on this machine: delete it, another is made")
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--token-file: can't read {quoted(path)}: {error.strerror}") from error
    try:
        token = content.decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if len(token) < MIN_CHARACTERS or not token.isprintable() or len(content) > MAX_BYTES:
        raise ConfigError(
            f"{quoted(path)} holds no token: expected {MIN_CHARACTERS} printable ASCII characters or more on one line; "
            "delete it, another is made"
        )
    return token
