"""The main job in small: every privacy mode end to end, the run's directory, and what happens on a bad day."""

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmini import rundir, simulation
from fedmini.config import RunConfig
from fedmini.errors import CohortError, ConfigError, PrivacyBudgetError, StateError
from fedmini.model.adapters import load_peft
from fedmini.privacy import accounting
from fedmini.privacy.ledger import Ledger, read_ledger
from fedmini.simulation import SimulationOptions, SimulationResult
from fedmini.types import PrivacyEvent
from tests import tiny_run


def run(
    folder: Path, config: RunConfig, output: str = "run", resume: bool = False, on_progress=lambda progress: None
) -> SimulationResult:
    options = SimulationOptions(resume=resume, cache_dir=folder / "cache", on_progress=on_progress)
    return simulation.simulate(config, data=tiny_run.rows(), output=folder / output, options=options)


def adapter_bytes(folder: Path, output: str = "run") -> bytes:
    return (folder / output / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("privacy", sorted(tiny_run.PRIVACY))
def test_every_mode_runs_from_a_configuration_to_an_adapter(tmp_path: Path, privacy: str) -> None:
    result = run(tmp_path, tiny_run.config(tmp_path, privacy))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.toml", "manifest.json", "metrics.jsonl", "ledger.jsonl", "privacy.json", "adapter"}
    assert [line["round"] for line in result.history] == [0, 1, 2, 3]
    assert all(line["eval_loss"] > 0 for line in result.history)
    shape, adapter = load_peft(tmp_path / "run" / "adapter")
    assert shape.lora_rank == 2
    assert all(np.array_equal(adapter[name], value) for name, value in result.adapter.items())
    assert any(value.any() for value in adapter.values())


@pytest.mark.parametrize("privacy", sorted(set(tiny_run.PRIVACY) - {"none"}))
def test_epsilon_can_be_recomputed_from_the_ledger_file_alone(tmp_path: Path, privacy: str) -> None:
    result = run(tmp_path, tiny_run.config(tmp_path, privacy))
    lines = read_ledger(tmp_path / "run" / "ledger.jsonl")
    for guarantee in result.privacy["guarantees"]:
        own = [line for line in lines if line["unit"] == guarantee["unit"]]
        last = own[-1]
        event = PrivacyEvent(
            last["unit"], last["noise"], last["z_eff"], last["sampling_rate"], last["num_steps"], last["clip_norm"]
        )
        assert len(own) == 3
        assert last["participation"] == 3
        assert guarantee["epsilon"] == accounting.epsilon(event, 3, guarantee["delta"])
        assert guarantee["num_releases"] == 3
    assert result.privacy["noise_was_seeded"] and not result.privacy["is_private"]


def test_a_run_without_privacy_says_so(tmp_path: Path) -> None:
    result = run(tmp_path, tiny_run.config(tmp_path, "none"))
    assert "WITHOUT privacy" in result.privacy["summary"]
    assert not result.privacy["is_private"]
    assert result.privacy["guarantees"] == []


def test_training_without_privacy_lowers_the_loss_on_people_who_took_no_part(tmp_path: Path) -> None:
    changes = {"local": {"num_steps": 5, "learning_rate": 2.0, "sampling_rate": 1.0}, "rounds": {"num_rounds": 5}}
    result = run(tmp_path, tiny_run.config(tmp_path, "none", changes))
    assert result.loss_after < result.loss_before - 0.1


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(tmp_path, tiny_run.config(tmp_path, changes={"run": {"seed": seed}}), name)
    assert adapter_bytes(tmp_path, "a") == adapter_bytes(tmp_path, "b")
    assert adapter_bytes(tmp_path, "a") != adapter_bytes(tmp_path, "c")


def test_without_a_seed_two_runs_differ_and_the_statement_is_private(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": None})})
    first, second = run(tmp_path, config, "a"), run(tmp_path, config, "b")
    assert adapter_bytes(tmp_path, "a") != adapter_bytes(tmp_path, "b")
    assert first.privacy["is_private"] and not first.privacy["noise_was_seeded"]
    assert first.manifest.run_id != second.manifest.run_id


def test_dropouts_are_counted_and_the_mean_is_over_the_planned_cohort(tmp_path: Path) -> None:
    changes = {"rounds": {"dropout_rate": 0.3, "min_survivors": 1, "num_rounds": 6}}
    result = run(tmp_path, tiny_run.config(tmp_path, "none", changes))
    assert {line["num_sampled"] for line in result.history[1:]} == {5}
    assert min(line["num_survivors"] for line in result.history[1:]) < 5


@pytest.mark.parametrize("num_devices", [1, 5, 8])
def test_an_interrupted_seeded_run_goes_on_to_the_same_bits(tmp_path: Path, num_devices: int) -> None:
    config = tiny_run.config(tmp_path)
    whole = run(tmp_path, config, "whole")
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(num_devices))
    resumed = run(tmp_path, config, resume=True)
    assert adapter_bytes(tmp_path) == adapter_bytes(tmp_path, "whole")
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl")) == 3
    assert _losses(resumed.history) == _losses(whole.history)


def _losses(history: tuple[Mapping[str, Any], ...]) -> list[float]:
    return [line["eval_loss"] for line in history]


def test_an_interrupted_unseeded_run_pays_for_the_round_again(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": None})})
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(7))
    result = run(tmp_path, config, resume=True)
    lines = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert [(line["round"], line["attempt"]) for line in lines] == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert result.privacy["guarantees"][0]["num_releases"] == 4


def _run_and_die(folder: Path, config: RunConfig, resume: bool, seconds: float) -> bool:
    """One run in a process of its own, killed with SIGKILL after so many seconds; whether it had finished before."""
    pid = os.fork()
    if pid == 0:
        try:
            run(folder, config, resume=resume)
            os._exit(0)
        except BaseException:
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def test_killed_with_sigkill_at_any_moment_and_resumed_the_bits_are_the_same(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, changes={"rounds": {"num_rounds": 4}})
    started = time.monotonic()
    run(tmp_path, config, "whole")
    whole_seconds = time.monotonic() - started
    num_kills, finished = 0, False
    draw = np.random.default_rng(0)
    while not finished:
        begun = (tmp_path / "run" / "manifest.json").exists()
        # Growing patience: a machine that got slower must not turn this into an endless loop.
        patience = draw.uniform(0.05, 1.0) * whole_seconds * (1 + num_kills / 10)
        finished = _run_and_die(tmp_path, config, begun, patience)
        num_kills += not finished
        if finished and num_kills == 0:  # the machine got faster: once more, with less patience
            shutil.rmtree(tmp_path / "run")
            finished, whole_seconds = False, whole_seconds / 2
    assert adapter_bytes(tmp_path) == adapter_bytes(tmp_path, "whole")
    found = read_ledger(tmp_path / "run" / "ledger.jsonl")
    expected = read_ledger(tmp_path / "whole" / "ledger.jsonl")
    assert [line["round"] for line in found] == [line["round"] for line in expected]


def test_a_finished_run_that_is_resumed_only_says_its_result_again(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    first = run(tmp_path, config)
    before = adapter_bytes(tmp_path)
    again = run(tmp_path, config, resume=True)
    assert adapter_bytes(tmp_path) == before
    assert again.privacy == first.privacy


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, tiny_run.config(tmp_path))
    with pytest.raises(StateError, match="add --resume to go on with it, or choose another --output"):
        run(tmp_path, tiny_run.config(tmp_path))


def test_another_run_is_not_resumed_in_its_place(tmp_path: Path) -> None:
    run(tmp_path, tiny_run.config(tmp_path))
    other = tiny_run.config(tmp_path, changes={"local": {"learning_rate": 0.25}})
    with pytest.raises(StateError, match=r"holds another run .its local settings differ"):
        run(tmp_path, other, resume=True)


def test_where_nothing_began_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no run to resume"):
        run(tmp_path, tiny_run.config(tmp_path), resume=True)


def test_other_examples_than_the_run_began_with_are_refused(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(2))
    options = SimulationOptions(resume=True, cache_dir=tmp_path / "cache")
    with pytest.raises(StateError, match="the examples are not those"):
        simulation.simulate(config, data=tiny_run.rows(num_people=9), output=tmp_path / "run", options=options)


def test_a_ledger_that_lost_its_end_is_noticed_at_resume(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    run(tmp_path, config)
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(StateError, match="restored from a backup"):
        run(tmp_path, config, resume=True)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(StateError, match="is no run: choose another --output"):
        run(tmp_path, tiny_run.config(tmp_path))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_a_budget_that_ends_mid_run_stops_before_the_release_and_saves(tmp_path: Path) -> None:
    """Calibrated for three releases; a crash pays for one more, so the last round must not happen."""
    privacy = {"example": {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 4.0, "target_delta": 1e-3}}
    config = tiny_run.config(tmp_path, changes={"privacy": privacy})
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": None})})
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(7))
    with pytest.raises(PrivacyBudgetError, match="the budget is 4"):
        run(tmp_path, config, resume=True)
    history = rundir.read_metrics(rundir.RunDirectory(tmp_path / "run"))
    assert [line["round"] for line in history] == [0, 1, 2]
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert 3.9 < statement["guarantees"][0]["epsilon"] <= 4.0
    assert load_peft(tmp_path / "run" / "adapter")


def test_too_few_people_for_the_cohort_is_said_before_training(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, changes={"rounds": {"cohort_size": 7}})
    with pytest.raises(ConfigError, match=r"6 devices have .* rounds.cohort_size is 7"):
        run(tmp_path, config)


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't write to"):
        run(tmp_path, tiny_run.config(tmp_path), "file/run")


def test_no_file_of_a_run_holds_what_a_person_wrote(tmp_path: Path) -> None:
    secret = "qzxqzxqzx"
    rows = [row | {"prompt": secret, "response": secret} for row in tiny_run.rows()]
    options = SimulationOptions(cache_dir=tmp_path / "cache")
    simulation.simulate(tiny_run.config(tmp_path), data=rows, output=tmp_path / "run", options=options)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def unseeded(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": None})})


@pytest.mark.parametrize("privacy", ["example-shared", "none"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again_silently(tmp_path: Path, privacy: str) -> None:
    config = unseeded(tiny_run.config(tmp_path, privacy))
    run(tmp_path, config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(StateError, match="its checkpoints are gone"):
        run(tmp_path, config, resume=True)


def test_a_ledger_file_that_is_gone_is_noticed_even_in_the_first_round(tmp_path: Path) -> None:
    """Round 1 was debited, nothing committed since: the checkpoint of round 0 knows no line that could be missed."""
    config = unseeded(tiny_run.config(tmp_path))
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(2))
    (tmp_path / "run" / "ledger.jsonl").unlink()
    with pytest.raises(StateError, match=r"the ledger .* is gone"):
        run(tmp_path, config, resume=True)


@pytest.mark.parametrize("seed", [7, None])
def test_a_seeded_run_is_only_replayed_where_it_gives_the_same_bits(tmp_path: Path, seed: int | None) -> None:
    """Another torch computes other bits: repeating a debited attempt with it would be a second, unpaid release."""
    config = tiny_run.config(tmp_path)
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(7))
    path = tmp_path / "run" / "manifest.json"
    record = json.loads(path.read_text())
    record["environment"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    if seed is None:
        run(tmp_path, config, resume=True)
        return
    with pytest.raises(StateError, match="versions"):
        run(tmp_path, config, resume=True)


def test_a_seed_given_at_resume_is_another_run(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(7))
    for other in (unseeded(config), tiny_run.config(tmp_path, changes={"run": {"seed": 8}})):
        with pytest.raises(StateError, match="its run settings differ"):
            run(tmp_path, other, resume=True)


def test_a_seed_written_into_a_runs_own_settings_is_refused(tmp_path: Path) -> None:
    """Without a second debit, the replay of an attempt under another seed would be a release that nobody paid for."""
    config = tiny_run.config(tmp_path)
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, on_progress=tiny_run.interrupt_after(7))
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("seed = 7", "seed = 8"))
    options = SimulationOptions(resume=True, cache_dir=tmp_path / "cache")
    with pytest.raises(StateError, match="run settings"):
        simulation.simulate(None, data=tiny_run.rows(), output=tmp_path / "run", options=options)


def test_where_devices_run_out_what_was_paid_for_is_written(tmp_path: Path) -> None:
    """Six people, five a round, once each: round 2 can't be. Round 1's adapter and statement are there."""
    config = tiny_run.config(tmp_path, changes={"rounds": {"max_participations": 1}})
    with pytest.raises(CohortError, match="round 2: 1 of 6 devices may still take part"):
        run(tmp_path, config)
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert statement["guarantees"][0]["num_releases"] == 1
    assert any(value.any() for value in load_peft(tmp_path / "run" / "adapter")[1].values())


def test_an_evaluation_in_which_nothing_fits_is_said_before_training(tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text('{"text": "a"}\n')
    config = tiny_run.config(
        tmp_path, changes={"evaluation": {"source": str(evaluation)}, "data": {"template": "text"}}
    )
    with pytest.raises(ConfigError, match="no example to evaluate on"):
        run(tmp_path, config)


def test_the_second_of_two_runs_begun_in_one_folder_leaves_the_firsts_manifest_alone(tmp_path: Path) -> None:
    """Loading takes seconds: both found the folder empty. The ledger's lock decides, before anything is written."""
    (tmp_path / "run").mkdir()
    with (
        Ledger.open(tmp_path / "run" / "ledger.jsonl", "the first"),
        pytest.raises(StateError, match="in use by another process"),
    ):
        run(tmp_path, tiny_run.config(tmp_path))
    assert not (tmp_path / "run" / "manifest.json").exists()
