"""The root of trust: what a device believes because its operator signed it, and what nobody can make it believe.

Each attack that a check answers is a test; its twin switches that one check off and shows that the attack then works.
"""

import contextlib
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedmini import planning
from fedmini.errors import ProtocolError, UpdateError
from fedmini.secagg import rotation, signatures, signed_manifest, signing_keys, trust, trust_text
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.trust import Certificate, Identity, Revocations, Trust
from fedmini.types import Manifest
from tests import tiny_run
from tests.tiny_trust import an_operator, enrol, trust_in

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEYS = [signing_keys.public_bytes(Ed25519PrivateKey.from_private_bytes(bytes([number] * 32))) for number in range(1, 9)]


def public(key: Ed25519PrivateKey) -> bytes:
    return signing_keys.public_bytes(key)


def off(*_: object) -> None:
    """A check that is switched off."""


# Certificates


def test_a_device_that_the_operator_enrolled_is_believed() -> None:
    operator = an_operator()
    trust_in(operator).check_certificate(enrol(operator, "anna").certificate)


def test_a_device_that_the_server_invented_is_refused() -> None:
    server = an_operator()
    with pytest.raises(ProtocolError, match="device 'sybil' is not signed by the operator key"):
        trust_in(an_operator()).check_certificate(enrol(server, "sybil").certificate)


def test_twin_without_the_check_of_signatures_an_invented_device_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "check_issued", off)
    trust_in(an_operator()).check_certificate(enrol(an_operator(), "sybil").certificate)


@pytest.mark.parametrize("change", [{"device_id": "bert"}, {"device_key": KEYS[0]}, {"signature": bytes(64)}])
def test_a_certificate_speaks_for_one_device_and_one_key(change: dict[str, object]) -> None:
    operator = an_operator()
    with pytest.raises(ProtocolError, match="not signed"):
        trust_in(operator).check_certificate(replace(enrol(operator, "anna").certificate, **change))


@pytest.mark.parametrize(
    "change",
    [{"device_id": ""}, {"device_id": "x" * 129}, {"device_id": "a\nb"}, {"device_key": b"short"}, {"signature": None}],
)
def test_a_malformed_certificate_is_refused(change: dict[str, object]) -> None:
    operator = an_operator()
    with pytest.raises(ProtocolError, match="malformed"):
        trust_in(operator).check_certificate(replace(enrol(operator, "anna").certificate, **change))


def test_what_was_signed_for_one_purpose_serves_no_other() -> None:
    operator = an_operator()
    signature = signatures.sign(operator, "rotation", "anna", KEYS[0])
    with pytest.raises(ProtocolError, match="not signed"):
        trust_in(operator).check_certificate(Certificate("anna", KEYS[0], signature))


def test_a_certificate_is_verified_once_and_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, asked = an_operator(), []
    really = signatures.is_valid
    monkeypatch.setattr(trust.signatures, "is_valid", lambda *args: asked.append(args) or really(*args))
    monkeypatch.setattr(trust, "MAX_REMEMBERED", 2)
    believed, devices = trust_in(operator), [enrol(operator, name).certificate for name in ("a", "b", "c")]
    for certificate in (devices[0], devices[1], devices[0], devices[1]):
        believed.check_certificate(certificate)
    assert len(asked) == 2
    believed.check_certificate(devices[2])  # puts the oldest out
    believed.check_certificate(devices[1])
    assert len(asked) == 3
    believed.check_certificate(devices[0])
    assert len(asked) == 4


def forged_with_a_small_order_key() -> tuple[bytes, bytes]:
    """The neutral point as a public key: R = that point and S = 0 then sign anything."""
    neutral = b"\x01" + bytes(31)
    return neutral, neutral + bytes(32)


def test_a_key_that_anybody_can_sign_with_is_not_enrolled() -> None:
    key, _ = forged_with_a_small_order_key()
    for weak in (key, bytes(32), key[:-1] + b"\x80", b"\xee" + b"\xff" * 30 + b"\x7f"):
        with pytest.raises(UpdateError, match="small order"):
            trust.certify(OPERATOR, "anna", weak)
    signed = signatures.sign(OPERATOR, "certificate", "anna", key)
    with pytest.raises(ProtocolError, match="malformed"):
        trust_in(OPERATOR).check_certificate(Certificate("anna", key, signed))


def test_twin_without_the_check_of_keys_anybody_signs_as_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing_keys, "is_usable", lambda key: True)
    key, forged = forged_with_a_small_order_key()
    certificate = trust.certify(OPERATOR, "anna", key)
    trust_in(OPERATOR).check_certificate(certificate)
    assert signatures.is_valid(key, forged, "advert", "whatever somebody else wants to say")


# Revocations


def test_a_revoked_device_is_refused_though_it_was_believed_before() -> None:
    operator = an_operator()
    anna, bert = enrol(operator, "anna").certificate, enrol(operator, "bert").certificate
    believed = trust_in(operator)
    believed.check_certificate(anna)
    believed = believed.updated(trust.revoke(operator, None, [anna.device_key]))
    believed.check_certificate(bert)
    with pytest.raises(ProtocolError, match="'anna' was revoked"):
        believed.check_certificate(anna)


def test_twin_without_the_check_of_revocations_a_revoked_device_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "check_not_revoked", off)
    operator = an_operator()
    anna = enrol(operator, "anna").certificate
    trust_in(operator).updated(trust.revoke(operator, None, [anna.device_key])).check_certificate(anna)


def two_lists(operator: Ed25519PrivateKey) -> tuple[Revocations, Revocations]:
    first = trust.revoke(operator, None, [KEYS[0]])
    return first, trust.revoke(operator, first, [KEYS[1]])


def test_lists_of_revocations_are_numbered_and_grow() -> None:
    first, second = two_lists(OPERATOR)
    assert (first.sequence, second.sequence) == (1, 2)
    assert second.device_keys == tuple(sorted(KEYS[:2]))
    believed = trust_in(OPERATOR)
    assert believed.revocations_sequence == 0
    assert believed.updated(first).updated(second).revocations_sequence == 2
    believed = believed.updated(second)  # one may be missed
    assert believed.updated(second) is believed


def test_a_server_that_plays_back_an_old_list_is_refused() -> None:
    first, second = two_lists(OPERATOR)
    with pytest.raises(ProtocolError, match="later than number 2, got another list with number 1: the server plays"):
        trust_in(OPERATOR).updated(second).updated(first)


def test_twin_without_the_check_of_numbers_an_old_list_brings_a_revoked_device_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trust, "check_follows", off)
    operator = an_operator()
    anna = enrol(operator, "anna").certificate
    old = trust.revoke(operator, None, [KEYS[0]])
    believed = trust_in(operator).updated(trust.revoke(operator, old, [anna.device_key]))
    believed.updated(old).check_certificate(anna)


def test_two_lists_with_one_number_and_a_list_that_forgets_are_refused() -> None:
    """As an operator makes them that was restored from a backup: devices hold to what they have seen."""
    first, second = two_lists(OPERATOR)
    forked = trust.revoke(OPERATOR, first, [KEYS[2]])
    with pytest.raises(ProtocolError, match="another list with number 2"):
        trust_in(OPERATOR).updated(second).updated(forked)
    with pytest.raises(ProtocolError, match="a revoked key stays revoked"):
        trust_in(OPERATOR).updated(second).updated(trust.revoke(OPERATOR, forked, [KEYS[3]]))


@pytest.mark.parametrize("change", [{"sequence": 3}, {"device_keys": ()}, {"device_keys": (KEYS[5],)}])
def test_a_list_that_the_operator_did_not_sign_is_refused(change: dict[str, object]) -> None:
    changed = replace(two_lists(OPERATOR)[1], **change)
    with pytest.raises(ProtocolError, match="not signed by the operator key"):
        trust_in(OPERATOR).updated(changed)
    with pytest.raises(ProtocolError, match="not signed by the operator key"):
        Trust(public(OPERATOR), changed)


def test_twin_without_the_check_of_lists_a_server_shuts_out_whom_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "check_revocations", off)
    operator = an_operator()
    anna = enrol(operator, "anna").certificate
    believed = trust_in(operator).updated(trust.revoke(an_operator(), None, [anna.device_key]))
    with pytest.raises(ProtocolError, match="revoked"):
        believed.check_certificate(anna)


@pytest.mark.parametrize("keys", [[KEYS[0], KEYS[0]], sorted(KEYS[:3], reverse=True)])
def test_a_list_that_is_not_strictly_sorted_is_refused_though_signed(keys: list[bytes]) -> None:
    signed = Revocations(1, tuple(keys), signatures.sign(OPERATOR, "revocations", 1, keys))
    with pytest.raises(ProtocolError, match="strictly sorted"):
        trust_in(OPERATOR).updated(signed)


def test_only_so_many_can_be_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "MAX_REVOKED", 2)
    with pytest.raises(UpdateError, match="at most 2"):
        trust.revoke(OPERATOR, None, KEYS[:3])


# Rotations


def a_chain(*operators: Ed25519PrivateKey) -> tuple[Rotation, ...]:
    return tuple(rotation.rotate(old, public(new)) for old, new in pairwise(operators))


def test_a_new_operator_key_is_followed_from_any_key_before_it() -> None:
    first, second, third = an_operator(), an_operator(), an_operator()
    for pinned in (first, second, third):
        assert rotation.follow(public(pinned), a_chain(first, second, third)) == public(third)
    assert rotation.follow(public(first), ()) == public(first)


def test_a_new_key_that_the_old_one_did_not_sign_is_refused() -> None:
    operator, server = an_operator(), an_operator()
    forged = replace(a_chain(server, an_operator())[0], old_key=public(operator))
    with pytest.raises(ProtocolError, match="not signed with the key that it leaves"):
        rotation.follow(public(operator), [forged])


def test_twin_without_the_check_of_the_chain_the_server_makes_itself_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "check_chain", off)
    operator, server = an_operator(), an_operator()
    forged = Rotation(public(operator), public(server), bytes(64))
    believed = trust_in(operator).rotated([forged])
    believed.check_certificate(enrol(server, "sybil").certificate)


def test_a_chain_has_no_fork_gap_or_circle() -> None:
    first, second, third, fourth = (an_operator() for _ in range(4))
    fork = (*a_chain(first, second), *a_chain(first, third))
    gap = (*a_chain(first, second), *a_chain(third, fourth))
    circle = a_chain(first, second, third, first)
    for broken in (fork, gap, circle, tuple(reversed(a_chain(first, second, third)))):
        with pytest.raises(ProtocolError, match="not one chain"):
            rotation.follow(public(first), broken)


def test_who_finds_an_old_key_does_not_lead_back_who_has_left_it() -> None:
    old, new, thief = an_operator(), an_operator(), an_operator()
    believed = trust_in(old).rotated(a_chain(old, new))
    with pytest.raises(ProtocolError, match="don't go through the key"):
        believed.rotated(a_chain(old, thief))


def test_a_chain_ends_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "MAX_ROTATIONS", 1)
    with pytest.raises(ProtocolError, match="at most 1 rotations"):
        rotation.follow(KEYS[0], a_chain(an_operator(), an_operator(), an_operator()))


@pytest.mark.parametrize("new_key", [public(OPERATOR), b"\x01" + bytes(31), b"short"])
def test_a_key_that_can_not_follow_is_not_signed(new_key: bytes) -> None:
    with pytest.raises(UpdateError, match="to follow"):
        rotation.rotate(OPERATOR, new_key)


def test_after_a_rotation_certificates_of_the_old_key_count_no_more_and_of_the_new_do() -> None:
    old, new = an_operator(), an_operator()
    anna = enrol(old, "anna").certificate
    believed = trust_in(old)
    believed.check_certificate(anna)
    believed = believed.rotated(a_chain(old, new))
    with pytest.raises(ProtocolError, match="not signed"):
        believed.check_certificate(anna)
    believed.check_certificate(trust.certify(new, "anna", anna.device_key))
    assert believed.rotated(a_chain(old, new)) is believed


def test_what_was_revoked_before_a_rotation_stays_revoked_after_it() -> None:
    old, new = an_operator(), an_operator()
    first, second = two_lists(old)
    believed, chain = trust_in(old).updated(second), a_chain(old, new)
    for forgotten in (None, trust.revoke(new, None, []), trust.revoke(new, first, [KEYS[4]])):
        with pytest.raises(ProtocolError):
            believed.rotated(chain, forgotten)
    with pytest.raises(ProtocolError, match="not signed"):
        believed.rotated(chain, trust.revoke(old, second, []))
    after = believed.rotated(chain, trust.revoke(new, second, []))
    assert (after.operator_key, after.revocations_sequence) == (public(new), 3)
    with pytest.raises(ProtocolError, match="revoked"):
        after.check_certificate(trust.certify(new, "anna", KEYS[1]))


# Manifests


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    base = planning.Base("ab" * 32, (("x.lora_B.weight", (64, 4)),))
    return planning.make_manifest(tiny_run.config(tmp_path_factory.mktemp("trust")), "run", base, None)


def tampered(manifest: Manifest) -> Manifest:
    unit = manifest.release.example
    assert unit is not None
    return replace(manifest, release=replace(manifest.release, example=replace(unit, clip_norm=100 * unit.clip_norm)))


def test_a_manifest_counts_as_the_operator_signed_it(manifest: Manifest) -> None:
    signed = signed_manifest.sign_manifest(OPERATOR, manifest, None)
    signed_manifest.check_manifest(trust_in(OPERATOR), signed)
    for changed in (replace(signed, manifest=tampered(manifest)), replace(signed, min_revocations=1)):
        with pytest.raises(ProtocolError, match="changed after it was signed"):
            signed_manifest.check_manifest(trust_in(OPERATOR), changed)
    with pytest.raises(ProtocolError, match="it needs the rotation"):
        signed_manifest.check_manifest(trust_in(OPERATOR), signed_manifest.sign_manifest(an_operator(), manifest, None))


def test_a_server_that_names_the_right_key_but_has_another_is_refused(manifest: Manifest) -> None:
    forged = replace(
        signed_manifest.sign_manifest(an_operator(), tampered(manifest), None), operator_key=public(OPERATOR)
    )
    with pytest.raises(ProtocolError, match="not the operator's"):
        signed_manifest.check_manifest(trust_in(OPERATOR), forged)


def test_twin_without_the_check_of_the_manifests_signature_a_server_clips_100_times_higher(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signed_manifest, "check_manifest_signature", off)
    signed = signed_manifest.sign_manifest(OPERATOR, manifest, None)
    signed_manifest.check_manifest(trust_in(OPERATOR), replace(signed, manifest=tampered(manifest)))


def test_a_manifest_signed_after_a_revocation_asks_for_it_and_keeps_its_hash(manifest: Manifest) -> None:
    revocations = trust.revoke(OPERATOR, None, [KEYS[0]])
    before = signed_manifest.sign_manifest(OPERATOR, manifest, None)
    after = signed_manifest.sign_manifest(OPERATOR, manifest, revocations)
    assert before.manifest.hash == after.manifest.hash
    with pytest.raises(ProtocolError, match="revocations number 1 or later, this device has seen number 0"):
        signed_manifest.check_manifest(trust_in(OPERATOR), after)
    signed_manifest.check_manifest(trust_in(OPERATOR).updated(revocations), after)


def test_twin_without_the_check_of_freshness_a_server_keeps_a_revocation_back(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signed_manifest, "check_freshness", off)
    anna = enrol(OPERATOR, "anna").certificate
    signed = signed_manifest.sign_manifest(OPERATOR, manifest, trust.revoke(OPERATOR, None, [anna.device_key]))
    believed = trust_in(OPERATOR)
    signed_manifest.check_manifest(believed, signed)
    believed.check_certificate(anna)


# As text


def texts(manifest: Manifest) -> dict[str, tuple[object, bytes]]:
    certificate, revocations = trust.certify(OPERATOR, "anna", KEYS[0]), two_lists(OPERATOR)[1]
    chain = a_chain(OPERATOR, an_operator(), an_operator())
    signed = signed_manifest.sign_manifest(OPERATOR, manifest, revocations)
    return {
        "certificate": (certificate, trust_text.write_certificate(certificate)),
        "revocations": (revocations, trust_text.write_revocations(revocations)),
        "rotations": (chain, trust_text.write_rotations(chain)),
        "signed_manifest": (signed, trust_text.write_signed_manifest(signed)),
    }


KINDS = ("certificate", "revocations", "rotations", "signed_manifest")


def read(kind: str, content: bytes) -> object:
    return getattr(trust_text, f"read_{kind}")(content)


@pytest.mark.parametrize("kind", KINDS)
def test_each_record_has_one_form_as_text(kind: str, manifest: Manifest) -> None:
    record, content = texts(manifest)[kind]
    assert read(kind, content) == record
    values = json.loads(content)
    other_forms = [
        content[:-1],
        content + b"\n",
        json.dumps(values, indent=1).encode(),
        content.replace(b'"format"', b'"format":"x","format"', 1),
        content.decode().encode("utf-16"),
        json.dumps(values | {"extra": 1}, sort_keys=True, separators=(",", ":")).encode() + b"\n",
        json.dumps(values | {"format": "fedmini/other/v1"}, sort_keys=True, separators=(",", ":")).encode() + b"\n",
    ]
    for other in other_forms:
        assert other != content
        with pytest.raises(UpdateError):
            read(kind, other)
    for other_kind in set(KINDS) - {kind}:
        with pytest.raises(UpdateError, match="this is another, or of another version"):
            read(other_kind, content)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_changed_byte_is_refused_or_is_another_record(kind: str, manifest: Manifest, data: st.DataObject) -> None:
    record, content = texts(manifest)[kind]
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(UpdateError):
        assert read(kind, bytes(changed)) != record


@pytest.mark.parametrize("kind", KINDS)
@given(content=st.binary(max_size=200))
def test_whatever_bytes_come_are_refused_in_our_own_words(kind: str, content: bytes) -> None:
    with pytest.raises(UpdateError):
        read(kind, content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([KEYS[0].hex()]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_whatever_a_field_holds_is_refused_in_our_own_words(kind: str, manifest: Manifest, data: st.DataObject) -> None:
    values = json.loads(texts(manifest)[kind][1])
    name = data.draw(st.sampled_from(sorted(values)))
    values[name] = data.draw(JSON_VALUES)
    content = json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    with contextlib.suppress(UpdateError):
        assert getattr(trust_text, f"write_{kind}")(read(kind, content)) == content


def test_lists_in_lists_and_endless_numbers_are_refused(manifest: Manifest) -> None:
    deep = b'{"format":' + b"[" * 100_000
    signed = texts(manifest)["signed_manifest"][1]
    head = signed[: signed.index(b'"manifest":') + len(b'"manifest":')]
    tail = signed[signed.index(b',"min_revocations"') :]
    for content in (deep, b"9" * 100_000, *(head + b"[" * n + b"]" * n + tail for n in (500, 900, 990, 5000))):
        for kind in KINDS:
            with pytest.raises(UpdateError):
                read(kind, content)


def test_more_than_a_mebibyte_is_not_even_looked_at() -> None:
    with pytest.raises(UpdateError, match="at most 1048576 bytes"):
        trust_text.read_revocations(bytes(2**20 + 1))


def test_an_unsorted_list_is_refused_when_it_is_read() -> None:
    keys = sorted(KEYS[:2], reverse=True)
    with pytest.raises(UpdateError, match="sorted keys, each once"):
        trust_text.read_revocations(trust_text.write_revocations(Revocations(1, tuple(keys), bytes(64))))


# Private keys


@pytest.mark.parametrize("passphrase", [None, b"correct horse battery staple"])
def test_a_private_key_as_text_comes_back_with_its_passphrase_only(passphrase: bytes | None) -> None:
    content = signing_keys.write_private(OPERATOR, passphrase)
    assert public(signing_keys.read_private(content, passphrase)) == public(OPERATOR)
    assert signing_keys.is_encrypted(content) == (passphrase is not None)
    if passphrase is not None:
        for wrong in (None, b"", b"correct horse battery stable"):
            with pytest.raises(UpdateError, match="passphrase"):
                signing_keys.read_private(content, wrong)


def test_a_passphrase_that_is_guessed_in_a_day_is_refused() -> None:
    with pytest.raises(UpdateError, match="at least 16 bytes"):
        signing_keys.write_private(OPERATOR, b"fifteen letters")


@given(content=st.binary(max_size=300))
def test_whatever_stands_in_a_key_file_is_refused_in_our_own_words(content: bytes) -> None:
    for pem in (content, b"-----BEGIN PRIVATE KEY-----\n" + content + b"\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(UpdateError):
            signing_keys.read_private(pem, b"passphrase")
    for pem in (content, b"-----BEGIN PUBLIC KEY-----\n" + content + b"\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(UpdateError):
            signing_keys.read_public(pem)


def test_a_public_key_as_text_comes_back_and_a_private_one_is_no_public_one() -> None:
    assert signing_keys.read_public(signing_keys.write_public(KEYS[0])) == KEYS[0]
    with pytest.raises(UpdateError, match="got a private one"):
        signing_keys.read_public(signing_keys.write_private(OPERATOR, None))
    with pytest.raises(UpdateError, match="expected an Ed25519 public key"):
        signing_keys.read_public(signing_keys.write_public(b"\x01" + bytes(31)))


def test_no_private_key_is_in_a_repr_or_in_an_error() -> None:
    secret = bytes(range(32))
    pem = signing_keys.write_private(OPERATOR, None)
    shown = [repr(Identity(OPERATOR, trust.certify(OPERATOR, "anna", KEYS[0]))), repr(trust_in(OPERATOR))]
    for broken in (pem[:-30], pem.replace(b"PRIVATE", b"PUBLIC"), pem.replace(b"MC4", b"MC5")):
        for reader in (lambda content: signing_keys.read_private(content, None), signing_keys.read_public):
            with pytest.raises(UpdateError) as caught:
                reader(broken)
            assert caught.value.__cause__ is None
            shown.append(str(caught.value))
    body = pem.decode().splitlines()[1]
    for text in shown:
        assert body[20:40] not in text and secret.hex()[:16] not in text and repr(secret)[5:25] not in text
