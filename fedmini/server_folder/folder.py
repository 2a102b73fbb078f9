"""A server's folder: made once, read by the running server, changed by one command at a time."""

import contextlib
import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path

from fedmini import config as configuration
from fedmini.config import ServerConfig
from fedmini.errors import ConfigError, StateError, UpdateError
from fedmini.secagg import signing_keys, trust_text
from fedmini.secagg.device_keys import DeviceKeys
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.trust import Certificate, Revocations, Trust
from fedmini.server_folder import certificates, checks, layout, roll
from fedmini.server_folder.certificates import TlsFiles
from fedmini.server_folder.roll import EnrolledDevice, Roll

TOKEN_BYTES = 32


class ServerFolder:
    """A server's folder, opened by `opened`. What it says is read anew at every call, but for `config`. No secret in its repr.

    Guarantee: what a method has accepted is on the disk when it returns; a kill in the middle leaves what was before or
    what was asked for, and giving it again ends it. Each method that changes something keeps other commands out.
    """

    __slots__ = ("config", "path")

    def __init__(self, path: Path) -> None:
        layout.check_folder(path)
        self.path = path
        self.config: ServerConfig = configuration.load_server_config(path / layout.CONFIG)

    def __repr__(self) -> str:
        return f"ServerFolder({str(self.path)!r})"

    def roll(self) -> Roll:
        """Whom this server believes and who may log in, as of one moment. Raises ConfigError before there is an operator."""
        return roll.read(self.path)

    @property
    def operator_key(self) -> bytes:
        """The operator's key of now, 32 bytes."""
        return self.roll().trust.operator_key

    @property
    def trust(self) -> Trust:
        """The operator's key of now, and the newest revocations."""
        return self.roll().trust

    def devices(self) -> dict[str, EnrolledDevice]:
        """Who may log in, by name, sorted."""
        return dict(self.roll().devices)

    def device(self, name: str) -> EnrolledDevice:
        """An enrolled device. Raises ConfigError where none is enrolled by this name."""
        known = self.roll().devices
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"{len(known)} are"
            raise ConfigError(f"no device is enrolled here as {name!r}: {hint}; see `fedmini server devices list`")
        return known[name]

    def fingerprint(self) -> str:
        """What changes when anything changes that this folder says, runs and state left out. Cheap."""
        return layout.fingerprint(self.path)

    def adopt(self, operator_key: bytes) -> None:
        """Take an operator's public key, once: the same again is fine. Raises ConfigError where there is another."""
        with layout.locked(self.path):
            if (self.path / layout.OPERATOR).exists():
                known = self.roll().operator_keys
                if operator_key not in known:
                    raise ConfigError(
                        f"{self.path} relies on the operator key {known[-1].hex()[:16]}..., got {operator_key.hex()[:16]}...: "
                        "where that one follows, give the operator's rotations; for another operator, make another folder"
                    )
                return
            layout.write_file(self.path / layout.OPERATOR, signing_keys.write_public(operator_key))

    def enroll(self, keys: DeviceKeys, certificate: Certificate) -> EnrolledDevice:
        """Let a device log in with its login key, in the place of the one that it had; the same again is fine.

        Raises ProtocolError where the operator did not certify it, or has revoked it; ConfigError where the keys are
        another device's than the certificate's, the name, the device key or the login key is taken by another, or the
        login key was cut off by a server that ran here.
        """
        with layout.locked(self.path):
            known = self.roll()
            name = certificate.device_id
            layout.check_name(name, "a device")
            checks.check_certified(certificate, known.trust)
            try:
                device = roll.pair(keys, certificate)
            except UpdateError as error:
                raise ConfigError(str(error)) from error
            checks.check_free(device, known.devices)
            checks.check_unspent(device, self.is_spent(device.login_key_bytes))
            if known.devices.get(name) != device:
                layout.write_file(self._file_of(name), roll.write_device(device))
            return device

    def note_spent(self, login_key: bytes) -> None:
        """Note that the SuperLink has cut a login key off: it lets it in no more. A disk that refuses costs the note."""
        with contextlib.suppress(StateError):
            spent = layout.read_digests(self.path / layout.SPENT)
            if (digest := hashlib.sha256(login_key).hexdigest()) not in spent:
                layout.write_file(self.path / layout.SPENT, "".join(f"{one}\n" for one in (*spent, digest)).encode())

    def is_spent(self, login_key: bytes) -> bool:
        """Whether a server that ran here has noted that of a login key."""
        return hashlib.sha256(login_key).hexdigest() in layout.read_digests(self.path / layout.SPENT)

    def revoke_local(self, name: str) -> None:
        """Don't let a device log in any more. The operator's certificate for it stays good: only its revocations end that.

        Raises ConfigError where none is enrolled by this name.
        """
        with layout.locked(self.path):
            self.device(name)
            layout.remove_file(self._file_of(name))

    def follow(
        self,
        rotations: Sequence[Rotation] = (),
        revocations: Revocations | None = None,
        renewed: Iterable[Certificate] = (),
    ) -> Roll:
        """Go on to the operator's current key, revocations and certificates; what holds then. The same again is fine.

        `rotations` are all there were, or empty where there is nothing to follow; `renewed` are certificates of enrolled
        devices. Raises ProtocolError where the rotations don't go on from what is known, the revocations are older than
        those seen, or anything is not signed by the key of then; ConfigError where a certificate is nobody's here.
        """
        with layout.locked(self.path):
            before = self.roll()
            chain = tuple(rotations) or before.rotations
            trust = checks.follow(before, chain, revocations) if rotations else checks.update(before, revocations)
            devices = dict(checks.renew(one, before.devices, trust) for one in renewed)
            # In this order, which `roll.read` relies on.
            if rotations:
                layout.write_file(self.path / layout.ROTATIONS, trust_text.write_rotations(chain))
            if revocations is not None:
                layout.write_file(self.path / layout.REVOCATIONS, trust_text.write_revocations(revocations))
            for name, device in devices.items():
                layout.write_file(self._file_of(name), roll.write_device(device))
            after = self.roll()
            for path in sorted((self.path / layout.DEVICES).glob("*.json")):
                if path.stem not in after.devices:
                    layout.remove_file(path)
            return after

    @property
    def token(self) -> str:
        """What a process on this machine shows to be let in, 64 digits. Raises StateError."""
        path = self.path / layout.TOKEN
        content = layout.read_file(path).strip()
        if len(content) != 2 * TOKEN_BYTES or not set(content) <= set(b"0123456789abcdef"):
            raise StateError(f"{path}: expected {2 * TOKEN_BYTES} digits in hex: bring it back from a backup")
        return content.decode()

    @property
    def tls(self) -> TlsFiles:
        """The files of the certificate that devices are shown."""
        own = self.config.tls
        if own.certificate is not None and own.private_key is not None:
            return TlsFiles(own.certificate, own.private_key, None)
        return certificates.own_files(self.path / layout.TLS)

    def check_certificate(self, now: datetime) -> datetime:
        """When the certificate ends. Raises ConfigError where it can't be used now: what is wrong, and what to do."""
        return certificates.check(self.tls, self.config.server.host, now)

    def rotate_certificate(self, now: datetime, new_authority: bool = False) -> None:
        """Put a new certificate in the old one's place, by the same authority or by a new one.

        Raises ConfigError where server.toml names a certificate of the operator's own.
        """
        if self.config.tls.certificate is not None:
            raise ConfigError(f"{self.path / layout.CONFIG} names a certificate of your own: its issuer renews it")
        with layout.locked(self.path):
            renew = certificates.renew_authority if new_authority else certificates.renew
            renew(self.path / layout.TLS, hosts_of(self.config), now)

    def run_folder(self, name: str) -> Path:
        """Where a run's files are. Raises ConfigError for what can't name a run."""
        layout.check_name(name, "a run")
        return self.path / layout.RUNS / name

    def _file_of(self, name: str) -> Path:
        return self.path / layout.DEVICES / f"{name}.json"


def create(
    path: Path,
    config: ServerConfig,
    now: datetime,
    operator_key: bytes | None = None,
    runs: Mapping[str, Mapping[str, bytes]] | None = None,
) -> ServerFolder:
    """A new server's folder (0700), with fresh keys, whole or not at all; `runs` has the files of each, by name.

    Raises ConfigError where something is there already.
    """
    contents = {
        layout.CONFIG: configuration.dump_server_config(config).encode(),
        layout.TOKEN: secrets.token_hex(TOKEN_BYTES).encode() + b"\n",
    }
    for name, content in certificates.draw(hosts_of(config), now).items():
        contents[f"{layout.TLS}/{name}"] = content
    if operator_key is not None:
        contents[layout.OPERATOR] = signing_keys.write_public(operator_key)
    for run, run_files in (runs or {}).items():
        layout.check_name(run, "a run")
        contents |= {f"{layout.RUNS}/{run}/{name}": content for name, content in run_files.items()}
    with layout.new_folder(path) as partial:
        for folder in (layout.DEVICES, layout.RUNS, layout.STATE):
            (partial / folder).mkdir(mode=0o700)
        layout.fill(partial, contents)
    return ServerFolder(path)


def opened(path: Path) -> ServerFolder:
    """A server's folder, to be read and changed. Raises ConfigError where it is none, or server.toml is wrong."""
    return ServerFolder(path)


def hosts_of(config: ServerConfig) -> tuple[str, ...]:
    """What the certificate is for."""
    return (config.server.host, *config.server.other_hosts)
