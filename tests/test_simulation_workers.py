"""Worker processes of a simulation: the same bits however many there are, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini import planning, simulation
from fedmini.config import RunConfig, load_run_config
from fedmini.errors import ConfigError, StateError
from fedmini.simulation import Progress, SimulationOptions, automatic, frames
from fedmini.simulation.cohort import batches
from fedmini.simulation.frames import Frame
from fedmini.types import EncodedExample, Manifest
from tests import tiny_run


def run(
    folder: Path, config: RunConfig | None, output: str, resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> simulation.SimulationResult:  # fmt: skip
    options = SimulationOptions(resume=resume, cache_dir=folder / "cache", on_progress=on_progress)
    return simulation.simulate(config, data=tiny_run.rows(), output=folder / output, options=options)


def a_config(folder: Path, workers: int, privacy: str = "device-shared", devices_per_batch: int = 2) -> RunConfig:
    changes = {
        "simulation": {"workers": workers, "devices_per_batch": devices_per_batch},
        "rounds": {"num_rounds": 2},
        "local": {"num_steps": 1 if privacy == "example-shared" else 2},
    }
    return tiny_run.config(folder, privacy, changes)


def adapter_bytes(folder: Path, output: str) -> bytes:
    return (folder / output / "adapter" / "adapter_model.safetensors").read_bytes()


def workers_of(process: int) -> list[int]:
    """The processes that this one started and that are still there."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if "fedmini.simulation.worker" in command_of(int(child))]


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("privacy", ["device-shared", "example-shared"])
def test_the_bits_do_not_depend_on_the_number_of_workers(tmp_path: Path, privacy: str) -> None:
    for workers in (1, 2):
        run(tmp_path, a_config(tmp_path, workers, privacy), str(workers))
    assert adapter_bytes(tmp_path, "1") == adapter_bytes(tmp_path, "2")
    assert load_run_config(tmp_path / "2" / "config.toml").simulation.workers == 2
    assert workers_of(os.getpid()) == []


def test_a_worker_that_is_killed_ends_the_run_with_an_error_that_says_so_and_it_can_go_on(tmp_path: Path) -> None:
    def kill_one(progress: Progress) -> None:
        if progress.device_index == 2 and progress.round_num == 1:
            os.kill(workers_of(os.getpid())[0], signal.SIGKILL)

    config = a_config(tmp_path, 2)
    with pytest.raises(StateError, match=r"was ended by SIGKILL.*--resume"):
        run(tmp_path, config, "killed", on_progress=kill_one)
    assert workers_of(os.getpid()) == []
    run(tmp_path, None, "killed", resume=True)
    run(tmp_path, a_config(tmp_path, 1), "whole")
    assert adapter_bytes(tmp_path, "killed") == adapter_bytes(tmp_path, "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt, tiny_run.KilledError])
def test_whatever_ends_a_run_ends_its_workers(tmp_path: Path, error: type[BaseException]) -> None:
    found: list[int] = []

    def stop(progress: Progress) -> None:
        found.extend(workers_of(os.getpid()))
        if found:
            raise error

    with pytest.raises(error):
        run(tmp_path, a_config(tmp_path, 2), "stopped", on_progress=stop)
    assert len(set(found)) == 2
    assert workers_of(os.getpid()) == [] and not any(map(command_of, found))


RUN_ALONE = """
import sys
from pathlib import Path
from tests import test_simulation_workers as here
folder = Path(sys.argv[1])
here.run(folder, here.a_config(folder, 2), "orphaned", on_progress=lambda p: print(p.stage, flush=True))
"""


@pytest.mark.slow
def test_workers_of_a_run_that_is_killed_end_by_themselves(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN_ALONE, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert wait_for(lambda: len(workers_of(process.pid)) == 2)
        orphans = workers_of(process.pid)
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not any(map(command_of, orphans)))


def test_what_a_worker_raises_is_raised_here(tmp_path: Path) -> None:
    """The base disappears as soon as this process has loaded it: the workers find nothing, and say so."""

    def remove(progress: Progress) -> None:
        if progress.stage == "data":
            (tmp_path / "tiny.gguf").unlink()

    with pytest.raises(ConfigError, match=r"base\.path: there is nothing at"):
        run(tmp_path, a_config(tmp_path, 2), "gone", on_progress=remove)
    assert workers_of(os.getpid()) == []


def test_secure_devices_contribute_one_after_the_other_in_one_process(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, changes={"simulation": {"secure": True}})
    assert automatic.num_workers(config, a_manifest(config), base_bytes=10**12) == 1
    assert automatic.devices_per_batch(config, a_manifest(config)) == 1
    for setting in ("workers", "devices_per_batch"):
        with pytest.raises(ConfigError, match="must be 1 there"):
            tiny_run.config(tmp_path, changes={"simulation": {"secure": True, setting: 2}})


def a_manifest(config: RunConfig, num_parameters: int = 1000) -> Manifest:
    template = (("base_model.model.v_proj.lora_B.weight", (num_parameters // 2, 2)),)
    return planning.make_manifest(config, "run", planning.Base("0" * 64, template), None)


def test_a_short_run_gets_no_workers_and_a_long_one_as_many_as_there_are_cores(tmp_path: Path) -> None:
    changes = {"rounds": {"cohort_size": 400, "min_survivors": 400, "num_rounds": 10}}
    config = tiny_run.config(tmp_path, "device-server", changes)
    manifest = a_manifest(config)  # 10 rounds of 400 devices with 6 examples of 64 tokens: 1.5 million
    most = min(13, len(os.sched_getaffinity(0)))
    assert automatic.num_workers(config, manifest, base_bytes=2_500_000) == 1
    assert automatic.num_workers(config, manifest, base_bytes=2_700_000) == most
    longer = tiny_run.config(tmp_path, "device-server", {"rounds": changes["rounds"] | {"num_rounds": 30}})
    assert automatic.num_workers(longer, a_manifest(longer), base_bytes=1) == most, (
        "a small base's tokens take time too"
    )


def test_a_batch_has_as_many_devices_as_fit_its_memory(tmp_path: Path) -> None:
    changes = {"rounds": {"cohort_size": 400, "min_survivors": 400}}
    config = tiny_run.config(tmp_path, "device-server", changes)
    found = [automatic.devices_per_batch(config, a_manifest(config, size)) for size in (1000, 10**6, 10**7)]
    assert found == [32, 7, 1]


def test_what_was_chosen_is_stored_with_the_run_and_kept_when_it_goes_on(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    assert config.simulation.devices_per_batch == config.simulation.workers == 0
    run(tmp_path, config, "run")
    stored = load_run_config(tmp_path / "run" / "config.toml").simulation
    assert (stored.workers, stored.devices_per_batch) == (1, 5)
    run(tmp_path, config, "run", resume=True)  # what is left to choose is no other run
    other = tiny_run.config(tmp_path, changes={"simulation": {"devices_per_batch": 1}})
    with pytest.raises(StateError, match="simulation settings differ"):
        run(tmp_path, other, "run", resume=True)


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_device_is_in_exactly_one_batch(num_devices: int, devices_per_batch: int) -> None:
    devices = [str(index) for index in range(num_devices)]
    found = batches(devices, devices_per_batch)
    assert [device for batch in found for device in batch] == devices
    assert all(0 < len(batch) <= devices_per_batch for batch in found)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(1, 12), max_size=4), max_size=4))
def test_examples_reach_a_worker_as_they_are(lengths: list[list[int]]) -> None:
    devices = [
        [EncodedExample(np.arange(size, dtype=np.int32), np.arange(size) % 3 == 1) for size in own] for own in lengths
    ]
    names = [f"device-{index}" for index in range(len(devices))]
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as writing:
        frames.write(writing, Frame({"devices": names}, frames.pack_examples(devices)))
    with os.fdopen(read_end, "rb") as reading:
        frame = frames.read(reading)
        assert frame is not None and frames.read(reading) is None
    found = frames.unpack_examples(frame.words["devices"], frame.tensors)
    assert list(found) == names
    for own, expected in zip(found.values(), devices, strict=True):
        assert [(e.tokens.tolist(), e.is_target.tolist()) for e in own] == [
            (e.tokens.tolist(), e.is_target.tolist()) for e in expected
        ]
