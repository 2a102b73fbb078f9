"""What a device is told when it is opened: its limits, its server, and which certificate that has to show."""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedmini import config as configuration
from fedmini.config import DeviceConfig
from fedmini.enrolment import records
from fedmini.errors import ConfigError
from fedmini.flower.fleet import tls_context
from fedmini.flower.gate import is_loopback
from fedmini.phrases import quoted


@dataclass(frozen=True, slots=True)
class Server:
    """Where a device's server is, and what its certificate is checked against (PEM, or a file of it; None: the system's)."""

    url: str
    key: Path | str | None

    def __post_init__(self) -> None:
        """Raise ConfigError for what is no server's address, and for one without TLS that is not on this machine."""
        configuration.parse_device_config({"device": {"server": self.url}}, "Device(server=...)")
        host = urlsplit(self.url).hostname or ""
        if self.url.startswith("http://") and not is_loopback(host):
            raise ConfigError(
                f"server: {self.url} has no TLS, and {host} is not this machine: expected https://HOST:PORT"
            )

    def tls(self) -> ssl.SSLContext | None:
        """TLS as the key says it now, a file read anew; None for a server on this machine without TLS."""
        return None if self.url.startswith("http://") else tls_context(_content(self.key))


def folder_at(given: Path | str) -> Path:
    """A device's folder, which need not be there yet. Raises ConfigError where none can be."""
    try:
        folder = Path(given).expanduser()
        with taken_from(folder), suppress(FileNotFoundError):
            folder.stat()
    except (ValueError, TypeError, RuntimeError):  # a null byte, no path at all, nobody's home
        raise ConfigError("the device's folder: expected a path, one that this system can have") from None
    return folder


@contextmanager
def taken_from(folder: Path) -> Iterator[None]:
    """Inside, what the disk refuses becomes a ConfigError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"can't use {quoted(folder)} as a device's folder: {error.strerror}; let the user who runs this own it, or "
            "choose another"
        ) from error


def device_config(folder: Path, given: DeviceConfig | Mapping[str, Any] | None) -> DeviceConfig:
    """What was given, in the place of the folder's device.toml. Raises ConfigError."""
    if isinstance(given, DeviceConfig):
        return given
    if given is not None:
        return configuration.parse_device_config(given, "Device(config=...)")
    path = folder / records.CONFIG
    return configuration.load_device_config(path) if path.exists() else DeviceConfig()


def server_of(url: str | None, key: Path | str | None, config: DeviceConfig) -> Server | None:
    """The server that was given, or the configuration's; None where neither names one."""
    url = url or config.device.server
    return Server(url, key if key is not None else config.device.server_key) if url is not None else None


def _content(key: Path | str | None) -> bytes | None:
    if key is None:
        return None
    if isinstance(key, str) and "-----BEGIN CERTIFICATE-----" in key:
        return key.encode("utf-8", "replace")
    try:
        path = Path(key).expanduser()
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"server_key: can't read {quoted(path)}: {error.strerror}") from error
    except (ValueError, TypeError, RuntimeError):
        raise ConfigError("server_key: expected a certificate in PEM, or the path of a file of it") from None
