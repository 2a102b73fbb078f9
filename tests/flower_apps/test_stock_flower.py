"""`flwr run` itself, against Flower's own commands."""

import json
from pathlib import Path

import pytest

from fedmini import simulation
from tests.flower_apps import stock_flower, tiny_config
from tests.flower_apps.tiny_config import adapter

TWO_WORKERS = "num-supernodes=6 client-resources-num-cpus=1 init-args-num-cpus=2"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flwr_run_simulates_with_the_bits_of_fedmini_simulate(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = tiny_config.write(tmp_path)
    simulation.simulate(config, output=tmp_path / "simulated")
    with stock_flower.superlink(tmp_path / "stock", "--insecure", "--simulation") as stock:
        logged = stock.run("--federation-config", TWO_WORKERS, config=config, output=tmp_path / "run")
    assert "fedmini: run.finished" in logged, logged
    assert adapter(tmp_path / "run") == adapter(tmp_path / "simulated")
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["simulated"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_node_refuses_the_app_and_the_run_says_why(tmp_path: Path) -> None:
    config = tiny_config.write(tmp_path)
    with stock_flower.superlink(tmp_path / "stock", "--insecure") as stock:
        node = (
            "--insecure",
            "--superlink",
            stock.address,
            "--host",
            "127.0.0.1",
            "--port",
            str(stock_flower.free_port()),
        )
        stock.start("flower-supernode", *node, "--node-config", "partition-id=0 num-partitions=1")
        logged = stock.run(config=config, output=tmp_path / "run")
    assert "a fedmini device never runs code that a server sent" in " ".join(logged.split()), logged + stock.logs()
    assert not (tmp_path / "run" / "manifest.json").exists()
