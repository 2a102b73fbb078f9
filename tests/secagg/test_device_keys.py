"""A device's two public keys in one file: as flwr takes them, and by nobody but the device itself."""

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives import asymmetric

from fedmini.errors import UpdateError
from fedmini.secagg import device_keys, signatures, signing_keys
from fedmini.secagg.device_keys import DeviceKeys


def some_keys() -> DeviceKeys:
    return device_keys.vouch(signing_keys.draw(), device_keys.login_bytes(device_keys.draw_login()))


def changed(content: bytes, **fields: object) -> bytes:
    return device_keys.encode(json.loads(content) | fields)


def test_a_login_key_is_written_byte_for_byte_as_flwr_writes_its_own() -> None:
    key = device_keys.draw_login()
    assert device_keys.login_bytes(key) == asymmetric.public_key_to_bytes(key.public_key())
    assert device_keys.write_login(key) == asymmetric.private_key_to_bytes(key)
    theirs, their_public = asymmetric.generate_key_pairs()
    ours = device_keys.read_login(asymmetric.private_key_to_bytes(theirs))
    assert device_keys.login_bytes(ours) == asymmetric.public_key_to_bytes(their_public)
    assert asymmetric.uses_nist_ec_curve(key.public_key())
    public = asymmetric.bytes_to_public_key(device_keys.login_bytes(key))
    assert asymmetric.verify_signature(public, b"now", asymmetric.sign_message(key, b"now"))


def test_what_a_device_writes_is_read_again() -> None:
    keys = some_keys()
    content = device_keys.write(keys)
    assert device_keys.read(content) == keys
    assert json.loads(content)["format"] == "fedmini/device-keys/v1"
    assert signatures.is_valid(keys.device_key, keys.signature, "login", keys.login_key)


def test_another_devices_word_is_refused() -> None:
    anna, ben = some_keys(), some_keys()
    for lie in (
        replace(anna, login_key=ben.login_key),
        replace(anna, device_key=ben.device_key),
        replace(anna, signature=ben.signature),
        replace(anna, signature=bytes(64)),
    ):
        with pytest.raises(UpdateError, match="not signed with the device key beside it"):
            device_keys.read(device_keys.write(lie))


def test_twin_without_that_check_somebody_elses_login_key_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    anna, ben = some_keys(), some_keys()
    monkeypatch.setattr(signatures, "is_valid", lambda *_: True)
    lie = replace(anna, login_key=ben.login_key)
    assert device_keys.read(device_keys.write(lie)) == lie


def test_a_login_key_on_another_curve_or_in_another_form_is_refused_though_it_is_signed() -> None:
    device = signing_keys.draw()
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    good = device_keys.draw_login().public_key()
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    raw = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    for login_key in (
        key.public_bytes(*pem), good.public_bytes(*raw).hex().encode(), good.public_bytes(*pem) + b"\n",
        signing_keys.write_public(signing_keys.public_bytes(device)), b"",
    ):  # fmt: skip
        with pytest.raises(UpdateError, match="login_key: expected a P-384 public key"):
            device_keys.read(device_keys.write(device_keys.vouch(device, login_key)))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda content: content[:-9], "expected a device's keys in JSON"),
        (lambda content: content + b"\n", "written anew by something else"),
        (lambda content: content.replace(b":", b": "), "written anew by something else"),
        (lambda content: changed(content, extra=1), "and no others"),
        (lambda content: changed(content, format="fedmini/device-keys/v2"), "of another version"),
        (lambda content: changed(content, device_key=1), "in hex"),
        (lambda content: changed(content, device_key="00" * 32), "small order"),
        (lambda content: changed(content, login_key="\ud800"), "in PEM"),
        (lambda content: changed(content, login_key=[]), "in PEM"),
        (lambda content: b"[" * 4000, "in JSON"),
        (lambda content: content + b" " * 5000, "at most 4096 bytes"),
        (lambda content: signing_keys.write_private(signing_keys.draw(), None), "got a private one"),
        (lambda content: signing_keys.write_public(json.loads(content) and b"\x11" * 32), "got one key by itself"),
    ],
)
def test_anything_but_what_a_device_wrote_is_refused(spoil, says: str) -> None:
    with pytest.raises(UpdateError, match=says) as caught:
        device_keys.read(spoil(device_keys.write(some_keys())))
    assert str(caught.value).isprintable()


def test_a_private_login_key_of_another_kind_is_refused_without_a_word_of_it() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(b"correct horse battery")
    pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    for content in (
        other.private_bytes(*pkcs8, serialization.NoEncryption()),
        device_keys.draw_login().private_bytes(*pkcs8, hidden),
        signing_keys.write_private(signing_keys.draw(), None),
        # An X448 key of 32 bytes: found by fuzzing, OpenSSL answers it with an error of its own.
        b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VvBCIEIAu+3HdPT/aI35ch8mGoBYvh5gUsjvMhXkx8t8VewdNs\n"
        b"-----END PRIVATE KEY-----\n",
        b"",
    ):
        with pytest.raises(UpdateError) as caught:
            device_keys.read_login(content)
        assert str(caught.value) == "expected a P-384 private key in PEM (PKCS8)"
        assert caught.value.__context__ is None
