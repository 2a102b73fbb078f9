"""A device that breaks every round it is in does not stop a run."""

import json
from pathlib import Path

import pytest

from tests import tiny_run
from tests.deployment.deployed import a_config, deployment


@pytest.mark.timeout(600)
def test_a_device_that_deals_broken_shares_costs_one_attempt_and_is_asked_no_more(tmp_path: Path) -> None:
    """Four honest devices are enough, and one attempt may be lost: without a memory for it the run would be over."""
    changes = {
        "rounds": {"cohort_size": 4, "min_survivors": 4, "over_selection": 1.25, "spare_attempts": 1},
        "data": {"held_out_devices": 3},
    }
    with deployment(tmp_path, a_config(tmp_path, changes=changes), tiny_run.rows()) as deployed:
        hostile, *honest = deployed.people
        for name in honest:
            deployed.start_device(name)
        deployed.start_device(hostile, program="bad_dealer_process")
        server = deployed.start_server()
        server.wait_for("device.blamed", dealer=hostile)
        server.wait_for("run.finished")
        assert server.process.wait(60) == 0, server.tail()
        lines = [json.loads(line) for line in (deployed.run_folder / "metrics.jsonl").read_text().splitlines()][1:]
        assert [line["num_survivors"] for line in lines] == [4, 4]
        debits = [json.loads(line) for line in (deployed.run_folder / "ledger.jsonl").read_text().splitlines()]
        assert [(line["round"], line["attempt"]) for line in debits] == [(1, 0), (1, 1), (2, 0)]
        for name in honest:  # refused before it paid: the lost attempt cost no honest device anything
            own = [json.loads(line) for line in (deployed.folder / name / "ledger.jsonl").read_text().splitlines()]
            assert [(line["round"], line["attempt"]) for line in own] == [(1, 1), (2, 0)], name
