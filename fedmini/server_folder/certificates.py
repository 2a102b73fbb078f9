"""The server's TLS certificate, under a small authority of its own, so that devices rely on the authority only.

tls/ca.crt   what devices rely on: the authority, and after a change the one before it too
tls/ca.key   tls/server.crt (with what leads to an authority before)   tls/server.key   server.next.key: only meanwhile

A certificate can be renewed without telling any device. A new authority is signed by the one before, and that comes
with the server's certificate: devices that have only the old ca.crt go on, until that authority ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from fedmini import files
from fedmini.errors import ConfigError, StateError
from fedmini.server_folder import issuing, layout
from fedmini.server_folder.issuing import Authority

CA, CA_KEY, SERVER, SERVER_KEY, NEXT_KEY = "ca.crt", "ca.key", "server.crt", "server.key", "server.next.key"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What the server shows, and what devices rely on."""

    certificate: Path
    private_key: Path
    authority: Path | None  # None: who issued the operator's own certificate


def draw(hosts: Sequence[str], now: datetime) -> dict[str, bytes]:
    """The files of a new authority and its first certificate for these names and addresses."""
    authority, key = issuing.draw_authority(now), issuing.draw_key()
    return {
        CA: _pem(authority.certificate),
        CA_KEY: _write_key(authority.key),
        SERVER: _pem(issuing.issue(authority, key, hosts, now)),
        SERVER_KEY: _write_key(key),
    }


def renew(tls: Path, hosts: Sequence[str], now: datetime) -> None:
    """Put a new certificate, with a new key, in the old one's place, by the same authority. Raises StateError."""
    authority = _read_authority(tls)
    _put_in_place(tls, authority, hosts, _leading_to_others(tls, authority, now), now)


def renew_authority(tls: Path, hosts: Sequence[str], now: datetime) -> None:
    """Put a new authority, and a certificate by it, in the old one's place; killed anywhere, devices are still served.

    Raises StateError.
    """
    old, new = _read_authority(tls), issuing.draw_authority(now)
    is_over = old.certificate.not_valid_after_utc <= now
    _put_in_place(tls, new, hosts, [] if is_over else [issuing.sign_authority(old, new, now)], now)
    layout.write_file(tls / CA, _pem(new.certificate, *([] if is_over else [old.certificate])))
    layout.write_file(tls / CA_KEY, _write_key(new.key))


def own_files(tls: Path) -> TlsFiles:
    """The folder's own certificate and key, also where a renewal was cut short between the two."""
    pending = tls / NEXT_KEY
    key = pending if pending.exists() and _fits(tls / SERVER, pending) else tls / SERVER_KEY
    return TlsFiles(tls / SERVER, key, tls / CA)


def check(tls: TlsFiles, host: str, now: datetime) -> datetime:
    """When the server's certificate ends. Raises ConfigError, which says what to do, where it can't be used now."""
    is_own = tls.authority is not None
    remedy = "renew it with `fedmini server rotate-certificate DIR`" if is_own else "have it renewed by who issued it"
    chain = _read_chain(tls.certificate)
    if not _fits(tls.certificate, tls.private_key):
        raise ConfigError(f"{tls.private_key} is not the key of {tls.certificate}: {remedy}")
    if is_own and tls.private_key.stat().st_mode & 0o077:
        raise ConfigError(
            f"{tls.private_key} can be read by others on this machine: make it 0600 if nobody did; or {remedy}"
        )
    if is_own and host not in issuing.hosts_of(chain[0]):
        raise ConfigError(f"{tls.certificate} is not for {host}, which server.toml names: {remedy}")
    begin, end = chain[0].not_valid_before_utc, chain[0].not_valid_after_utc
    if now < begin:
        raise ConfigError(
            f"{tls.certificate} holds from {begin:%Y-%m-%d %H:%M} UTC on: set this machine's clock, or {remedy}"
        )
    if now >= end:
        raise ConfigError(f"{tls.certificate} has ended on {end:%Y-%m-%d %H:%M} UTC: {remedy}")
    return end


def _put_in_place(
    tls: Path, authority: Authority, hosts: Sequence[str], more: Sequence[x509.Certificate], now: datetime
) -> None:
    """A new certificate and its key: from the moment that the certificate is replaced, both are the new ones."""
    key = issuing.draw_key()
    finish(tls)
    layout.write_file(tls / NEXT_KEY, _write_key(key))
    layout.write_file(tls / SERVER, _pem(issuing.issue(authority, key, hosts, now), *more))
    finish(tls)


def finish(tls: Path) -> None:
    """End a renewal that was cut short: the next key takes its place where its certificate has, or it goes."""
    pending = tls / NEXT_KEY
    if not pending.exists():
        return
    try:
        if _fits(tls / SERVER, pending):
            pending.replace(tls / SERVER_KEY)
            files.sync_folder(tls)
            return
    except OSError as error:
        raise StateError(
            f"can't write {tls / SERVER_KEY}: {error.strerror}; mend that, then do the same again"
        ) from error
    layout.remove_file(pending)


def _read_authority(tls: Path) -> Authority:
    """The authority whose key is here: the first of ca.crt, or where a change was cut short, another of it."""
    key = _read_key(tls / CA_KEY)
    for certificate in _read_chain(tls / CA):
        if isinstance(key, ec.EllipticCurvePrivateKey) and certificate.public_key() == key.public_key():
            return Authority(certificate, key)
    raise StateError(f"{tls / CA_KEY} is the key of no certificate in {CA}: bring both back from one backup")


def _leading_to_others(tls: Path, authority: Authority, now: datetime) -> list[x509.Certificate]:
    """What comes with the server's certificate now, as far as it is about this authority and still holds."""
    return [
        one
        for one in _read_chain(tls / SERVER)[1:]
        if one.public_key() == authority.key.public_key() and one.not_valid_after_utc > now
    ]


def _fits(certificate: Path, private_key: Path) -> bool:
    """Whether the key is that of the first certificate."""
    return bool(_read_key(private_key).public_key() == _read_chain(certificate)[0].public_key())


def _read_chain(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise ConfigError(f"{path}: expected a certificate in PEM: bring the file back from a backup") from None


def _read_key(path: Path) -> PrivateKeyTypes:
    """The private key of a PEM file. Raises ConfigError, which says nothing of it."""
    try:
        return serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError):
        pass  # what the library says of it goes no further
    raise ConfigError(f"{path}: expected a private key in PEM, not encrypted: bring the file back from a backup")


def _read(path: Path) -> bytes:
    try:
        return layout.read_file(path)
    except StateError as error:
        raise ConfigError(str(error)) from error


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def _write_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
