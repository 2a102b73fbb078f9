"""Certificates for 127.0.0.1: good ones, and one whose time is over."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def authority(folder: Path, days: float = 1.0) -> tuple[Path, tuple[Path, Path]]:
    """A fresh authority's certificate, and a server's with its private key, which holds for so long from an hour ago on."""
    folder.mkdir(parents=True)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name, name = _name("authority"), _name("server")
    ca = _signed(ca_name, ca_name, ca_key.public_key(), ca_key, 1.0, None)
    leaf = _signed(ca_name, name, key.public_key(), ca_key, days, x509.IPAddress(ip_address("127.0.0.1")))
    files = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    files[0].write_bytes(ca)
    files[1].write_bytes(leaf)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files[2].write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return files[0], (files[1], files[2])


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _signed(issuer, subject, public_key, signer, days, address) -> bytes:
    now = datetime.now(UTC)
    until = now + timedelta(days=days) if days > 0 else now - timedelta(minutes=30)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=address is None, path_length=None), critical=True)
    )
    if address is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
