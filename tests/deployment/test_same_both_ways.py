"""A deployment gives the very adapter of `fedmini simulate --secure`: real processes, real TLS, the same randomness.

One deployment serves all runs here, one after the other: its devices' processes live on between them.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedmini import checkpoint, simulation
from fedmini.config import RunConfig
from fedmini.privacy.ledger import read_ledger
from tests import tiny_run
from tests.deployment.deployed import PRIVACY, TIMING, Deployment, a_config, deployment, renamed

pytestmark = pytest.mark.timeout(600)

# Two of the four people a round, and each of them in one round only.
RESTING = {"cohort_size": 2, "min_survivors": 2, "max_participations": 1, "spare_attempts": 0}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A run in each privacy mode, by its name, and one more that two of its four devices are enough for."""
    folder = tmp_path_factory.mktemp("runs")
    resting = renamed(a_config(folder, changes={"rounds": RESTING}), "resting")
    with deployment(folder, resting, timing=TIMING | REST, others=[in_mode(folder, one) for one in PRIVACY]) as made:
        yield made


REST = {"wait_s": 2.0}  # at most, between two tries at a round that too few devices may take part in
REST_SECONDS = 4.0


def in_mode(folder: Path, privacy: str) -> RunConfig:
    return renamed(a_config(folder, privacy), privacy)


def test_a_run_that_too_few_devices_may_take_part_in_rests_spends_nothing_and_goes_on_with_who_comes(
    deployed: Deployment,
) -> None:
    """First one of two is there, then both have been in as many rounds as they may."""
    deployed.end_devices()
    first, second, *others = deployed.people
    server = deployed.start_server("resting")
    ledger = deployed.run_folder / "ledger.jsonl"
    deployed.start_device(first)
    server.wait_for("round.waiting", ready=1, needed=2)
    check_it_rests(deployed)
    assert read_ledger(ledger) == []

    deployed.start_device(second)
    server.wait_for("round.waits", since=server.wait_for("round.committed", round=1))
    check_it_rests(deployed)
    assert [(line["round"], line["attempt"]) for line in read_ledger(ledger)] == [(1, 0)]

    for name in others:
        deployed.start_device(name)
    server.wait_for("run.finished")
    assert server.process.wait(60) == 0
    assert [(line["round"], line["attempt"]) for line in read_ledger(ledger)] == [(1, 0), (2, 0)]


@pytest.mark.parametrize("privacy", PRIVACY)
def test_the_adapter_equals_that_of_a_simulation_bit_for_bit(deployed: Deployment, privacy: str) -> None:
    config = in_mode(deployed.folder, privacy)
    server = deployed.start_server(privacy)
    deployed.start_devices()
    simulated = simulation.simulate(
        config.model_copy(update={"simulation": config.simulation.model_copy(update={"secure": True})}),
        data=tiny_run.rows(),
        output=deployed.folder / "simulated" / privacy,
        options=simulation.SimulationOptions(cache_dir=deployed.folder / "cache"),
    )
    server.wait_for("run.finished")
    assert server.process.wait(60) == 0
    found = checkpoint.load(deployed.run_folder / "checkpoints")
    assert found is not None
    for name, values in simulated.adapter.items():
        assert np.array_equal(values, found.state.adapter[name]), name
    lines = read_ledger(deployed.run_folder / "ledger.jsonl")
    assert [(line["round"], line["attempt"], line["seeded"]) for line in lines] == [(1, 0, True), (2, 0, True)]


def check_it_rests(deployed: Deployment) -> None:
    """For some seconds the server's two processes compute next to nothing, and try a few times only.

    Resting takes a tenth of a core for both, nearly all of it the gate's; asking without a rest takes all of one.
    """
    assert deployed.server is not None
    processes = [psutil.Process(deployed.pid_of(name)) for name in ("coordinator", "gate")]
    num_lines, began, before = len(deployed.server.lines), time.monotonic(), seconds_of(processes)
    time.sleep(REST_SECONDS)  # what passes is what is looked at: there is nothing to wait for
    share = (seconds_of(processes) - before) / (time.monotonic() - began)
    print(f"it rests on {share:.0%} of a core")
    assert share < 0.4
    assert len(deployed.server.lines) - num_lines < 40


def seconds_of(processes: Sequence[psutil.Process]) -> float:
    """For how long they have computed."""
    return sum(sum(one.cpu_times()[:2]) for one in processes)
