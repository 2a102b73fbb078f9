"""The server's TLS certificate: devices that have its authority reach it, whatever is renewed and wherever that is killed."""

import shutil
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from fedmini import server_folder
from fedmini.config import parse_server_config
from fedmini.errors import ConfigError, StateError
from fedmini.server_folder import ServerFolder, certificates, issuing
from tests.kills import run_and_kill

NOW = datetime.now(UTC)
HOST = "fl.example.org"


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    return made(tmp_path / "server")


def made(path: Path, now: datetime = NOW) -> ServerFolder:
    config = parse_server_config({"server": {"host": HOST, "other_hosts": ["10.0.0.1"]}})
    return server_folder.create(path, config, now)


def connect(folder: ServerFolder, authority: bytes, host: str = HOST) -> None:
    """A whole TLS handshake in memory, of a device that relies on this authority. Raises ssl.SSLError."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder.tls.certificate, folder.tls.private_key)
    asking = ssl.create_default_context(cadata=authority.decode())
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_device = ssl.MemoryBIO(), ssl.MemoryBIO()
    device = asking.wrap_bio(to_device, to_server, server_hostname=host)
    server = serving.wrap_bio(to_server, to_device, server_side=True)
    for _ in range(4):
        for side in (device, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    device.getpeercert()


def authority(folder: ServerFolder) -> bytes:
    assert folder.tls.authority is not None
    return folder.tls.authority.read_bytes()


def first_of(bundle: bytes) -> bytes:
    end = b"-----END CERTIFICATE-----\n"
    return bundle.split(end)[0] + end


def test_a_device_with_the_authority_reaches_the_server_by_each_of_its_names(folder: ServerFolder) -> None:
    for host in (HOST, "10.0.0.1", "localhost", "127.0.0.1"):
        connect(folder, authority(folder), host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        connect(folder, authority(folder), "evil.example.org")


def test_a_device_with_another_authority_does_not(tmp_path: Path, folder: ServerFolder) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(folder, authority(made(tmp_path / "other")))


def test_private_keys_are_for_their_owner_only(folder: ServerFolder) -> None:
    folder.rotate_certificate(NOW, new_authority=True)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.path / "tls").iterdir()}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}
    assert (folder.path / "tls").stat().st_mode & 0o777 == 0o700


def test_no_device_has_to_know_that_the_certificate_was_renewed(folder: ServerFolder) -> None:
    before = {path.name: path.read_bytes() for path in (folder.path / "tls").iterdir()}
    folder.rotate_certificate(NOW)
    after = {path.name: path.read_bytes() for path in (folder.path / "tls").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.crt", "server.key"}
    connect(folder, before["ca.crt"])


def test_after_a_new_authority_devices_with_the_old_one_the_new_one_or_both_reach_the_server(
    folder: ServerFolder,
) -> None:
    old = authority(folder)
    folder.rotate_certificate(NOW, new_authority=True)
    both = authority(folder)
    assert both.endswith(old) and first_of(both) != old
    for _ in range(2):
        for relied_on in (old, both, first_of(both)):
            connect(folder, relied_on)
        folder.rotate_certificate(NOW)  # what leads to the old authority stays with the certificate


def test_twin_without_the_old_authority_s_word_its_devices_are_cut_off(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = authority(folder), issuing.draw_authority(NOW)
    monkeypatch.setattr(issuing, "sign_authority", lambda *_: new.certificate)
    folder.rotate_certificate(NOW, new_authority=True)
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(folder, old)


def test_an_authority_that_has_ended_is_replaced_and_no_more_handed_out(tmp_path: Path) -> None:
    folder = made(tmp_path / "old", NOW - timedelta(days=issuing.AUTHORITY_DAYS + 1))
    with pytest.raises(StateError, match=r"has ended: begin another with `rotate-certificate --new-ca`"):
        folder.rotate_certificate(NOW)
    folder.rotate_certificate(NOW, new_authority=True)
    assert authority(folder) == first_of(authority(folder))
    connect(folder, authority(folder))


def test_when_the_certificate_ends_is_known_and_what_can_not_be_used_now_is_refused(folder: ServerFolder) -> None:
    end = folder.check_certificate(NOW)
    assert timedelta(days=396) < end - NOW <= timedelta(days=397)
    folder.check_certificate(NOW - timedelta(hours=23))
    with pytest.raises(ConfigError, match=r"server\.crt has ended on .* UTC: renew it with `fedmini server rotate-"):
        folder.check_certificate(end)
    with pytest.raises(ConfigError, match=r"server\.crt holds from .* on: set this machine's clock"):
        folder.check_certificate(NOW - timedelta(days=2))


def spoil_key(folder: ServerFolder, other: ServerFolder) -> None:
    shutil.copy(other.tls.private_key, folder.tls.private_key)


def open_key(folder: ServerFolder, _: ServerFolder) -> None:
    folder.tls.private_key.chmod(0o640)


def cut_certificate(folder: ServerFolder, _: ServerFolder) -> None:
    folder.tls.certificate.write_bytes(folder.tls.certificate.read_bytes()[:-40])


def cut_key(folder: ServerFolder, _: ServerFolder) -> None:
    folder.tls.private_key.write_bytes(folder.tls.private_key.read_bytes()[:-40])


def remove_certificate(folder: ServerFolder, _: ServerFolder) -> None:
    folder.tls.certificate.unlink()


def rename_server(folder: ServerFolder, _: ServerFolder) -> None:
    path = folder.path / "server.toml"
    path.write_text(path.read_text().replace(HOST, "new.example.org"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_key, "server.key is not the key of"),
        (open_key, "server.key can be read by others"),
        (cut_certificate, "server.crt: expected a certificate in PEM"),
        (cut_key, "server.key: expected a private key in PEM"),
        (remove_certificate, "can't read .*server.crt"),
        (rename_server, "is not for new.example.org"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_said(
    tmp_path: Path, folder: ServerFolder, spoil: Callable[[ServerFolder, ServerFolder], None], says: str
) -> None:
    spoil(folder, made(tmp_path / "other"))
    with pytest.raises(ConfigError, match=says) as caught:
        server_folder.opened(folder.path).check_certificate(NOW)
    assert caught.value.__context__ is None or "BEGIN" not in str(caught.value.__context__)


def test_a_certificate_of_the_operator_s_own_is_used_and_not_renewed_here(tmp_path: Path, folder: ServerFolder) -> None:
    other = made(tmp_path / "other")
    text = (folder.path / "server.toml").read_text()
    own = f'[tls]\ncertificate = "{other.tls.certificate}"\nprivate_key = "{other.tls.private_key}"\n'
    (folder.path / "server.toml").write_text(text.replace("[tls]\n", own))
    folder = server_folder.opened(folder.path)
    assert (folder.tls.certificate, folder.tls.authority) == (other.tls.certificate, None)
    folder.check_certificate(NOW)
    with pytest.raises(ConfigError, match=r"has ended .* have it renewed by who issued it"):
        folder.check_certificate(NOW + timedelta(days=400))
    with pytest.raises(ConfigError, match="its issuer renews it"):
        folder.rotate_certificate(NOW)


@pytest.mark.parametrize("new_authority", [False, True])
def test_a_renewal_that_is_killed_anywhere_leaves_a_certificate_with_its_key(
    tmp_path: Path, new_authority: bool
) -> None:
    saved = made(tmp_path / "saved")
    old, path = authority(saved), tmp_path / "server"
    for num_calls in range(200):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(saved.path, path)
        folder = server_folder.opened(path)
        code = run_and_kill(partial(folder.rotate_certificate, NOW, new_authority), num_calls)
        folder.check_certificate(NOW)
        connect(folder, old)
        connect(folder, authority(folder))
        folder.rotate_certificate(NOW, new_authority)
        connect(folder, old if not new_authority else authority(folder))
        assert sorted(one.name for one in (path / "tls").iterdir()) == ["ca.crt", "ca.key", "server.crt", "server.key"]
        if code == 0:
            break
    assert code == 0 and num_calls > 5
    assert server_folder.opened(path).tls.private_key.name == certificates.SERVER_KEY
