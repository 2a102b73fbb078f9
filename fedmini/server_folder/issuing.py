"""X.509 certificates of a small authority, and of a server under it, as current TLS libraries want them."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmini.errors import StateError

AUTHORITY_DAYS, SERVER_DAYS = 3650, 397
SKEW = timedelta(days=1)  # how far behind a device's clock may be when a certificate is new
ALWAYS = ("localhost", "127.0.0.1")

PrivateKey = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Authority:
    """Who signs the server's certificates."""

    certificate: x509.Certificate
    key: PrivateKey


def draw_key() -> PrivateKey:
    """A fresh key from the operating system's generator."""
    return ec.generate_private_key(ec.SECP256R1())


def draw_authority(now: datetime) -> Authority:
    """A new authority, which has signed itself."""
    key = draw_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:8]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedmini server authority {identifier}")])
    builder = _authority_builder(name, name, key, now).not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
    return Authority(_signed(builder, key, key.public_key()), key)


def sign_authority(old: Authority, new: Authority, now: datetime) -> x509.Certificate:
    """The old authority's word for the new one, as long as the old one holds."""
    builder = _authority_builder(new.certificate.subject, old.certificate.subject, new.key, now)
    builder = builder.not_valid_after(old.certificate.not_valid_after_utc)
    return _signed(builder, old.key, old.key.public_key())


def issue(authority: Authority, key: PrivateKey, hosts: Sequence[str], now: datetime) -> x509.Certificate:
    """A server's certificate for these names and addresses, and for this machine itself. Raises StateError."""
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *ALWAYS))]
    end = min(now + timedelta(days=SERVER_DAYS), authority.certificate.not_valid_after_utc)
    if end <= now:
        raise StateError("the authority of this server has ended: begin another with `rotate-certificate --new-ca`")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmini server")])
    builder = (
        _builder(subject, authority.certificate.subject, key, now)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return _signed(builder, authority.key, authority.key.public_key())


def hosts_of(certificate: x509.Certificate) -> set[str]:
    """The names and addresses that a server's certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def _authority_builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        _builder(subject, issuer, key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(is_authority=True), critical=True)
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: PrivateKey, now: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _signed(builder: x509.CertificateBuilder, key: PrivateKey, issuer: ec.EllipticCurvePublicKey) -> x509.Certificate:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer)
    return builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
