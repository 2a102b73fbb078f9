"""A device's login key as `flwr supernode register` takes it: a public key in OpenSSH's format."""

from cryptography.hazmat.primitives import serialization


def to_openssh(public_key: bytes) -> bytes:
    """A public key (PEM) as one line of an OpenSSH file."""
    key = serialization.load_pem_public_key(public_key)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + b"\n"
