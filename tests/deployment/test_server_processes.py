"""The processes of a server, whatever ends one of them or changes under it: they go on, or say at once why not."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from fedmini import server_folder
from fedmini.deployment.supervisor import READY_SECONDS
from fedmini.errors import ConfigError
from tests.deployment.deployed import Deployment, Logged, a_config, deployment, is_alive, wait_until

STARTED = "process.started"


@pytest.mark.timeout(600)
def test_processes_that_are_killed_or_ended_come_back_and_a_device_that_can_not_costs_nobody_else(
    tmp_path: Path,
) -> None:
    with deployment(tmp_path, a_config(tmp_path)) as deployed:
        say_why_a_taken_port_is_none(deployed)
        server = deployed.start_server()
        server.wait_for(STARTED, process="coordinator")
        orphan = deployed.pid_of("coordinator")
        server.kill()  # while its coordinator still imports

        server = deployed.start_server()
        server.wait_for("run.began")
        wait_until(lambda: not is_alive(orphan), "an orphan to end")
        coordinator = deployed.pid_of("coordinator")
        server.kill()  # while its coordinator holds the ledger
        server = deployed.start_server()
        server.wait_for("run.began")
        assert not any(one["event"] == "run.stopped" for one in server.events), server.tail()
        assert deployed.pid_of("coordinator") != coordinator

        place = len(server.lines)
        os.kill(deployed.pid_of("coordinator"), signal.SIGTERM)
        place = server.wait_for("process.died", place, process="coordinator")
        server.wait_for("run.began", place)

        enroll_again_with_an_old_login_key(deployed, server)
        *_, other = deployed.people
        deployed.start_device(other)
        server.wait_for("device.ready", device=other)
        assert server.end() == 0


def say_why_a_taken_port_is_none(deployed: Deployment) -> None:
    with socket.create_server(("127.0.0.1", deployed.port)):
        server = deployed.start_server()
        server.wait_for("gate.refused")
        refused = time.monotonic()
        assert server.process.wait(60) != 0
        assert time.monotonic() - refused < READY_SECONDS / 2, "it ends with its gate"
        assert "the gate did not start" in server.tail()


def enroll_again_with_an_old_login_key(deployed: Deployment, server: Logged) -> None:
    folder = server_folder.opened(deployed.server_folder)
    name = next(iter(deployed.people))
    device = folder.device(name)
    path = deployed.server_folder / "devices" / f"{name}.json"
    content = path.read_bytes()
    folder.revoke_local(name)
    place = server.wait_for("device.cut_off")
    path.write_bytes(content)  # as a command that did not know yet
    place = server.wait_for("device.refused", place, device=name)
    wait_until(lambda: is_unusable(deployed, name), "the key to be known as one that can't be used")
    folder.revoke_local(name)
    with pytest.raises(ConfigError, match="fedmini device new-login"):
        folder.enroll(device.device_keys, device.certificate)


def is_unusable(deployed: Deployment, name: str) -> bool:
    folder = server_folder.opened(deployed.server_folder)
    return folder.is_spent(folder.device(name).login_key_bytes)
