"""Every message as bytes and back: one form for each, every field in its range, other versions told apart."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.errors import ProtocolError, UpdateError
from fedmini.secagg import wire
from fedmini.secagg.messages import (
    MAX_DEVICES,
    VERSION,
    Advert,
    Agreement,
    Context,
    Invitation,
    KeyList,
    MaskedVector,
    Message,
    Outcome,
    Revealed,
    SealedShares,
    Unmasking,
    Work,
)
from fedmini.secagg.trust import MAX_REVOKED, Certificate, Revocations
from tests.secagg.any_message import KINDS, MESSAGES, REQUESTS, messages

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_request = pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
some = settings(max_examples=30)
MAX_BYTES = 2**16


def decode(content: bytes, kind: type[Message]) -> Message:
    return wire.decode(content, kind, MAX_BYTES)


def packed(tree: Any) -> bytes:
    return msgpack.packb(tree, use_bin_type=True)


def tree_of(message: Message) -> list[Any]:
    """The arrays and plain values of a message, to be changed."""
    return msgpack.unpackb(wire.encode(message), use_list=True)


# One form for each message


@every_kind
@some
@given(data=st.data())
def test_a_message_comes_back_as_it_was(kind, data):
    message = data.draw(MESSAGES[kind])
    content = wire.encode(message)
    assert wire.decode(content, kind, len(content)) == message
    assert content[1:3] == bytes([VERSION, 1 + KINDS.index(kind)])


@every_request
@some
@given(data=st.data())
def test_a_request_is_told_from_the_four_others(kind, data):
    message = data.draw(MESSAGES[kind])
    content = wire.encode(message)
    assert wire.decode_request(content, len(content)) == message
    assert wire.is_invitation(content) == (kind is Invitation)


@given(messages, messages)
def test_equal_messages_have_equal_bytes_and_others_have_others(one, other):
    assert wire.encode(one) == wire.encode(dataclasses.replace(one))
    assert (wire.encode(one) == wire.encode(other)) == (type(one) is type(other) and one == other)


@given(messages, st.data())
def test_a_changed_byte_is_refused_or_makes_another_message(message, data):
    content = bytearray(wire.encode(message))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(content), type(message))
    except (UpdateError, ProtocolError):
        return
    assert found != message and wire.encode(found) == content


def forms(tree: Any) -> Iterator[bytes]:
    """The whole tree once for each of its nodes, with that node alone in MessagePack's longest form."""
    if isinstance(tree, list):
        parts = [packed(item) for item in tree]
        short = packed(tree)[: len(packed(tree)) - sum(map(len, parts))]
        yield b"\xdd" + len(tree).to_bytes(4, "big") + b"".join(parts)
        for place, item in enumerate(tree):
            for form in forms(item):
                yield short + b"".join(parts[:place]) + form + b"".join(parts[place + 1 :])
    elif isinstance(tree, int):
        yield b"\xcf" + tree.to_bytes(8, "big")
        yield b"\xd3" + tree.to_bytes(8, "big")
    elif isinstance(tree, str):
        yield b"\xdb" + len(tree.encode()).to_bytes(4, "big") + tree.encode()
    elif isinstance(tree, bytes):
        yield b"\xc6" + len(tree).to_bytes(4, "big") + tree


@every_kind
@settings(max_examples=10)
@given(data=st.data())
def test_another_encoding_of_the_same_message_is_refused(kind, data):
    message = data.draw(MESSAGES[kind])
    content, tree = wire.encode(message), tree_of(message)
    for form in forms(tree):
        assert msgpack.unpackb(form) == tree and form != content
        with pytest.raises(UpdateError, match="one form"):
            decode(form, kind)


@given(messages, st.binary(min_size=1, max_size=8))
def test_what_comes_after_or_before_a_message_is_refused(message, more):
    content = wire.encode(message)
    for longer in (content + more, more + content, content + content):
        with pytest.raises((UpdateError, ProtocolError)):
            decode(longer, type(message))


@given(messages, st.data())
def test_a_message_that_was_cut_is_refused(message, data):
    content = wire.encode(message)
    with pytest.raises(UpdateError, match="cut or changed"):
        decode(content[: data.draw(st.integers(0, len(content) - 1))], type(message))


# Kinds and versions


@every_kind
def test_a_message_of_another_kind_is_refused_by_name(kind):
    for other in KINDS:
        if other is not kind:
            with pytest.raises(UpdateError, match=f"a message of kind {kind.__name__}, got another"):
                decode(wire.encode(EXAMPLES[other]), kind)


def test_an_answer_is_no_request():
    for kind in set(KINDS) - set(REQUESTS):
        content = wire.encode(EXAMPLES[kind])
        with pytest.raises(UpdateError, match=r"^kind: |a request of one of the five stages"):
            wire.decode_request(content, MAX_BYTES)
        assert not wire.is_invitation(content)


@pytest.mark.parametrize("number", [0, 11, 255, -1, 2**40, None, "Advert", b"\x01", [1], 1.5])
def test_a_kind_that_there_is_none_of_is_refused(number):
    for message in EXAMPLES.values():
        tree = tree_of(message)
        tree[1] = number
        with pytest.raises(UpdateError, match=f"^kind: |a message of kind {type(message).__name__}"):
            decode(packed(tree), type(message))
        with pytest.raises(UpdateError, match=r"^kind: |a request of one of the five stages"):
            wire.decode_request(packed(tree), MAX_BYTES)


@every_kind
@pytest.mark.parametrize("kind_of_number", [float, bool])
def test_a_kind_that_is_only_equal_to_its_number_is_refused(kind, kind_of_number):
    tree = tree_of(EXAMPLES[kind])
    tree[1] = kind_of_number(tree[1])
    for read in (lambda content: decode(content, kind), lambda content: wire.decode_request(content, MAX_BYTES)):
        with pytest.raises(UpdateError):
            read(packed(tree))


versions = st.integers(-(2**63), 2**64 - 1).filter(lambda version: version != VERSION)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=40) | st.binary(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


@given(messages, versions, st.lists(plain, max_size=4))
def test_another_version_says_which_side_to_update_whatever_else_it_holds(message, version, fields):
    _, kind, *values = tree_of(message)
    to_update = "this side" if version > VERSION else "the other side"
    for tree in ([version, kind, *values], [version, kind, *values, *fields], [version, kind, *fields], [version]):
        for read in (
            lambda tree: decode(packed(tree), type(message)),
            lambda tree: wire.decode_request(packed(tree), 2**16),
        ):
            with pytest.raises(
                ProtocolError, match=f"speaks version {version} .* version {VERSION}: update {to_update}$"
            ):
                read(tree)


def test_a_newer_version_that_uses_what_this_one_does_not_is_still_told_by_its_version():
    # Maps, extension types and longer names are nothing that version 1 reads: but all that matters is the 2 in front.
    for content in ({"round": 3}, "a" * 1000, msgpack.ExtType(1, b"x" * 20), msgpack.Timestamp(1), [[[[[[[[1]]]]]]]]):
        for kind in KINDS:
            with pytest.raises(ProtocolError, match="update this side"):
                decode(packed([VERSION + 1, 1, content]), kind)


@pytest.mark.parametrize("version", [True, False, None, "1", b"\x01", 1.0, [1]])
def test_a_version_that_is_no_number_is_refused(version):
    for message in EXAMPLES.values():
        tree = tree_of(message)
        tree[0] = version
        with pytest.raises(UpdateError, match=r"^version: |begin with the version"):
            decode(packed(tree), type(message))


@pytest.mark.parametrize(
    "content", [b"\x90", b"\x01", b"\xc0", b"\xa1a", b"\x80", b"\xc4\x01\x01", b"", b"\xc1", b"\xff"]
)
def test_what_is_no_array_or_an_empty_one_is_refused(content):
    for kind in KINDS:
        with pytest.raises(UpdateError):
            decode(content, kind)


@every_kind
def test_a_message_with_a_field_more_or_less_is_refused(kind):
    tree = tree_of(EXAMPLES[kind])
    for changed in (tree[:-1], [*tree, None], [*tree, tree[-1]], tree[:2], tree[:1]):
        with pytest.raises(UpdateError, match=rf"^{kind.__name__}: expected \d fields, got \d$|^kind: |^message: "):
            decode(packed(changed), kind)


# Fields

KEY, DIGEST, SIGNATURE, SEALED = b"\x11" * 32, b"\x22" * 32, b"\x33" * 64, b"\x44" * 80
_ADVERT = Advert(DIGEST, "a", KEY, KEY, Certificate("a", KEY, SIGNATURE), SIGNATURE)
_LISTED = (_ADVERT, dataclasses.replace(_ADVERT, sender="b"))
_REVOKED = Revocations(5, (b"\x01" * 32, b"\x02" * 32), SIGNATURE)
EXAMPLES: dict[type[Message], Message] = {
    Invitation: Invitation(Context("run", 1, 0, DIGEST, DIGEST, ("a", "b"))),
    Advert: _ADVERT,
    KeyList: KeyList(DIGEST, 2, _LISTED, _REVOKED),
    SealedShares: SealedShares(DIGEST, "a", DIGEST, b"\x55" * 128, (("b", SEALED), ("c", SEALED))),
    Work: Work(DIGEST, (("b", SEALED, SIGNATURE), ("c", SEALED, SIGNATURE)), b"model"),
    MaskedVector: MaskedVector(DIGEST, "a", b"\x66" * 30),
    Outcome: Outcome(DIGEST, ("a", "b"), ("c", "d")),
    Agreement: Agreement(DIGEST, "a", SIGNATURE),
    Unmasking: Unmasking(DIGEST, (("a", SIGNATURE), ("b", SIGNATURE))),
    Revealed: Revealed(DIGEST, "a", (("a", KEY), ("b", KEY)), (("c", KEY), ("d", KEY))),
}


def blobs(size: int) -> tuple[Any, ...]:
    return (b"", bytes(size - 1), bytes(size + 1), bytes(2 * size), "a" * size, None, 0, True, 1.5)


IDS = ("", "\n", "a\0b", "\u200b", "\ue000", "a\u2028", "\u00a0", b"abc", None, 1, True, "\u00e9" * 63 + "\n")
COUNTS = (-1, 2**31, 2**64 - 1, -(2**63), True, False, 1.0, None, "1", b"\x01")
THRESHOLDS = (0, MAX_DEVICES + 1, *COUNTS)
RECORDS = (None, 1, "a", b"abc", [], [None])
LISTS = (None, 0, "a", b"abc", True, 1.5)
LARGE = (None, 0, "a", [b"a"], True)

# What each field may not be, where it stands in the arrays, and the name that the refusal gives.
_ADVERT_RANGES = [
    ((0,), "session", blobs(32)), ((1,), "sender", IDS), ((2,), "mask_key", blobs(32)), ((3,), "share_key", blobs(32)),
    ((4,), "certificate", RECORDS), ((4, 0), "certificate.device_id", IDS), ((4, 1), "certificate.device_key", blobs(32)),
    ((4, 2), "certificate.signature", blobs(64)), ((5,), "signature", blobs(64)),
]  # fmt: skip
_ANSWER = [((2,), "session", blobs(32)), ((3,), "sender", IDS)]
RANGES: dict[type[Message], list[tuple[tuple[int, ...], str, tuple[Any, ...]]]] = {
    Invitation: [
        ((2,), "context", RECORDS), ((2, 0), "context.run_id", IDS), ((2, 1), "context.round_num", COUNTS),
        ((2, 2), "context.attempt", COUNTS), ((2, 3), "context.manifest_hash", blobs(32)),
        ((2, 4), "context.model_hash", blobs(32)), ((2, 5), "context.invited", LISTS), ((2, 5, 0), "context.invited", IDS),
        ((2, 5), "context.invited", (["b", "a"], ["a", "a"], ["a", "b", "a"], [f"{n:03d}" for n in range(151)])),
    ],
    Advert: [((2 + path[0], *path[1:]), name, wrong) for path, name, wrong in _ADVERT_RANGES],
    KeyList: [
        ((2,), "session", blobs(32)), ((3,), "threshold", THRESHOLDS), ((4,), "adverts", LISTS), ((4, 1), "adverts", RECORDS),
        *(((4, 1, *path), f"adverts.{name}", wrong) for path, name, wrong in _ADVERT_RANGES),
        ((4, 1, 1), "adverts", ("a", " ")),  # twice the same, and one that comes before
        ((5,), "revocations", RECORDS[1:]), ((5, 0), "revocations.sequence", COUNTS),
        ((5, 1), "revocations.device_keys", LISTS), ((5, 1, 1), "revocations.device_keys", blobs(32)),
        ((5, 1, 1), "revocations.device_keys", (b"\x01" * 32, b"\x00" * 32)), ((5, 2), "revocations.signature", blobs(64)),
    ],
    SealedShares: [
        *_ANSWER, ((4,), "seed_commitment", blobs(32)), ((5,), "share_commitments", (*LARGE, bytes(64 * 150 + 1))),
        ((6,), "sealed", LISTS), ((6, 1), "sealed", RECORDS), ((6, 1, 0), "sealed.device", IDS),
        ((6, 1, 0), "sealed", ("a", "b")), ((6, 1, 1), "sealed.sealed", blobs(80)),
    ],
    Work: [
        ((2,), "session", blobs(32)), ((3,), "shares", LISTS), ((3, 1), "shares", RECORDS),
        ((3, 1, 0), "shares.device", IDS), ((3, 1, 0), "shares", ("a", "b")), ((3, 1, 1), "shares.sealed", blobs(80)),
        ((3, 1, 2), "shares.commitments", blobs(64)), ((4,), "model", LARGE),
    ],
    MaskedVector: [*_ANSWER, ((4,), "packed", LARGE)],
    Outcome: [
        ((2,), "session", blobs(32)),
        *(((place,), name, LISTS) for place, name in ((3, "survivors"), (4, "dropped"))),
        *(((place, 0), name, IDS) for place, name in ((3, "survivors"), (4, "dropped"))),
        ((3, 1), "survivors", ("a", " ")), ((4, 1), "dropped", ("c", " ")),
    ],
    Agreement: [*_ANSWER, ((4,), "signature", blobs(64))],
    Unmasking: [
        ((2,), "session", blobs(32)), ((3,), "agreements", LISTS), ((3, 1), "agreements", RECORDS),
        ((3, 1, 0), "agreements.device", IDS), ((3, 1, 0), "agreements", ("a", " ")),
        ((3, 1, 1), "agreements.signature", blobs(64)),
    ],
    Revealed: [
        *_ANSWER,
        *(((place,), name, LISTS) for place, name in ((4, "seed_shares"), (5, "key_shares"))),
        *(((place, 1), name, RECORDS) for place, name in ((4, "seed_shares"), (5, "key_shares"))),
        *(((place, 1, 0), f"{name}.device", IDS) for place, name in ((4, "seed_shares"), (5, "key_shares"))),
        *(((place, 1, 1), f"{name}.share", blobs(32)) for place, name in ((4, "seed_shares"), (5, "key_shares"))),
        ((4, 1, 0), "seed_shares", ("a", " ")), ((5, 1, 0), "key_shares", ("c", " ")),
    ],
}  # fmt: skip


def put(tree: list[Any], path: tuple[int, ...], value: Any) -> bytes:
    """The message with another value in one place."""
    at = tree
    for place in path[:-1]:
        at = at[place]
    at[path[-1]] = value
    return packed(tree)


def field_cases() -> Iterator[Any]:
    for kind, rows in RANGES.items():
        for path, name, wrong in rows:
            yield pytest.param(kind, path, name, wrong, id=f"{kind.__name__}.{name}")


@pytest.mark.parametrize(("kind", "path", "name", "wrong"), [*field_cases()])
def test_a_field_out_of_its_range_is_refused_by_name(kind, path, name, wrong):
    assert decode(packed(tree_of(EXAMPLES[kind])), kind) == EXAMPLES[kind]
    for value in wrong:
        with pytest.raises(UpdateError, match=rf"^{kind.__name__}\.{name}: expected "):
            decode(put(tree_of(EXAMPLES[kind]), path, value), kind)


def test_every_field_of_every_message_has_its_wrong_values():
    for kind, rows in RANGES.items():
        named = {name.partition(".")[0] for _, name, _ in rows}
        assert named == {field.name for field in dataclasses.fields(kind)}


def leaves(tree: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if path:
        yield path
    if isinstance(tree, list):
        for place, item in enumerate(tree):
            yield from leaves(item, (*path, place))


@every_kind
@pytest.mark.parametrize(
    "value",
    ["a" * 129, "\u00e9" * 65, {}, {"a": 1}, {1: 2}, [0], [0] * 5000, msgpack.ExtType(5, b""), msgpack.Timestamp(7)],
    ids=[
        "129 bytes",
        "130 bytes",
        "map",
        "map of one",
        "map of numbers",
        "a number in a list",
        "5000 items",
        "extension",
        "time",
    ],
)
def test_what_no_field_of_any_message_is_refused_anywhere(kind, value):
    for path in leaves(tree_of(EXAMPLES[kind])):
        if path > (1,):  # behind the version and the kind
            with pytest.raises(UpdateError):
                decode(put(tree_of(EXAMPLES[kind]), path, value), kind)


@pytest.mark.parametrize("text", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf"])
def test_a_name_that_is_not_utf_8_is_refused(text):
    content = wire.encode(EXAMPLES[Agreement]).replace(b"\xa1a", bytes([0xA0 + len(text)]) + text)
    with pytest.raises(UpdateError):
        decode(content, Agreement)


def test_a_refusal_says_nothing_of_what_the_message_held():
    # An answer may be anything: neither the bytes of a field nor a name that somebody made up goes into a log.
    for kind, rows in RANGES.items():
        for path, name, _ in rows:
            with pytest.raises(UpdateError) as refused:
                decode(put(tree_of(EXAMPLES[kind]), path, "secret\n"), kind)
            assert "secret" not in str(refused.value) and "\n" not in str(refused.value), (kind, name)


# Sizes


@given(messages)
def test_a_message_of_just_the_limit_is_read_and_one_more_byte_is_not(message):
    content = wire.encode(message)
    assert wire.decode(content, type(message), len(content)) == message
    with pytest.raises(UpdateError, match=f"at most {len(content) - 1} bytes, got {len(content)}"):
        wire.decode(content, type(message), len(content) - 1)


def longest_names() -> list[str]:
    return [f"{index:03d}".ljust(128, "x") for index in range(MAX_DEVICES)]


def test_the_largest_answers_of_a_hundred_and_fifty_devices_fit():
    names = longest_names()
    peers = tuple((name, SEALED) for name in names[1:])
    shares = tuple((name, KEY) for name in names)
    for num_coordinates in (0, 10, 184_320):
        most = wire.max_answer_bytes(num_coordinates, 24)
        for answer in (
            Advert(DIGEST, names[0], KEY, KEY, Certificate(names[0], KEY, SIGNATURE), SIGNATURE),
            SealedShares(DIGEST, names[0], DIGEST, bytes(64 * MAX_DEVICES), peers),
            MaskedVector(DIGEST, names[0], bytes(3 * num_coordinates)),
            Agreement(DIGEST, names[0], SIGNATURE),
            Revealed(DIGEST, names[0], shares, ()),
            Revealed(DIGEST, names[0], shares[:100], shares[100:]),
        ):
            assert wire.decode(wire.encode(answer), type(answer), most) == answer
    assert wire.max_answer_bytes(184_320, 24) < 1.1 * 3 * 184_320


def test_the_largest_requests_to_a_hundred_and_fifty_devices_fit():
    names = longest_names()
    adverts = tuple(Advert(DIGEST, name, KEY, KEY, Certificate(name, KEY, SIGNATURE), SIGNATURE) for name in names)
    revoked = Revocations(2**31 - 1, tuple(index.to_bytes(32, "big") for index in range(MAX_REVOKED)), SIGNATURE)
    for model_bytes in (0, 24, 737_280):
        most = wire.max_request_bytes(model_bytes)
        for request in (
            Invitation(Context(names[0], 2**31 - 1, 2**31 - 1, DIGEST, DIGEST, tuple(names))),
            KeyList(DIGEST, MAX_DEVICES, adverts, revoked),
            Work(DIGEST, tuple((name, SEALED, SIGNATURE) for name in names[1:]), bytes(model_bytes)),
            Outcome(DIGEST, tuple(names[:100]), tuple(names[100:])),
            Unmasking(DIGEST, tuple((name, SIGNATURE) for name in names)),
        ):
            assert wire.decode_request(wire.encode(request), most) == request


# Logs


@given(st.binary(min_size=8, max_size=40))
def test_the_repr_of_a_vector_or_of_shares_does_not_show_them(secret):
    shares = (("b", secret),)
    for message in (MaskedVector(DIGEST, "a", secret), Revealed(DIGEST, "a", shares, shares)):
        assert repr(message).startswith(f"{type(message).__name__}('a', ")
        assert repr(secret)[2:-1] not in repr(message) and len(repr(message)) < 60
