"""Where a service listens: a unix socket that only its owner may open, or a loopback address."""

import fcntl
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import grpc

from fedmini.errors import ConfigError, StateError
from fedmini.phrases import quoted

MAX_PATH_BYTES = 107  # what the kernel takes as a unix socket's path
_PROBE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A socket's path; PATH.lock beside it says which process it belongs to."""

    path: Path


@dataclass(frozen=True, slots=True)
class Loopback:
    """An address of this machine itself; port 0 takes any that is free."""

    host: str
    port: int


Place = UnixSocket | Loopback


def parse_loopback(text: str) -> Loopback:
    """127.0.0.1:PORT or [::1]:PORT. Raises ConfigError, for every address that other machines could reach too."""
    found = re.fullmatch(r"\[?([0-9a-fA-F.:]+?)\]?:([0-9]{1,5})", text)
    try:
        host, port = ipaddress.ip_address(found[1] if found else ""), int(found[2] if found else "")
    except ValueError:
        host, port = ipaddress.ip_address("0.0.0.0"), 0
    if not host.is_loopback or port > 65535:
        raise ConfigError(
            f"--listen: expected 127.0.0.1:PORT or [::1]:PORT, got {text!r}: nothing but this machine may reach it"
        )
    return Loopback(str(host), port)


@contextmanager
def alone(lock: Path, complaint: str) -> Iterator[None]:
    """No other process is inside with the same lock file. The kernel lets go of it however this one ends."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"can't make {quoted(lock)}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateError(complaint) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def bound(server: grpc.Server, place: Place) -> Iterator[str]:
    """The server, bound to a place; the address, in words. Raises ConfigError or StateError where it can't be."""
    if isinstance(place, Loopback):
        yield _bind_loopback(server, place)
        return
    path = Path(os.path.abspath(place.path))
    _check_path(path)
    with alone(path.with_name(f"{path.name}.lock"), f"another process listens on {quoted(path)}: stop it first"):
        _clear(path)
        _bind_socket(server, path)
        try:
            yield str(path)
        finally:
            path.unlink(missing_ok=True)


def _bind_loopback(server: grpc.Server, place: Loopback) -> str:
    host = f"[{place.host}]" if ":" in place.host else place.host
    try:
        port = server.add_insecure_port(f"{host}:{place.port}")
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"--listen: can't listen on {host}:{place.port}: another program may, choose another port")
    return f"{host}:{port}"


def _check_path(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise ConfigError(
            f"--socket: {quoted(path)} has {length} bytes, and a socket's path may have {MAX_PATH_BYTES}: choose a shorter one"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--socket: {quoted(path.parent)} is no folder: make it, for its owner only")


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens on any more. Raises where somebody does, or it is something else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--socket: {quoted(path)} is there, and no socket: choose another path, or move it away")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # its process was killed
            return
        except OSError:
            pass
    raise StateError(f"another program listens on {quoted(path)}: stop it, or choose another path")


def _bind_socket(server: grpc.Server, path: Path) -> None:
    before = os.umask(0o177)  # the socket is 0600 from its first moment
    try:
        server.add_insecure_port(f"unix:{quote(os.fsencode(path))}")
    except RuntimeError as error:
        raise ConfigError(f"--socket: can't listen on {quoted(path)}: may this user write that folder?") from error
    finally:
        os.umask(before)
