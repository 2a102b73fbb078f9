"""What an operator does beside running: restoring a backup is noticed, and keys change while devices stay enrolled."""

import subprocess
import sys
from pathlib import Path

from fedmini import operator_keys
from tests.deployment import chaos
from tests.deployment.deployed import ROOT, Deployment, a_config, deployment


def fedmini(*arguments: object) -> str:
    command = [sys.executable, "-m", "fedmini", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def rotate_operator(deployed: Deployment) -> None:
    """A new operator's key, and everything that it signed anew given to the server."""
    operator = deployed.folder / "operator"
    operator_keys.rotate(operator, lambda: b"")
    renewed = sorted((operator / "devices").glob("*.json"))
    fedmini("server", "follow", deployed.server_folder, operator / "rotations.json", *renewed)


def test_a_restored_server_is_refused_by_its_devices_and_keys_change_under_a_running_one(tmp_path: Path) -> None:
    rows = chaos.marked_rows()
    with deployment(tmp_path, a_config(tmp_path), rows) as deployed:
        deployed.start_devices(seeded=False)  # a seeded device would give the same bits again, which cost nothing
        server = deployed.start_server()
        place = server.wait_for("round.committed", round=1)
        fedmini("server", "backup", deployed.server_folder, tmp_path / "backup.tar")
        fedmini("server", "rotate-certificate", deployed.server_folder)
        rotate_operator(deployed)
        server.wait_for("run.finished", place)
        assert server.process.wait(60) == 0
        assert any(one["event"] == "gate.certificate_read" for one in server.events), server.tail()
        chaos.check_paid_for(deployed)

        deployed.server_folder.rename(tmp_path / "lost")
        fedmini("server", "restore", tmp_path / "backup.tar", deployed.server_folder)
        again = deployed.start_server()
        again.wait_for("alarm.restored")
        assert again.process.wait(60) == 2
        (stopped,) = (one for one in again.events if one["event"] == "run.stopped")
        assert stopped["kind"] == "StateError" and "old copy" in stopped["reason"]
        chaos.check_nothing_leaked(deployed)
