"""Whatever dies, the run goes on and ends with the very adapter of an uninterrupted one, and everything is paid for."""

from pathlib import Path

import pytest

from tests.deployment import chaos
from tests.deployment.deployed import a_config, deployment


@pytest.mark.timeout(6 * 3600)
def test_a_killed_server_gate_or_coordinator_changes_nothing_of_the_result(tmp_path: Path, kill_seeds: range) -> None:
    """Each seed is a run of its own, in which one process is killed at a moment of the seed's; the devices live on."""
    rows = chaos.marked_rows()
    config = a_config(tmp_path, changes={"rounds": {"spare_attempts": 4}})
    expected = chaos.simulated_adapter(config, tmp_path, rows)
    with deployment(tmp_path, config, rows, num_runs=len(kill_seeds)) as deployed:
        deployed.start_devices()
        for number, seed in enumerate(kill_seeds, 1):
            server = deployed.start_server("tiny" if number == 1 else f"tiny-{number}")
            killed, moment = chaos.kill_at_random(deployed, seed)
            if killed == "server":
                server = deployed.start_server()
            server.wait_for("run.finished")
            assert server.process.wait(60) == 0, (seed, killed, moment, server.tail())
            chaos.check_adapter(deployed, expected)
            chaos.check_paid_for(deployed)
            chaos.check_nothing_leaked(deployed)
            print(f"seed {seed}: killed the {killed} at {moment}")
