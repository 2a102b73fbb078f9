"""Whatever dies, the run goes on and ends with the very adapter of an uninterrupted one, and everything is paid for."""

import json
import signal
from pathlib import Path

import pytest

from tests.deployment import chaos
from tests.deployment.deployed import TIMING, a_config, deployment

# A message is lost with the gate that was killed, and its answer waited for in vain.
BRIEF = {"advertise_s": 10.0, "share_s": 10.0, "agree_s": 10.0, "unmask_s": 10.0}


@pytest.mark.timeout(6 * 3600)
def test_a_killed_server_gate_or_coordinator_changes_nothing_of_the_result(tmp_path: Path, kill_seeds: range) -> None:
    """Each seed is a run of its own, in which one process is killed at a moment of the seed's; the devices live on."""
    rows = chaos.marked_rows()
    config = a_config(tmp_path, changes={"rounds": {"spare_attempts": 4}})
    expected = chaos.simulated_adapter(config, tmp_path, rows)
    with deployment(tmp_path, config, rows, num_runs=len(kill_seeds), timing=TIMING | BRIEF) as deployed:
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


STAGES = ("ADVERTISE", "SHARE", "CONTRIBUTE", "AGREE", "UNMASK")


@pytest.mark.timeout(900)
def test_a_device_killed_at_any_stage_costs_the_round_nobody_else(tmp_path: Path) -> None:
    """One of five dies at another stage of each round, and comes back; four are enough. A vector that came is in the sum."""
    changes = {
        "rounds": {"num_rounds": len(STAGES), "cohort_size": 5, "min_survivors": 4, "spare_attempts": 2},
        "data": {"held_out_devices": 3},
    }
    rows = chaos.marked_rows()
    timing = TIMING | BRIEF | {"contribute_s": 10.0}
    with deployment(tmp_path, a_config(tmp_path, changes=changes), rows, timing=timing) as deployed:
        first, *others = deployed.people
        for name in others:
            deployed.start_device(name)
        server = deployed.start_server()
        for stage in STAGES:
            dying = deployed.start_device(first, die_at=stage)
            assert dying.process.wait(120) == -signal.SIGKILL, (stage, dying.tail(), server.tail())
        server.wait_for("run.finished")
        assert server.process.wait(60) == 0, server.tail()
        lines = [json.loads(line) for line in (deployed.run_folder / "metrics.jsonl").read_text().splitlines()][1:]
        assert [line["num_sampled"] for line in lines] == [4, 4, 5, 5, 5]
        assert [line["num_survivors"] for line in lines] == [4, 4, 4, 5, 5]
        chaos.check_paid_for(deployed)
        chaos.check_nothing_leaked(deployed)
