"""Devices in processes of their own measure the loss, by secure sums of their own, as a simulation's do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmini import checkpoint, simulation
from fedmini.privacy.ledger import read_ledger
from tests import tiny_run
from tests.deployment.deployed import Deployment, a_config, deployment

EVALUATION = {"devices": {"fraction": 0.5, "target_epsilon": 5.0}}
PRIVACY = {"example": {"target_epsilon": 4.0, "target_delta": 1e-5, "clip_norm": 1.0, "noise": "shared"}}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_evaluations_on_devices_equal_a_simulations_and_are_paid_for_on_both_sides(tmp_path: Path) -> None:
    """The coordinator is killed in one: what was paid for and lost is not asked for again, and the adapter is the same."""
    config = a_config(tmp_path, changes={"evaluation": EVALUATION, "privacy": PRIVACY})
    simulated = simulation.simulate(
        config.model_copy(update={"simulation": config.simulation.model_copy(update={"secure": True})}),
        data=tiny_run.rows(),
        output=tmp_path / "simulated",
        options=simulation.SimulationOptions(cache_dir=tmp_path / "cache"),
    )
    with deployment(tmp_path, config, num_runs=2) as deployed:
        server = deployed.start_server()
        deployed.start_devices()
        server.wait_for("round.committed", round=1)
        server.wait_for("run.finished")
        assert server.process.wait(60) == 0, server.tail()
        lines = metrics_of(deployed.run_folder)
        assert [line["device_loss"] for line in lines] == [line["device_loss"] for line in simulated.history]
        assert all(line["device_loss"] is not None for line in lines)
        check_paid_for(deployed, {1, 2, 3})
        check_adapter(deployed, simulated.adapter)

        server = deployed.start_server("tiny-2")
        place = server.wait_for("round.committed", round=1)
        server.wait_for("stage.began", since=place, stage="AGREE")
        deployed.kill("coordinator")
        server.wait_for("run.finished")
        assert server.process.wait(60) == 0, server.tail()
        assert [line["device_loss"] is None for line in metrics_of(deployed.run_folder)] == [False, True, False]
        check_paid_for(deployed, {1, 2, 3})
        check_adapter(deployed, simulated.adapter)


def check_paid_for(deployed: Deployment, evaluations: set[int]) -> None:
    lines = read_ledger(deployed.run_folder / "evaluation-ledger.jsonl")
    assert [line["round"] for line in lines] == sorted(evaluations)
    run_id = lines[0]["run_id"]
    assert run_id.endswith(":evaluation")
    for name in deployed.people:
        own = [json.loads(line) for line in (deployed.folder / name / "ledger.jsonl").read_text().splitlines()]
        assert {line["round"] for line in own if line["run_id"] == run_id} == evaluations
        left = [json.loads(line) for line in (deployed.folder / name / "receipts.jsonl").read_text().splitlines()]
        assert {one["round_num"] for one in left if one["run_id"] == run_id} <= evaluations


def check_adapter(deployed: Deployment, expected: Any) -> None:
    found = checkpoint.load(deployed.run_folder / "checkpoints")
    assert found is not None and found.state.round_num == deployed.config.rounds.num_rounds
    for name, values in expected.items():
        assert np.array_equal(values, found.state.adapter[name]), name
