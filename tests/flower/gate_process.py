"""A real gate in a real process, with TLS from a throwaway authority, for tests that need the network."""

import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedmini.flower import gate


@dataclass
class GateProcess:
    """A gate that listens. `stop` and `kill` end it; `start` brings one back on the same database and ports."""

    config: gate.GateConfig
    ca: Path
    folder: Path
    process: subprocess.Popen[str] | None = field(default=None, repr=False)
    port: int = 0
    local_port: int = 0

    @property
    def token(self) -> str:
        return self.config.token

    @property
    def log(self) -> str:
        """What it logged so far."""
        return (self.folder / "gate.log").read_text()

    def start(self) -> "GateProcess":
        """Start it, and wait until both ports listen."""
        self.process = spawn(self.config, self.folder)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the gate did not start: {self.log}"
        ready = json.loads(line)
        self.port, self.local_port = ready["port"], ready["local_port"]
        self.config = dataclasses.replace(self.config, port=self.port, local_port=self.local_port)
        return self

    def stop(self) -> int:
        """End it with SIGTERM; its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(20)

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)


def spawn(config: gate.GateConfig, folder: Path) -> subprocess.Popen[str]:
    """Start a gate's process and wait for nothing. Its log goes to gate.log in `folder`."""
    path = folder / "gate.json"
    path.touch(mode=0o600)
    path.write_text(gate.config_json(config))
    with (folder / "gate.log").open("a") as log:
        command = [sys.executable, "-m", "fedmini.flower.gate", str(path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


@contextlib.contextmanager
def running_gate(folder: Path, **changes: object) -> Iterator[GateProcess]:
    """A gate with TLS on 127.0.0.1 and free ports, ended afterwards. `changes` go into its GateConfig."""
    ca, certificate, key = throwaway_certificate(folder)
    fields: dict[str, object] = {
        "host": "127.0.0.1",
        "port": 0,
        "local_port": 0,
        "database": folder / "superlink.db",
        "certificate": certificate,
        "private_key": key,
        "token": secrets.token_hex(32),
    }
    running = GateProcess(gate.GateConfig(**{**fields, **changes}), ca, folder)
    try:
        yield running.start()
    finally:
        if running.process is not None:
            running.process.kill()
            running.process.wait(20)
            if running.process.stdout is not None:
                running.process.stdout.close()


def throwaway_certificate(folder: Path) -> tuple[Path, Path, Path]:
    """An authority's certificate, a server's certificate for 127.0.0.1 and localhost, and its private key, as PEM files."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throwaway authority")])
    ca = _certificate(name, name, ca_key.public_key(), is_ca=True).sign(ca_key, hashes.SHA256())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    leaf = _certificate(subject, name, key.public_key(), is_ca=False).add_extension(names, critical=False)
    files = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    pem = serialization.Encoding.PEM
    files[0].write_bytes(ca.public_bytes(pem))
    files[1].write_bytes(leaf.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    plain = serialization.NoEncryption()
    files[2].write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    os.chmod(files[2], 0o600)
    return files


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, is_ca: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
