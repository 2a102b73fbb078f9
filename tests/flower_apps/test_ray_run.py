"""`fedmini simulate --engine ray`: the same bits from a Ray of two workers, and clear words where there is none."""

import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedmini import config as configuration
from fedmini import simulation
from fedmini.errors import ConfigError
from fedmini.flower_apps import client_app, simulated_run
from tests import command_line, tiny_run
from tests.flower_apps import tiny_config
from tests.flower_apps.in_process_grid import InProcessGrid
from tests.flower_apps.tiny_config import adapter

CHANGES = {"simulation": {"num_threads": 1, "devices_per_batch": 1, "workers": 1}}
WITH_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'fedmini[cluster]'"
)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> command_line.Shell:
    return command_line.a_shell(tmp_path, capsys, monkeypatch)


@WITH_RAY
@pytest.mark.deployment  # processes of their own, and about 40 seconds
@pytest.mark.timeout(300)
def test_a_ray_of_two_workers_gives_the_bits_of_this_process(tmp_path: Path) -> None:
    config = tiny_config.write(tmp_path, changes=CHANGES)
    simulation.simulate(config, output=tmp_path / "here")
    command = [sys.executable, "-m", "fedmini", "simulate", str(config), "--output", str(tmp_path / "ray")]
    done = subprocess.run(
        [*command, "--engine", "ray", "--set", "simulation.workers=2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert adapter(tmp_path / "ray") == adapter(tmp_path / "here")
    assert (tmp_path / "ray" / "report.html").exists()


@WITH_RAY
@pytest.mark.deployment  # processes of their own, and about 30 seconds
@pytest.mark.timeout(300)
def test_resumed_on_a_ray_one_of_whose_workers_is_killed_in_mid_round_a_run_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    changes = CHANGES | {"rounds": {"num_rounds": 6}}
    simulation.simulate(tiny_config.write(tmp_path, changes=changes), output=tmp_path / "whole")
    config = tiny_config.write(tmp_path, changes=changes | {"simulation": CHANGES["simulation"] | {"workers": 2}})
    options = simulation.SimulationOptions(on_progress=tiny_run.interrupt_after(7))
    begun = simulated_run.prepare(configuration.load_run_config(config), tmp_path / "run", options)
    with pytest.raises(tiny_run.KilledError):
        begun.run_on(InProcessGrid(client_app.SimulatedOnly(lambda context: True), 6))
    command = [sys.executable, "-m", "fedmini", "simulate", "--output", str(tmp_path / "run")]
    with subprocess.Popen([*command, "--resume", "--engine", "ray"], stderr=subprocess.PIPE, text=True) as process:
        kill_a_worker(psutil.Process(process.pid), tmp_path / "run" / "metrics.jsonl", num_lines=3)
        assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def kill_a_worker(process: psutil.Process, metrics: Path, num_lines: int) -> None:
    """End a worker of Ray's that computes for a device, once so many lines of the metrics are written."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if len(metrics.read_text().splitlines()) >= num_lines:
            for worker in process.children(recursive=True):
                if is_computing(worker):
                    return worker.kill()
        time.sleep(0.005)
    raise AssertionError("the run ended before a worker could be killed")


def is_computing(worker: psutil.Process) -> bool:
    try:
        return "".join(worker.cmdline()).startswith("ray::ClientAppActor.run")  # as Ray names it while it does
    except psutil.Error:  # it has ended
        return False


def test_where_ray_is_missing_what_to_install_is_said(
    shell: command_line.Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    config = tiny_config.write(tmp_path, changes=CHANGES)
    answer = shell("simulate", str(config), "--output", "run", "--engine", "ray")
    assert (answer.code, answer.err) == (
        2,
        "fedmini: --engine ray needs Ray, which is not installed: pip install 'fedmini[cluster]'\n",
    )
    assert not (tmp_path / "run").exists()


@WITH_RAY
def test_an_address_where_nobody_listens_is_refused_at_once(shell: command_line.Shell, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = tiny_config.write(tmp_path, changes=CHANGES)
        answer = shell("simulate", str(config), "--output", "run", "--engine", "ray", "--ray-address", address)
    assert "nobody listens there" in answer.complaint
    assert not (tmp_path / "run").exists()


def test_devices_in_batches_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = tiny_config.write(tmp_path, changes={"simulation": CHANGES["simulation"] | {"devices_per_batch": 4}})
    with pytest.raises(ConfigError, match="Flower hands out devices one by one"):
        simulated_run.prepare(configuration.load_run_config(config), tmp_path / "run", simulation.SimulationOptions())
    assert not (tmp_path / "run").exists()


def test_an_address_without_the_engine_is_refused(shell: command_line.Shell, tmp_path: Path) -> None:
    config = tiny_config.write(tmp_path, changes=CHANGES)
    answer = shell("simulate", str(config), "--output", "run", "--ray-address", "auto")
    assert answer.complaint == "--ray-address is for --engine ray: give both, or neither"
