"""The passphrase of an operator's key: from a file, or from who sits at the terminal. It enters no error message."""

import getpass
import sys
from pathlib import Path

from fedmini.errors import ConfigError
from fedmini.operator_keys.key_files import AskPassphrase, read_file
from fedmini.secagg import signing_keys

MAX_PASSPHRASE_BYTES = 1024


def asker(passphrase_file: Path | None) -> AskPassphrase:
    """Gives the passphrase where it is needed: from the file, or from who sits at the terminal."""

    def ask() -> bytes:
        if passphrase_file is not None:
            return read_passphrase(passphrase_file)
        return _ask("Passphrase of the operator's key: ")

    return ask


def ask_twice() -> bytes:
    """A new passphrase, typed twice at the terminal. Raises ConfigError."""
    least = signing_keys.MIN_PASSPHRASE_BYTES
    first = _ask(f"New passphrase, at least {least} characters, such as six random words: ")
    if len(first) < least:
        raise ConfigError(f"expected a passphrase of at least {least} bytes: take six random words")
    if first != _ask("The same once more: "):
        raise ConfigError("the two passphrases differ: give the command again")
    return first


def read_passphrase(path: Path) -> bytes:
    """The first line of a file. Raises ConfigError."""
    line = read_file(path).split(b"\n", 1)[0].rstrip(b"\r")
    if not 0 < len(line) <= MAX_PASSPHRASE_BYTES:
        raise ConfigError(f"{path}: expected a passphrase of 1 to {MAX_PASSPHRASE_BYTES} bytes on its first line")
    return line


def _ask(question: str) -> bytes:
    if not sys.stdin.isatty():
        raise ConfigError("the operator's key needs a passphrase, and there is no terminal: add --passphrase-file FILE")
    try:
        return getpass.getpass(question).encode()
    except KeyboardInterrupt:
        print()  # what is said next begins on a line of its own
        raise
    except EOFError:
        print()
        raise ConfigError("no passphrase was given: type one, or add --passphrase-file FILE") from None
