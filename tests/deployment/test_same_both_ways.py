"""A deployment gives the very adapter of `fedmini simulate --secure`: real processes, real TLS, the same randomness."""

from pathlib import Path

import numpy as np
import pytest

from fedmini import checkpoint, simulation
from fedmini.privacy.ledger import read_ledger
from tests import tiny_run
from tests.deployment.deployed import a_config, deployment


@pytest.mark.parametrize("privacy", ["example-shared"])
def test_the_adapter_equals_that_of_a_simulation_bit_for_bit(tmp_path: Path, privacy: str) -> None:
    config = a_config(tmp_path, privacy)
    simulated = simulation.simulate(
        config.model_copy(update={"simulation": config.simulation.model_copy(update={"secure": True})}),
        data=tiny_run.rows(),
        output=tmp_path / "simulated",
        options=simulation.SimulationOptions(cache_dir=tmp_path / "cache"),
    )
    with deployment(tmp_path, config) as deployed:
        deployed.start_server()
        deployed.start_devices()
        assert deployed.server is not None
        deployed.server.wait_for("run.finished")
        assert deployed.server.process.wait(60) == 0
        found = checkpoint.load(deployed.run_folder / "checkpoints")
        assert found is not None
        for name, values in simulated.adapter.items():
            assert np.array_equal(values, found.state.adapter[name]), name
        lines = read_ledger(deployed.run_folder / "ledger.jsonl")
        assert [(line["round"], line["attempt"], line["seeded"]) for line in lines] == [(1, 0, True), (2, 0, True)]
