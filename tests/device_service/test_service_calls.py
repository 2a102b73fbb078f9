"""Calls to a real daemon over its socket: what a program in another language can do, and what it is told where it can't."""

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedmini import operator_keys
from fedmini.secagg import trust_text
from fedmini.types import Manifest
from tests.deployment import deployed
from tests.device_service import serving
from tests.device_service.serving import Client, Daemon, refused

SECRET = "thesecretword"  # what a person typed; nothing of it may be in a log or an error
FLOORS = "[device]\nlifetime_epsilon = 1000.0\nlifetime_delta = 1e-3\n"


@dataclass(frozen=True)
class Served:
    """A daemon, a client of it, the operator who may enrol its device, and a run that the operator signed."""

    daemon: Daemon
    client: Client
    operator: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """gRPC is asked to log all that it can."""
    folder = tmp_path_factory.mktemp("served")
    operator_keys.create(folder / "operator", None)
    manifest = deployed.planned(deployed.a_config(folder), folder)
    device = serving.a_folder(folder / "device", FLOORS)
    with operator_keys.opened(folder / "operator", lambda: b"") as operator:
        signed = trust_text.write_signed_manifest(operator.sign_manifest(manifest))
    (device / "offers").mkdir()
    (device / "offers" / f"{manifest.hash}.json").write_bytes(signed)  # as a server's offer is kept
    path = device / "device.sock"
    loud = {"GRPC_VERBOSITY": "DEBUG", "GRPC_TRACE": "all"}
    with serving.serving(device, "--socket", path, **loud) as daemon, Client(path) as client:
        yield Served(daemon, client, folder / "operator", manifest)


@pytest.fixture
def client(served: Served) -> Client:
    return served.client


def test_examples_are_kept_counted_and_forgotten(client: Client) -> None:
    client.call("Forget")
    assert client.add(("tea?", f"yes {SECRET}"), (None, "a text without a prompt")) == 2
    assert client.call("Status").num_examples == 2
    client.call("Forget")
    assert client.call("Status").num_examples == 0


def test_either_all_examples_of_a_call_are_kept_or_none(client: Client) -> None:
    before = client.call("Status").num_examples
    code, words = refused(client.add, (None, SECRET), ("prompt", " "))
    assert (code, words) == ("INVALID_ARGUMENT", "response: expected a non-empty string, got an empty one")
    assert refused(client.add) == ("INVALID_ARGUMENT", "examples: expected at least one, got none")
    assert client.call("Status").num_examples == before


def test_a_reply_comes_in_pieces_to_a_prompt_and_to_a_conversation(client: Client) -> None:
    pieces = [piece.text for piece in client.call("Reply", prompt="abc", max_new_tokens=40)]
    assert all(pieces) and len("".join(pieces)) >= len(pieces) > 1
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    assert "".join(piece.text for piece in client.call("Reply", conversation={"messages": said}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "input: expected a prompt or a conversation, got neither"),
        ({"prompt": " "}, "prompt: expected a non-empty string, got an empty one"),
        ({"prompt": SECRET, "max_new_tokens": 0}, "max_new_tokens: expected 1 to 4096, got 0"),
        ({"prompt": SECRET, "max_new_tokens": 4097}, "max_new_tokens: expected 1 to 4096, got 4097"),
        ({"conversation": {}}, "conversation: expected at least one message, got none"),
        (
            {"conversation": {"messages": [{"role": SECRET, "content": SECRET}]}},
            "role: expected one of system, user, assistant",
        ),
        (
            {"conversation": {"messages": [{"role": "user"}]}},
            "content: expected a non-empty string, got an empty one",
        ),
        ({"prompt": SECRET * 40}, "the conversation has 539 tokens; this base holds 128: shorten it"),
    ],
)
def test_what_can_not_be_replied_to_is_named_and_never_repeated(
    client: Client, fields: dict[str, Any], words: str
) -> None:
    assert refused(client.call, "Reply", **fields) == ("INVALID_ARGUMENT", words)


@pytest.mark.parametrize("broken", [b"\xff\xfe", b"\xed\xa0\x80", b"\xc3"], ids=["bytes", "half a pair", "cut"])
def test_a_text_that_is_no_utf8_is_refused(client: Client, broken: bytes) -> None:
    content = broken + SECRET.encode()
    request = b"\x0a" + bytes([len(content)]) + content  # field 1, a string: ReplyRequest.prompt
    code, words = refused(client.send, "Reply", request)
    assert (code, words) == (
        "INVALID_ARGUMENT",
        "expected the message ReplyRequest, its texts in UTF-8, got something else",
    )
    example = b"\x0a" + bytes([len(content) + 2]) + b"\x12" + bytes([len(content)]) + content
    assert refused(client.send, "AddExamples", example)[0] == "INVALID_ARGUMENT"


def test_a_hash_that_is_none_is_not_repeated(client: Client) -> None:
    for method in ("Consent", "Withdraw"):
        code, words = refused(client.call, method, manifest_hash=SECRET)
        assert (code, words) == (
            "INVALID_ARGUMENT",
            "manifest_hash: expected 64 hexadecimal digits, as StatusResponse shows it",
        )


def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    for path in ("/fedmini.device.v1.Device/Steal", "/other.Device/Status", "/Status"):
        with pytest.raises(grpc.RpcError) as caught:
            client.channel.unary_unary(path)(b"", 30)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_above_the_limit_is_refused_and_the_service_goes_on(client: Client) -> None:
    code, words = refused(client.send, "AddExamples", bytes(4 * 2**20 + 1))
    assert code == "RESOURCE_EXHAUSTED" and "larger than max (4194305 vs. 4194304)" in words
    assert client.call("Status").lifetime_epsilon == 1000.0


def test_a_message_of_two_gigabytes_is_refused_before_it_has_come(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(60)
        raw.connect(str(served.daemon.arguments[3]))
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        raw.sendall(frame(1, 4, 1, headers("/fedmini.device.v1.Device/AddExamples")))
        raw.sendall(frame(0, 0, 1, b"\0" + struct.pack(">I", 2**31 - 1) + bytes(1000)))
        assert ends_stream(raw)
    assert served.client.call("Status").lifetime_epsilon == 1000.0


def test_a_message_that_would_unpack_to_more_is_refused(served: Served) -> None:
    """A few kilobytes of gzip stand for many megabytes: the service takes no compressed message at all."""
    with Client(Path(served.daemon.arguments[3]), compression=grpc.Compression.Gzip) as packing:
        assert refused(packing.send, "AddExamples", bytes(2**24))[0] == "UNIMPLEMENTED"
    assert served.client.call("Status").lifetime_epsilon == 1000.0


def test_a_device_is_enrolled_agrees_to_a_run_and_leaves_it(served: Served) -> None:
    client, name = served.client, served.manifest.hash
    assert refused(client.call, "Consent", manifest_hash=name)[0] == "INVALID_ARGUMENT"  # not enrolled
    code, words = refused(client.call, "Enrol", certificate=SECRET.encode(), operator_key=SECRET.encode())
    assert code == "INVALID_ARGUMENT" and "expected a certificate in JSON" in words

    keys = json.loads(client.call("PublicKeys").public_keys)
    with operator_keys.opened(served.operator, lambda: b"") as operator:
        certificate = trust_text.write_certificate(operator.certify(bytes.fromhex(keys["device_key"]), "phone"))
    operator_key = (served.operator / "operator.pub").read_bytes()
    for _ in range(2):  # the same again is fine
        client.call("Enrol", certificate=certificate, operator_key=operator_key)
    status = client.call("Status")
    assert status.name == "phone"
    (offer,) = status.offers
    assert (offer.run_id, offer.manifest_hash) == (served.manifest.run_id, name)
    assert any("epsilon" in line for line in offer.terms)

    code, words = refused(client.call, "Consent", manifest_hash="ab" * 32)
    assert code == "INVALID_ARGUMENT" and "was offered" in words
    client.call("Consent", manifest_hash=name)
    (run,) = client.call("Status").runs
    assert (run.manifest_hash, run.num_contributions) == (name, 0)
    assert list(client.call("Receipts")) == []
    client.call("Withdraw", manifest_hash=name)
    status = client.call("Status")
    assert len(status.runs) == len(status.offers) == 0
    assert refused(client.call, "Withdraw", manifest_hash="ab" * 32)[0] == "INVALID_ARGUMENT"


def test_nothing_that_was_typed_is_in_the_log_whatever_grpc_was_asked_to_show(served: Served) -> None:
    served.client.add((SECRET, SECRET))
    served.client.reply(SECRET)
    refused(served.client.send, "Reply", b"\x0a" + SECRET.encode())
    refused(served.client.call, "Consent", manifest_hash=SECRET)
    served.daemon.wait_for("service.answered", method="Consent", code="INVALID_ARGUMENT")
    log = served.daemon.log.read_text()
    assert SECRET not in log and SECRET.encode().hex() not in log
    assert all(line.startswith("{") for line in log.splitlines())


# HTTP/2, as far as one call needs it


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(path: str) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
    fields |= {"content-type": "application/grpc", "te": "trailers"}
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )


def ends_stream(raw: socket.socket) -> bool:
    """Whether the other side ends stream 1: by its trailers, or by a reset."""
    stream = raw.makefile("rb")
    while len(head := stream.read(9)) == 9:
        kind, flags, number = head[3], head[4], struct.unpack(">I", head[5:])[0]
        stream.read(int.from_bytes(head[:3], "big"))
        if number == 1 and (kind == 3 or (kind == 1 and flags & 1)):
            return True
    return False
