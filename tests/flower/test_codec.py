"""Envelopes survive the way through Flower's records, and nothing else passes for one."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedmini.errors import UpdateError
from fedmini.flower import codec, replies
from fedmini.flower.codec import Envelope
from tests import tiny_trust

FIELDS = st.dictionaries(
    st.text(max_size=8), st.none() | st.integers(-(2**60), 2**60) | st.text(max_size=20), max_size=4
)


@given(st.text(max_size=10), FIELDS, st.binary(max_size=200))
def test_an_envelope_comes_back_as_it_was(kind, fields, payload) -> None:
    found = codec.unpack(codec.pack(Envelope(kind, fields, payload)))
    assert (found.kind, found.fields, found.payload) == (kind, fields, payload)


@pytest.mark.parametrize("size", [0, 1, codec.PIECE_BYTES, codec.PIECE_BYTES + 1, 3 * codec.PIECE_BYTES])
def test_a_large_payload_travels_in_pieces_below_the_limit_of_the_public_port(size: int) -> None:
    payload = bytes(index % 251 for index in range(1000)) * (size // 1000 + 1)
    content = codec.pack(Envelope("k", {}, payload[:size]))
    assert max(len(record["bytes"]) for record in content.values()) <= codec.PIECE_BYTES
    assert codec.unpack(content).payload == payload[:size]
    assert len(content) + 2 <= codec.num_objects(size)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"fedmini": ConfigRecord({})}),
        RecordDict({"fedmini": ConfigRecord({"head": "no json", "bytes": b""})}),
        RecordDict({"fedmini": ConfigRecord({"head": "[" * 10_000, "bytes": b""})}),
        RecordDict({"fedmini": ConfigRecord({"head": '{"version":2,"kind":"k","fields":{},"bytes":0}', "bytes": b""})}),
        RecordDict({"fedmini": ConfigRecord({"head": '{"version":1,"kind":"k","fields":{},"bytes":9}', "bytes": b""})}),
        RecordDict(
            {
                "fedmini": ConfigRecord(
                    {"head": '{"version":1,"kind":"k","fields":{},"bytes":1000000000000000000}', "bytes": b""}
                )
            }
        ),
        RecordDict(
            {"fedmini": ConfigRecord({"head": '{"version":1,"kind":"k","fields":{"a":[1]},"bytes":0}', "bytes": b""})}
        ),
        RecordDict({"fedmini": ConfigRecord({"head": "x" * (codec.MAX_HEAD_BYTES + 1), "bytes": b""})}),
    ],
)
def test_anything_else_is_refused_and_takes_no_room(content: RecordDict) -> None:
    with pytest.raises(UpdateError, match="expected a message of fedmini's"):
        codec.unpack(content)


def test_an_envelopes_repr_shows_no_payload_and_no_field() -> None:
    assert repr(Envelope("answer", {"reason": "secret"}, b"secret")) == "Envelope('answer', 6 bytes)"


def test_an_answer_is_good_for_the_message_it_answers_and_from_the_device_that_was_asked() -> None:
    operator = tiny_trust.an_operator()
    anna = tiny_trust.enrol(operator, "anna")
    key = anna.certificate.device_key
    answer = replies.sign(anna, "message-1", Envelope("answer", {"stage": "SHARE"}, b"vector"))
    replies.check(key, "message-1", answer)
    replies.check(key, "message-1", codec.unpack(codec.pack(answer)))
    changed = [
        ("message-2", answer),
        ("message-1", replace(answer, payload=b"another")),
        ("message-1", replace(answer, kind="refusal")),
        ("message-1", replace(answer, fields={**answer.fields, "stage": "AGREE"})),
        ("message-1", replace(answer, fields={"stage": "SHARE"})),
        ("message-1", replace(answer, fields={**answer.fields, "signature": "no hex"})),
    ]
    for message_id, envelope in changed:
        with pytest.raises(UpdateError):
            replies.check(key, message_id, envelope)
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(UpdateError, match="not signed by the device that was asked"):
        replies.check(other, "message-1", answer)
