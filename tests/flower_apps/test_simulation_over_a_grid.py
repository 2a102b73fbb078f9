"""A simulation through Flower's messages: the same bits as without them, and clear words where it can't run."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedmini import simulation
from fedmini.errors import ConfigError, StateError
from fedmini.flower_apps import client_app, grid_cohort, server_app, simulated_devices
from tests.flower_apps import tiny_config
from tests.flower_apps.in_process_grid import InProcessGrid, a_run
from tests.flower_apps.tiny_config import adapter

SIMULATED = client_app.SimulatedOnly(lambda context: True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    simulated_devices._loaded.cache_clear()


def flower_run(config: Path, output: Path, num_nodes: int = 6) -> InProcessGrid:
    grid = InProcessGrid(SIMULATED, num_nodes)
    server_app.app(grid, a_run(str(config), str(output)))
    return grid


def told(output: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what depends on the machine."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes")} for line in lines]


def stated(output: Path) -> dict[str, Any]:
    """The privacy statement, without the run's name: each run has its own."""
    return {
        key: value
        for key, value in json.loads((output / "privacy.json").read_text()).items()
        if key not in ("run_id", "manifest_hash", "ledger_hash")
    }


@pytest.mark.parametrize("privacy", ["example-shared", "device-server", "none"])
def test_a_seeded_run_over_flowers_messages_has_the_bits_of_a_simulation(tmp_path: Path, privacy: str) -> None:
    config = tiny_config.write(tmp_path, privacy, {"rounds": {"dropout_rate": 0.1, "min_survivors": 3}})
    simulation.simulate(config, output=tmp_path / "simulated")
    flower_run(config, tmp_path / "flower")
    assert adapter(tmp_path / "flower") == adapter(tmp_path / "simulated")
    assert told(tmp_path / "flower") == told(tmp_path / "simulated")
    names = {path.name for path in (tmp_path / "flower").iterdir()}
    assert names >= {path.name for path in (tmp_path / "simulated").iterdir()} | {"report.html"}
    assert stated(tmp_path / "flower") == stated(tmp_path / "simulated")


def test_only_the_chosen_devices_are_asked_and_the_worker_loads_its_model_once(tmp_path: Path) -> None:
    grid = flower_run(tiny_config.write(tmp_path), tmp_path / "run", num_nodes=9)
    assert grid.num_asked == 9 + 3 * 5  # each node for its partition, five devices in three rounds
    assert simulated_devices._loaded.cache_info().misses == 1


def test_given_again_a_run_goes_on_where_it_stopped_with_the_same_bits(tmp_path: Path) -> None:
    config = tiny_config.write(tmp_path)
    flower_run(config, tmp_path / "whole")
    failing = InProcessGrid(SIMULATED, 6)
    failing.fail_after = 6 + 7
    with pytest.raises(StateError, match="a device failed: out of memory"):
        server_app.app(failing, a_run(str(config), str(tmp_path / "run")))
    assert [line["round"] for line in told(tmp_path / "run")] == [0, 1]
    flower_run(config, tmp_path / "run")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_device_whose_worker_is_lost_is_asked_again_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_cohort, "RESEND_SECONDS", (0.0, 0.0))
    config = tiny_config.write(tmp_path)
    flower_run(config, tmp_path / "whole")
    grid = InProcessGrid(SIMULATED, 6)
    grid.lost_answers = frozenset({2, 9, 10})  # a node's partition, and two devices of a round
    server_app.app(grid, a_run(str(config), str(tmp_path / "run")))
    assert grid.num_asked == 6 + 3 * 5 + 3
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_worker_that_is_lost_again_and_again_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_cohort, "RESEND_SECONDS", (0.0, 0.0))
    config = tiny_config.write(tmp_path)
    failing = InProcessGrid(SIMULATED, 6)
    failing.lost_answers = frozenset(range(14, 1000))  # in the second round
    with pytest.raises(StateError, match=r"^a worker was lost 3 times with the same device: .*\Z"):
        server_app.app(failing, a_run(str(config), str(tmp_path / "run")))
    flower_run(config, tmp_path / "run")
    flower_run(config, tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_too_few_nodes_are_refused_with_the_option_that_gives_more(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 devices, and Flower simulates 2 nodes.*num-supernodes=6"):
        flower_run(tiny_config.write(tmp_path), tmp_path / "run", num_nodes=2)


def test_secure_aggregation_is_refused_and_where_it_is_to_be_had_is_said(tmp_path: Path) -> None:
    config = tiny_config.write(tmp_path, changes={"simulation": {"secure": True, "num_threads": 1}})
    with pytest.raises(ConfigError, match="fedmini simulate --secure"):
        flower_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_worker_with_other_data_than_the_server_is_found_out(tmp_path: Path) -> None:
    config = tiny_config.write(tmp_path)
    people = tmp_path / "people.jsonl"

    class Swapped(InProcessGrid):
        def get_node_ids(self):  # the server has read its data by now
            people.write_text(people.read_text().replace("a", "b"))
            return super().get_node_ids()

    with pytest.raises(StateError, match="the examples are not those"):
        server_app.app(Swapped(SIMULATED, 6), a_run(str(config), str(tmp_path / "run")))


def test_a_device_that_fails_says_no_word_of_what_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task, partition):
        raise ValueError("Dear diary")

    monkeypatch.setattr(simulated_devices, "contribute", fail)
    with pytest.raises(StateError) as caught:
        flower_run(tiny_config.write(tmp_path), tmp_path / "run")
    assert "ValueError" in str(caught.value) and "diary" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has nothing"),
        ({"config": "/a"}, "has config"),
        ({"config": "/a", "output": "/b", "run": "c"}, "has config, output, run"),
        ({"config": "a.toml", "output": "/b"}, "config: expected an absolute path"),
        ({"config": "/a.toml", "output": "b"}, "output: expected an absolute path"),
    ],
)
def test_a_run_config_that_says_neither_job_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server_app.app(InProcessGrid(SIMULATED, 1), a_run(**settings))
