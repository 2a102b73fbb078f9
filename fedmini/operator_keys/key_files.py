"""Key files and the folders that hold them: made whole or not at all, private ones for their owner only."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini.errors import ConfigError, StateError, UpdateError
from fedmini.files import replace_synced, sync_folder
from fedmini.secagg import device_keys, signing_keys
from fedmini.secagg.device_keys import DeviceKeys, LoginKey

OPERATOR_KEY, OPERATOR_PUBLIC_KEY = "operator.key", "operator.pub"
DEVICE_KEY, LOGIN_KEY, DEVICE_PUBLIC_KEYS = "device.key", "login.key", "device.pub"
MAX_FILE_BYTES = 2**22

AskPassphrase = Callable[[], bytes]
SigningKey: TypeAlias = Ed25519PrivateKey


def create(path: Path, passphrase: bytes | None) -> bytes:
    """A new operator's folder (0700) with a fresh key; the public key. Raises ConfigError where something is there."""
    key = signing_keys.draw()
    _new_folder(path, _key_files(key, passphrase, OPERATOR_KEY, OPERATOR_PUBLIC_KEY))
    return signing_keys.public_bytes(key)


def create_device(path: Path) -> bytes:
    """A new device's folder (0700) with fresh keys; its public key. Raises ConfigError where something is there."""
    key = signing_keys.draw()
    _new_folder(path, {DEVICE_KEY: signing_keys.write_private(key, None), **login_files(key)})
    return signing_keys.public_bytes(key)


def login_files(device: SigningKey) -> dict[str, bytes]:
    """A fresh login key's files, by name: itself, and the public keys that the device key vouches for."""
    login = device_keys.draw_login()
    public_keys = device_keys.vouch(device, device_keys.login_bytes(login))
    return {LOGIN_KEY: device_keys.write_login(login), DEVICE_PUBLIC_KEYS: device_keys.write(public_keys)}


def read_private_key(path: Path, ask: AskPassphrase) -> SigningKey:
    """A private key's file, which only its owner may read. Raises StateError, which says nothing of the key."""
    content = read_file(path)
    if not is_for_owner_only(path):
        raise StateError(f"{path} can be read by others on this machine: make it 0600 if nobody did, or rotate the key")
    try:
        return signing_keys.read_private(content, ask() if signing_keys.is_encrypted(content) else None)
    except UpdateError as error:
        raise StateError(f"{path}: {error}") from None


def read_login_key(path: Path) -> LoginKey:
    """A device's login key, which only its owner may read. Raises StateError, which says nothing of the key."""
    content = read_file(path)
    if not is_for_owner_only(path):
        raise StateError(f"{path} can be read by others on this machine: make it 0600 if nobody did, or make another")
    try:
        return device_keys.read_login(content)
    except UpdateError as error:
        raise StateError(f"{path}: {error}") from None


def is_for_owner_only(path: Path) -> bool:
    """Whether nobody else on this machine may read or write the file."""
    return not path.stat().st_mode & 0o077


def read_public_key(path: Path) -> bytes:
    """The 32 bytes of a public key's file. Raises ConfigError."""
    try:
        return signing_keys.read_public(read_file(path))
    except UpdateError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_device_keys(path: Path) -> DeviceKeys:
    """The public keys of a device's file, which it has signed. Raises ConfigError."""
    try:
        return device_keys.read(read_file(path))
    except UpdateError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_file(path: Path) -> bytes:
    """At most 4 MiB of a file: none of ours is larger. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Put a file in place atomically, with its folder. Raises StateError."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        replace_synced(path, content, mode)
    except OSError as error:
        raise StateError(
            f"can't write {path}: {error.strerror}; mend that, then give the same command again"
        ) from error


def _key_files(key: SigningKey, passphrase: bytes | None, private: str, public: str) -> dict[str, bytes]:
    public_key = signing_keys.write_public(signing_keys.public_bytes(key))
    try:
        return {private: signing_keys.write_private(key, passphrase), public: public_key}
    except UpdateError as error:
        raise ConfigError(str(error)) from None


def _new_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """A folder with these files, 0700, that is there whole or not at all."""
    if path.exists():
        raise ConfigError(f"{path} is there already: choose another folder; keys are never overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))  # 0700
        try:
            for name, content in contents.items():
                replace_synced(partial / name, content, 0o600 if name.endswith(".key") else 0o644)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"can't make {path}: {error.strerror}; choose another folder") from error
