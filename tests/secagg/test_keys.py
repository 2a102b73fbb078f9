"""Key agreement, derivation and sealing against published vectors; what each derived thing is bound to; erasing."""

import copy
import hashlib
import hmac
import os
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.errors import ProtocolError
from fedmini.secagg import bindings, checks, keys, shamir
from fedmini.secagg.bindings import Secrets
from fedmini.secagg.keys import SecretKey

P = 2**255 - 19
BASE_POINT = (9).to_bytes(32, "little")
fields = st.lists(st.binary(max_size=40), max_size=4).map(tuple)
purposes = st.text("abc/", min_size=1, max_size=6)


def stream(seed: int) -> shamir.Random:
    return random.Random(seed).randbytes


# RFC 7748, section 5.2
@pytest.mark.parametrize(
    ("scalar", "u", "product"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ],
)
def test_agreement_is_x25519_as_rfc_7748_has_it(scalar, u, product):
    assert SecretKey(bytes.fromhex(scalar)).agree(bytes.fromhex(u)).hex() == product


def test_a_thousand_agreements_in_a_row_end_where_rfc_7748_says():
    scalar, u = BASE_POINT, BASE_POINT
    for number in range(1, 1001):
        scalar, u = SecretKey(scalar).agree(u), scalar
        if number == 1:
            assert scalar.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_two_parties_find_what_rfc_7748_says_they_have_in_common():
    alice = SecretKey(bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = SecretKey(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public().hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public().hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    common = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert alice.agree(bob.public()).hex() == bob.agree(alice.public()).hex() == common


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_two_parties_always_find_the_same(first, second):
    one, other = SecretKey.draw(stream(first)), SecretKey.draw(stream(second))
    assert one.agree(other.public()) == other.agree(one.public())
    assert (one.public() == other.public()) == (first == second)


def test_a_drawn_key_can_be_shared_and_comes_back_whole():
    key = SecretKey.draw(os.urandom)
    shares = shamir.split(key.scalar, 3, 2, os.urandom)
    back = SecretKey(shamir.combine({1: shares[0], 3: shares[2]}, shamir.weights((1, 3))))
    assert back.public() == key.public()


@pytest.mark.parametrize("public", sorted(checks.SMALL_ORDER), ids=lambda public: public.hex()[:4] + public.hex()[-4:])
def test_a_key_of_small_order_is_refused(public):
    with pytest.raises(ProtocolError, match="small order"):
        SecretKey.draw(os.urandom).agree(public)


def test_the_list_of_small_orders_has_every_point_of_small_order_in_every_form():
    # A point of order 1, 2, 4 or 8 is brought to infinity by three doublings, on the curve and on its twist.
    def has_small_order(u: int) -> bool:
        x, z = u % P, 1
        for _ in range(3):
            square, product = (x * x - z * z) ** 2, x * z
            x, z = square % P, 4 * product * (x * x + 486662 * product + z * z) % P
        return z == 0

    listed = {int.from_bytes(public, "little") & (2**255 - 1) for public in checks.SMALL_ORDER}
    assert all(map(has_small_order, listed))
    # The curve has 8 such points and its twist 4, both in one circle: u is 0 (order 2, on both), 1 and -1 (order 4), or
    # one of two (order 8). A u below 19 can also be written with 2**255 - 19 added, and each with or without the top bit.
    assert len({u % P for u in listed}) == 5
    assert {u for u in range(P, 2**255) if has_small_order(u)} == {u for u in listed if u >= P} == {P, P + 1}
    assert len(checks.SMALL_ORDER) == 2 * (5 + 2)


@pytest.mark.parametrize("public", [b"", BASE_POINT[:-1], BASE_POINT + b"\0"])
def test_a_public_key_of_another_length_is_refused(public):
    with pytest.raises(ProtocolError):
        SecretKey.draw(os.urandom).agree(public)


# Erasing


def test_an_erased_key_is_overwritten_and_can_not_be_used():
    key = SecretKey(b"\x07" * 32)
    memory = key._scalar
    key.erase()
    assert memory == bytes(32) and key.scalar == b""
    for use in (key.public, lambda: key.agree(BASE_POINT)):
        with pytest.raises(ProtocolError, match="the key was erased"):
            use()
    key.erase()  # once more is fine


def test_a_key_keeps_its_own_copy_of_the_scalar():
    scalar = bytearray(b"\x07" * 32)
    key = SecretKey(scalar)
    keys.erase(scalar)
    assert key.scalar == b"\x07" * 32


@given(st.binary(max_size=80))
def test_erasing_overwrites_in_place(content):
    secret = bytearray(content)
    view = memoryview(secret)
    keys.erase(secret)
    assert bytes(view) == bytes(len(content))


def test_erasing_a_session_s_secrets_erases_all_three():
    secrets = Secrets(os.urandom)
    memories = (secrets.seed, secrets.mask_key._scalar, secrets.share_key._scalar)
    assert len({bytes(memory) for memory in memories}) == 3
    secrets.erase()
    assert all(memory == bytes(32) for memory in memories)
    assert (bytes(secrets.seed), secrets.mask_key.scalar, secrets.share_key.scalar) == (b"", b"", b"")


@pytest.mark.parametrize("secret", [SecretKey(b"\x07" * 32), Secrets(lambda size: b"\x07" * size)])
def test_a_secret_has_a_repr_that_says_nothing_and_is_never_copied_out(secret):
    assert repr(secret) == str(secret) == f"{type(secret).__name__}(...)"
    for copy_out in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never serialised"):
            copy_out(secret)
    assert not hasattr(secret, "__dict__")


# Derived keys


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt, one block."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def length_prefixed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@given(st.binary(min_size=32, max_size=32), purposes, fields)
def test_a_derived_key_is_hkdf_over_purpose_and_context(secret, purpose, context):
    info = length_prefixed(f"fedmini/{purpose}/v1".encode(), *context)
    assert keys.derive(secret, purpose, *context) == hkdf(secret, info)


@given(purposes, fields)
def test_a_commitment_is_sha_256_over_purpose_and_fields(purpose, content):
    expected = hashlib.sha256(length_prefixed(f"fedmini/{purpose}/v1".encode(), *content)).digest()
    assert keys.commit(purpose, *content) == expected


@given(purposes, fields, purposes, fields)
def test_two_different_contexts_never_give_the_same(purpose, context, other_purpose, other_context):
    is_same = (purpose, context) == (other_purpose, other_context)
    secret = b"\x01" * 32
    assert (keys.derive(secret, purpose, *context) == keys.derive(secret, other_purpose, *other_context)) == is_same
    assert (keys.commit(purpose, *context) == keys.commit(other_purpose, *other_context)) == is_same


def test_a_field_s_end_can_not_move():
    moved = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc")]
    assert len({keys.derive(bytes(32), "mask", *context) for context in moved}) == 5
    assert len({keys.commit("mask", *context) for context in moved}) == 5


SESSION, OTHER = b"\x01" * 32, b"\x02" * 32
SHARE = b"\x03" * 32


@pytest.mark.parametrize(
    ("bound", "arguments", "changes"),
    [
        (bindings.seed_mask_key, (SHARE, SESSION), (OTHER, OTHER)),
        (bindings.pair_mask_key, (SHARE, SESSION, "a", "b"), (OTHER, OTHER, "c", "c")),
        (bindings.sealing_key, (SHARE, SESSION, "a", "b"), (OTHER, OTHER, "b", "a")),
        (bindings.sealed_about, (SESSION, "a", "b"), (OTHER, "b", "a")),
        (bindings.commit_seed, (SESSION, "a", SHARE), (OTHER, "b", OTHER)),
        (bindings.commit_share, (SESSION, "a", "b", "seed", SHARE), (OTHER, "b", "a", "key", OTHER)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_derived_changes_with_each_thing_that_it_is_bound_to(bound, arguments, changes):
    changed = [
        bound(*arguments[:place], change, *arguments[place + 1 :]) for place, change in enumerate(changes)
    ]  # each argument by itself
    found = {bound(*arguments), *changed}
    assert len(found) == 1 + len(changes) and all(len(value) == 32 for value in found)


def test_each_purpose_has_its_own_keys():
    found = {
        bindings.seed_mask_key(SHARE, SESSION),
        bindings.pair_mask_key(SHARE, SESSION, "", ""),
        bindings.sealing_key(SHARE, SESSION, "", ""),
        bindings.commit_seed(SESSION, "", SHARE),
        bindings.commit_share(SESSION, "", "", "seed", SHARE),
    }
    assert len(found) == 5


def test_the_mask_of_a_pair_is_the_same_whichever_of_the_two_asks():
    one, other = (bindings.pair_mask_key(SHARE, SESSION, *names) for names in (("a", "b"), ("b", "a")))
    assert one == other


def test_an_erased_seed_masks_nothing():
    with pytest.raises(ProtocolError, match="was erased"):
        bindings.seed_mask_key(bytearray(), SESSION)


def test_the_two_directions_between_two_devices_change_places_together():
    assert bindings.sealing_key(SHARE, SESSION, "a", "b") != bindings.sealing_key(SHARE, SESSION, "b", "a")
    assert bindings.sealed_about(SESSION, "a", "b") != bindings.sealed_about(SESSION, "b", "a")
    both = bindings.commit_shares(SESSION, "a", "b", (SHARE, OTHER))
    assert both == (
        bindings.commit_share(SESSION, "a", "b", "seed", SHARE) + bindings.commit_share(SESSION, "a", "b", "key", OTHER)
    )


# Sealing


# "The Galois/Counter Mode of Operation", test cases 13 and 14: an AES-256 key, nonce and content of zeros
@pytest.mark.parametrize(
    ("content", "sealed"),
    [
        (b"", "530f8afbc74536b9a963b4f1c4cb738b"),
        (bytes(16), "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"),
    ],
)
def test_sealing_is_aes_256_gcm_with_a_nonce_of_zeros(content, sealed):
    assert keys.seal(bytes(32), content, b"").hex() == sealed


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=100), st.binary(max_size=40))
def test_what_was_sealed_comes_back(key, content, about):
    sealed = keys.seal(key, content, about)
    assert len(sealed) == len(content) + keys.TAG_BYTES
    assert keys.unseal(key, sealed, about) == content


@given(st.binary(max_size=70), st.data())
def test_one_changed_bit_anywhere_is_noticed(content, data):
    key, about = os.urandom(32), os.urandom(32)
    sealed = keys.seal(key, content, about)
    parts = [bytearray(key), bytearray(sealed), bytearray(about)]
    changed = data.draw(st.sampled_from(parts))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError, match="changed, or was meant for somebody else"):
        keys.unseal(*map(bytes, parts))


@pytest.mark.parametrize("length", range(keys.TAG_BYTES + 4))
def test_what_is_too_short_or_cut_is_noticed(length):
    sealed = keys.seal(bytes(32), b"four", b"about")
    with pytest.raises(ProtocolError, match="changed, or was meant for somebody else"):
        keys.unseal(bytes(32), sealed[:length], b"about")
