"""Where a service listens: for its owner only from the first moment, never in another one's place, never beyond this machine."""

import os
import re
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from fedmini.device_service import daemon, places, service_token
from fedmini.device_service.places import Loopback, Place, UnixSocket
from fedmini.errors import ConfigError, FedMiniError, StateError


@contextmanager
def listening(place: Place) -> Iterator[str]:
    """A server that answers nothing."""
    server = grpc.server(ThreadPoolExecutor(1), options=daemon.OPTIONS)
    with places.bound(server, place) as address:
        server.start()
        try:
            yield address
        finally:
            server.stop(0).wait(20)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def a_stale_socket(path: Path) -> None:
    """What a killed process leaves."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


def test_a_socket_is_its_owners_only_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    before = os.umask(0o000)  # whatever the process was started with
    try:
        with listening(UnixSocket(path)) as address:
            assert (address, mode(path)) == (str(path), 0o600)
            assert mode(tmp_path / "device.sock.lock") == 0o600
            assert os.umask(0o000) == 0o000, "the process's own is as it was"
        assert not path.exists()
    finally:
        os.umask(before)


def test_a_socket_is_never_wider_not_even_while_it_is_made(tmp_path: Path) -> None:
    path, seen, ended = tmp_path / "device.sock", set(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            with suppress(FileNotFoundError):
                seen.add(mode(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            with listening(UnixSocket(path)):
                pass
    finally:
        ended.set()
        watcher.join()
    assert seen <= {0o600}


def test_a_path_with_signs_that_mean_something_in_an_address_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a b%20é?#.sock"
    with listening(UnixSocket(path)):
        assert stat.S_ISSOCK(path.lstat().st_mode)


def test_a_relative_path_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with listening(UnixSocket(Path("device.sock"))) as address:
        assert address == str(tmp_path / "device.sock")


def test_the_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    a_stale_socket(path)
    with listening(UnixSocket(path)), socket.socket(socket.AF_UNIX) as caller:
        assert mode(path) == 0o600
        caller.connect(str(path))


def test_a_socket_that_somebody_listens_on_is_left_to_them(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen(1)
        with pytest.raises(StateError, match=f"another program listens on {path}"), listening(UnixSocket(path)):
            pass
        assert path.exists()


def test_a_second_service_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    with listening(UnixSocket(path)):
        with pytest.raises(StateError, match="another process listens on"), listening(UnixSocket(path)):
            pass
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to(path.parent / "other.sock")])
def test_what_is_no_socket_is_not_replaced(tmp_path: Path, make) -> None:
    path = tmp_path / "device.sock"
    a_stale_socket(tmp_path / "other.sock")
    make(path)
    with pytest.raises(ConfigError, match="is there, and no socket"), listening(UnixSocket(path)):
        pass
    assert path.is_symlink() or path.exists()


def test_a_path_that_no_socket_can_have_is_named(tmp_path: Path) -> None:
    long = tmp_path / ("x" * (108 - len(str(tmp_path)) - 1))
    with pytest.raises(ConfigError, match=r"has 108 bytes, and .* may have 107"), listening(UnixSocket(long)):
        pass
    with listening(UnixSocket(long.with_name(long.name[:-1]))):
        pass
    with pytest.raises(ConfigError, match="is no folder"), listening(UnixSocket(tmp_path / "none" / "s")):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no folder"), listening(UnixSocket(tmp_path / "file" / "s")):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:7000", Loopback("127.0.0.1", 7000)),
        ("127.8.9.1:0", Loopback("127.8.9.1", 0)),
        ("[::1]:65535", Loopback("::1", 65535)),
    ],
)
def test_an_address_of_this_machine_is_taken(text: str, expected: Loopback) -> None:
    assert places.parse_loopback(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0:7000",
        "[::]:7000",
        "192.168.1.2:7000",
        "[::ffff:10.0.0.1]:7000",
        "localhost:7000",
        "example.org:7000",
        "127.0.0.1",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:7000 ",
        "127.1:7000",
        ":7000",
        "",
        "\x1b[2J",
    ],
)
def test_every_other_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape("expected 127.0.0.1:PORT or [::1]:PORT")) as caught:
        places.parse_loopback(text)
    assert "\x1b" not in str(caught.value)


def test_a_port_is_not_shared(tmp_path: Path) -> None:
    with listening(Loopback("127.0.0.1", 0)) as address:
        port = int(address.rpartition(":")[2])
        place = Loopback("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}"), listening(place):
            pass


def test_a_token_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = service_token.read_or_make(path)
    assert len(token) == 64 and mode(path) == 0o600
    assert service_token.read_or_make(path) == token
    path.write_text(f"{token}\n")  # as an editor leaves it
    assert service_token.read_or_make(path) == token


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no token"),
        (b"short", "holds no token"),
        (b"a" * 5000, "holds no token"),
        (b"\xff" * 20, "no token"),
    ],
)
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=complaint):
        service_token.read_or_make(path)


def test_a_token_that_others_can_read_is_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = service_token.read_or_make(path)
    path.chmod(0o644)
    with pytest.raises(StateError, match="can be read by others") as caught:
        service_token.read_or_make(path)
    assert token not in str(caught.value)


def test_a_token_file_that_can_not_be_made_or_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "token", tmp_path):
        with pytest.raises(FedMiniError, match="--token-file: can't"):
            service_token.read_or_make(path)
