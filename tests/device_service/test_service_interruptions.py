"""Calls that end early, and too many at once: over a real socket, with a device that never stops talking."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from fedmini.device import Device
from fedmini.device_service import daemon, messages, places
from fedmini.device_service.places import Loopback, UnixSocket
from fedmini.device_service.service import MAX_CALLS, DeviceService
from fedmini.errors import LinkError, ModelMismatchError, PrivacyBudgetError, StateError
from fedmini.events import Field
from tests.device_service import serving
from tests.device_service.serving import WAIT_S, Client, refused

SECRET = "thesecretword"


class Talker(Device):
    """A device whose replies have no end; `prompt` may name an error that comes after the first piece."""

    num_replying = 0

    def reply_in_pieces(self, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int = 128) -> Iterator[str]:
        changed = self.changed
        with changed:
            self.num_replying += 1
            changed.notify_all()
        try:
            while True:
                yield "a"
                if prompt in FAILURES:
                    raise FAILURES[prompt]
        finally:
            with changed:
                self.num_replying -= 1
                changed.notify_all()

    def wait_for_replies(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_replying == number, WAIT_S), self.num_replying


FAILURES = {
    "state": StateError("the disk is full"),
    "link": LinkError("no network"),
    "budget": PrivacyBudgetError("nothing is left"),
    "model": ModelMismatchError("another base"),
    "foreign": ValueError(SECRET),
    "surrogate": StateError("/home/\udcff is damaged"),
    "long": StateError("x" * 5000),
}


@contextmanager
def talking(folder: Path, token: str | None = None) -> Iterator[tuple[Talker, Client, list[dict[str, Field]]]]:
    """A talker behind the service in this process, a client of it, and what was logged."""
    logged: list[dict[str, Field]] = []
    with Talker(serving.a_folder(folder / "device"), find_keyring=lambda: None) as device:
        device.changed = threading.Condition()
        service = DeviceService(device, lambda event, **fields: logged.append({"event": event, **fields}), token)
        server = daemon.make_server(service)
        place = UnixSocket(folder / "s") if token is None else Loopback("127.0.0.1", 0)
        with places.bound(server, place) as address:
            server.start()
            target = Path(address) if token is None else address
            try:
                with Client(target, token) as client:
                    yield device, client, logged
            finally:
                server.stop(0).wait(WAIT_S)


def test_a_reply_ends_when_whoever_asked_goes_away(tmp_path: Path) -> None:
    with talking(tmp_path) as (device, client, logged):
        pieces = client.call("Reply", prompt="x")
        assert [next(pieces).text for _ in range(3)] == ["a", "a", "a"]
        pieces.cancel()
        device.wait_for_replies(0)
        assert logged[-1] | {"seconds": 0} == {
            "event": "service.answered",
            "method": "Reply",
            "code": "CANCELLED",
            "seconds": 0,
        }


def test_a_reply_ends_when_the_connection_does(tmp_path: Path) -> None:
    with talking(tmp_path) as (device, client, _), Client(tmp_path / "s") as other:
        next(other.call("Reply", prompt="x"))
        device.wait_for_replies(1)
        other.channel.close()
        device.wait_for_replies(0)
        assert client.call("Status").num_examples == 0


def test_a_reply_ends_at_its_deadline(tmp_path: Path) -> None:
    with talking(tmp_path) as (device, client, _):
        code, _ = refused(client.call, "Reply", prompt="x", timeout=0.5)
        assert code == "DEADLINE_EXCEEDED"
        device.wait_for_replies(0)


def test_a_client_that_does_not_read_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    with talking(tmp_path) as (device, client, _):
        unread = client.call("Reply", prompt="x")  # it stops where the window is full
        device.wait_for_replies(1)
        assert client.call("Status", timeout=WAIT_S).num_examples == 0
        client.call("Forget", timeout=WAIT_S)
        unread.cancel()


def test_more_calls_at_once_than_the_limit_are_refused_and_a_place_that_is_free_again_is_taken(tmp_path: Path) -> None:
    with talking(tmp_path) as (device, client, _):
        held = [client.call("Reply", prompt="x") for _ in range(MAX_CALLS)]
        device.wait_for_replies(MAX_CALLS)
        assert refused(client.call, "Status")[0] == "RESOURCE_EXHAUSTED"
        for one in held:
            one.cancel()
        device.wait_for_replies(0)
        until_answered(client)


def until_answered(client: Client) -> None:
    """gRPC counts a call until its very end, a moment after its answer."""
    while True:
        try:
            client.call("Status", timeout=WAIT_S)
            return
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_each_error_of_ours_has_its_code_and_a_foreign_one_only_its_class(tmp_path: Path) -> None:
    with talking(tmp_path) as (_, client, logged):
        ask = lambda prompt: refused(client.call, "Reply", prompt=prompt)  # noqa: E731
        assert ask("state") == ("FAILED_PRECONDITION", "the disk is full")
        assert ask("model") == ("FAILED_PRECONDITION", "another base")
        assert ask("link") == ("UNAVAILABLE", "no network")
        assert ask("budget") == ("RESOURCE_EXHAUSTED", "nothing is left")
        assert ask("foreign") == ("INTERNAL", "a failure inside: ValueError")
        assert ask("surrogate") == ("FAILED_PRECONDITION", "/home/? is damaged")
        assert ask("long") == ("FAILED_PRECONDITION", "x" * 1000)
        assert SECRET not in str(logged)


def test_without_the_token_nothing_is_answered(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    with talking(tmp_path, token) as (_, client, logged):
        assert client.call("Status").num_examples == 0
        for wrong in ((), (("fedmini-token", token[:-1]),), (("fedmini-token", token),) * 2, (("other", token),)):
            client.metadata = wrong
            assert refused(client.call, "Status")[0] == "UNAUTHENTICATED"
            assert refused(client.call, "Reply", prompt=SECRET)[0] == "UNAUTHENTICATED"
        _, words = refused(client.call, "Status")
        assert token not in words and token not in str(logged)


def test_strangers_without_the_token_can_not_fill_the_places_of_others(tmp_path: Path) -> None:
    """A call whose request never comes is refused at once, not waited for."""
    token, never = "0123456789abcdef", threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield b""

    with talking(tmp_path, token) as (_, client, _), ThreadPoolExecutor(2 * MAX_CALLS) as strangers:
        path = f"/{messages.SERVICE}/Status"
        try:
            for _ in range(3):
                calls = [client.channel.stream_unary(path).future(nothing(), WAIT_S) for _ in range(MAX_CALLS)]
                codes = set(strangers.map(lambda call: call.code(), calls))
                assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
                until_answered(client)
        finally:
            never.set()
