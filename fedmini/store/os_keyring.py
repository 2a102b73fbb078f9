"""The keyring of the operating system: found without asking anybody, and never waited for without end.

Only three backends of the `keyring` package count: the macOS Keychain, the Windows Credential Locker and the Secret Service
of a Linux desktop. They are taken by name, so that no plug-in (one that writes plain text, or forgets at once) is ever
chosen, whatever keyringrc.cfg or PYTHON_KEYRING_BACKEND say.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from typing import Any, Protocol, TypeVar

from fedmini.errors import StateError

TIMEOUT_S = 20.0  # a keyring may ask its owner for a password, on a screen that nobody looks at
_SESSION_ONLY = "/org/freedesktop/secrets/collection/session"  # gone when its owner logs out

Answer = TypeVar("Answer")


class Keyring(Protocol):
    """What the store needs of a keyring: each backend of the `keyring` package has it."""

    def get_password(self, service: str, username: str) -> str | None: ...

    def set_password(self, service: str, username: str, password: str) -> None: ...

    def delete_password(self, service: str, username: str) -> None: ...


def find() -> Keyring | None:
    """This system's keyring; None where there is none, where it is locked, or where it doesn't answer in time.

    A locked Secret Service is not asked to unlock itself: on a headless machine that would wait for ever.
    """
    try:
        return answer_in_time(_find, TIMEOUT_S)
    except Exception:  # whatever a foreign D-Bus service or a missing library does here, there is no keyring to use
        return None


def answer_in_time(ask: Callable[[], Answer], timeout_s: float) -> Answer:
    """What `ask` returns or raises; StateError where it takes longer, and it is left to itself in a daemon thread."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="fedmini-keyring", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        raise StateError(
            f"the OS keyring did not answer in {timeout_s:g} s: it may be waiting for its owner; unlock it, then try again"
        ) from None


def _find() -> Keyring | None:
    if sys.platform == "darwin":
        from keyring.backends import macOS

        return _made(macOS.Keyring)
    if sys.platform == "win32":
        from keyring.backends import Windows

        return _made(Windows.WinVaultKeyring)
    from keyring.backends import SecretService

    return _made(SecretService.Keyring) if _is_unlocked() else None


def _made(backend: Any) -> Keyring | None:
    """A backend's keyring; None where the backend says that it can't work here."""
    return backend() if backend.viable else None


def _is_unlocked() -> bool:
    """Whether the Secret Service has a default collection that outlives this login and is open now."""
    import secretstorage

    with closing(secretstorage.dbus_init()) as connection:
        collection = secretstorage.get_collection_by_alias(connection, "default")
        return collection.collection_path != _SESSION_ONLY and not collection.is_locked()
