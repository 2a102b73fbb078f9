"""A poll is held until there is something for exactly that device, and no message is lost on the way."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from gate_process import GateProcess, running_gate
from wire import Device, Server, hold_a_poll

from fedmini.flower import registry
from fedmini.flower.bells import Bells, Uploads

SOON_S = 10.0  # well below the 15 s for which an empty answer is held


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GateProcess]:
    with running_gate(tmp_path_factory.mktemp("gate")) as running:
        yield running


@pytest.fixture(scope="module")
def server(door: GateProcess) -> Server:
    return Server(door)


def test_a_held_poll_is_answered_when_a_message_comes_and_the_reply_wakes_the_server(door: GateProcess, server: Server):
    device = Device(door).activate()
    with hold_a_poll(device) as held, ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        message_id = server.send(device)
        assert b"200 OK" in held.recv(65536)
        assert time.monotonic() - begun < SOON_S
        found = device.pull()
        device.confirm(found)
        pulled = pool.submit(server.pull, message_id)
        assert device.reply(found).status_code == 200
        (reply,) = pulled.result(timeout=SOON_S).messages_list
        assert reply.metadata.reply_to_message_id == message_id
        assert reply.metadata.src_node_id == device.node_id


def test_a_message_wakes_nobody_but_its_device(door: GateProcess, server: Server):
    one, other = Device(door).activate(), Device(door).activate()
    with hold_a_poll(one) as waiting, hold_a_poll(other) as woken:
        server.send(other)
        assert b"200 OK" in woken.recv(65536)
        waiting.settimeout(1.0)
        with pytest.raises(TimeoutError):
            waiting.recv(1)


def test_a_device_that_hung_up_while_it_waited_gets_its_message_next_time(door: GateProcess, server: Server):
    device = Device(door).activate()
    hold_a_poll(device).close()
    message_id = server.send(device)
    assert device.pull().messages_list[0].metadata.message_id == message_id


def test_an_answer_that_a_dead_connection_swallowed_is_given_again_until_it_is_confirmed(
    door: GateProcess, server: Server
):
    device = Device(door).activate()
    with hold_a_poll(device):  # open, but nobody reads: a phone that lost its network
        message_id = server.send(device)
        first, second = device.pull(), device.pull()
    assert [found.messages_list[0].metadata.message_id for found in (first, second)] == [message_id] * 2
    device.confirm(second)
    later = server.send(device)
    assert device.pull().messages_list[0].metadata.message_id == later


def test_a_message_that_is_never_confirmed_does_not_stop_the_next_one(door: GateProcess, server: Server):
    device = Device(door).activate()
    first, second = server.send(device), server.send(device)
    given = [device.pull().messages_list[0].metadata.message_id for _ in range(6)]
    assert given[0] == first and second in given


def test_a_newer_poll_of_a_device_ends_its_older_one(door: GateProcess, server: Server):
    device = Device(door).activate()
    with hold_a_poll(device) as older, hold_a_poll(device) as newer:
        older.settimeout(SOON_S)
        assert b"200 OK" in older.recv(65536)
        server.send(device)
        assert b"200 OK" in newer.recv(65536)


def test_a_revoked_device_is_refused_at_once_also_while_it_waits(door: GateProcess):
    device = Device(door).activate()
    with hold_a_poll(device) as held:
        assert registry.unregister_node(door.local_port, door.token, device.node_id)
        assert b" 401 " in held.recv(65536)
    assert device.poll().status_code == 401  # on a connection that was let in before
    assert device.node_id not in {node.node_id for node in registry.list_nodes(door.local_port, door.token)}


def test_a_device_is_registered_once_however_often_it_is_said(door: GateProcess):
    device = Device(door).register()
    assert Device(door, key=device.key).register().node_id == device.node_id
    assert registry.unregister_node(door.local_port, door.token, device.node_id)
    assert not registry.unregister_node(door.local_port, door.token, device.node_id)


def test_a_bell_wakes_who_listens_for_it_and_nobody_else():
    bells = Bells()
    one, other = bells.listen(7), bells.listen(8)
    bells.ring([8])
    assert other.rung.is_set() and not one.rung.is_set()
    bells.note_empty(7, one)
    bells.note_empty(8, other)  # it rang while its answer was under way
    assert bells.is_quiet(7) and not bells.is_quiet(8)
    bells.ring([7])
    assert not bells.is_quiet(7)


def test_a_bell_rings_when_the_last_object_of_its_message_has_come():
    async def push() -> list[list[int]]:
        uploads = Uploads()
        return [
            uploads.begin("session", {7: {"a", "b"}, 8: {"b"}, 9: set()}),
            uploads.arrived("session", "b"),
            uploads.arrived("another", "a"),
            uploads.arrived("session", "a"),
        ]

    assert asyncio.run(push()) == [[9], [8], [], [7]]
