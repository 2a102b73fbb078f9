"""simulate --secure: the whole protocol in one process gives the very bits of the direct sum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmini import simulation
from fedmini.config import RunConfig
from fedmini.errors import CohortError, ConfigError
from fedmini.privacy.device_ledger import DeviceLedger
from fedmini.privacy.ledger import read_ledger
from fedmini.simulation import Progress, SimulationOptions, SimulationResult
from tests import tiny_run


def run(
    folder: Path, config: RunConfig, output: str, resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> SimulationResult:  # fmt: skip
    options = SimulationOptions(resume=resume, cache_dir=folder / "cache", on_progress=on_progress)
    return simulation.simulate(config, data=tiny_run.rows(), output=folder / output, options=options)


def both(
    folder: Path, privacy: str, changes: dict[str, Any] | None = None
) -> tuple[SimulationResult, SimulationResult]:
    """The same run with the direct sum in `direct`, and with secure aggregation in `secure`."""
    one_by_one = (changes or {}) | {"simulation": {"devices_per_batch": 1}}  # as secure devices contribute
    config = tiny_run.config(folder, privacy, one_by_one)
    secure = tiny_run.config(folder, privacy, (changes or {}) | {"simulation": {"secure": True}})
    return run(folder, config, "direct"), run(folder, secure, "secure")


def adapter_bytes(folder: Path, output: str) -> bytes:
    return (folder / output / "adapter" / "adapter_model.safetensors").read_bytes()


def ledger_content(folder: Path, output: str) -> list[tuple[Any, ...]]:
    """What a ledger says, but for the run's random name and the chain."""
    names = ("round", "attempt", "state", "unit", "z_eff", "sampling_rate", "participation", "seeded")
    return [tuple(line[name] for name in names) for line in read_ledger(folder / output / "ledger.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimulationResult, SimulationResult]:
    """The run with shared noise for examples, both ways, for those tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *both(folder, "example-shared")


@pytest.mark.parametrize("privacy", sorted(tiny_run.PRIVACY))
def test_secure_aggregation_gives_the_bits_of_the_direct_sum_in_every_mode(tmp_path: Path, privacy: str) -> None:
    direct, secure = both(tmp_path, privacy, {"rounds": {"num_rounds": 2}})
    assert adapter_bytes(tmp_path, "direct") == adapter_bytes(tmp_path, "secure")
    assert ledger_content(tmp_path, "direct") == ledger_content(tmp_path, "secure")
    assert [line["eval_loss"] for line in direct.history] == [line["eval_loss"] for line in secure.history]


def test_with_dropouts_and_lost_attempts_the_bits_are_the_same_too(tmp_path: Path) -> None:
    changes = {"rounds": {"num_rounds": 3, "min_survivors": 4, "dropout_rate": 0.3, "spare_attempts": 9}}
    direct, secure = both(tmp_path, "example-shared", changes)
    assert adapter_bytes(tmp_path, "direct") == adapter_bytes(tmp_path, "secure")
    assert ledger_content(tmp_path, "direct") == ledger_content(tmp_path, "secure")
    survivors = [line["num_survivors"] for line in secure.history[1:]]
    assert survivors == [line["num_survivors"] for line in direct.history[1:]]
    assert min(survivors) < 5, "nobody dropped: choose another seed"
    assert max(line[1] for line in ledger_content(tmp_path, "secure")) > 0, "no attempt was lost: choose another seed"


def test_devices_of_a_lost_attempt_are_left_alone_as_long_as_they_would_refuse(tmp_path: Path) -> None:
    """With two rounds between participations: who was in a lost attempt remembers it, and so must the server."""
    rounds = {"num_rounds": 4, "cohort_size": 4, "min_survivors": 3, "min_separation": 2, "max_participations": 2,
              "spare_attempts": 9, "dropout_rate": 0.3}  # fmt: skip
    found = []
    for secure in (False, True):
        simulated = {"secure": secure, "devices_per_batch": 1}
        config = tiny_run.config(tmp_path, "example-shared", {"rounds": rounds, "simulation": simulated})
        options = SimulationOptions(cache_dir=tmp_path / "cache")
        rows = tiny_run.rows(num_people=14)
        simulation.simulate(config, data=rows, output=tmp_path / str(secure), options=options)
        found.append((ledger_content(tmp_path, str(secure)), adapter_bytes(tmp_path, str(secure))))
    assert found[0] == found[1]
    assert max(line[1] for line in found[0][0]) > 0, "no attempt was lost: choose another seed"


def test_the_bytes_of_a_round_are_those_that_really_passed(finished) -> None:
    _, direct, secure = finished
    sent, received = (
        [(before[key], after[key]) for before, after in zip(direct.history[1:], secure.history[1:], strict=True)]
        for key in ("upload_bytes_per_device", "download_bytes_per_device")
    )
    # Five devices: for each, keys, sealed shares, commitments and what is revealed of it take some hundred bytes.
    assert all(1_000 < after - before < 3_000 for before, after in sent)
    assert all(2_000 < after - before < 6_000 for before, after in received)


def test_too_many_lost_attempts_end_the_run_with_everything_saved(tmp_path: Path) -> None:
    changes = {"rounds": {"dropout_rate": 0.9}, "simulation": {"secure": True}}
    config = tiny_run.config(tmp_path, "example-shared", changes)
    with pytest.raises(CohortError, match=r"devices sent their vectors, 4 are needed; what was debited stays spent"):
        run(tmp_path, config, "secure")
    assert json.loads((tmp_path / "secure" / "privacy.json").read_text())["ledger_lines"] == 1


def test_what_devices_wrote_down_themselves_is_what_the_server_says(tmp_path: Path) -> None:
    _, secure = both(tmp_path, "device-shared")
    guarantee = secure.privacy["guarantees"][0]
    ledgers = list((tmp_path / "secure" / "devices").glob("*.jsonl"))
    spent = []
    for path in ledgers:
        with DeviceLedger.open(path) as ledger:
            spent.append((len(ledger.releases()), ledger.epsilon("device", guarantee["delta"])))
    assert max(spent) == (guarantee["num_releases"], guarantee["epsilon"])
    assert sum(count for count, _ in spent) == sum(line["num_sampled"] for line in secure.history)


@pytest.mark.parametrize("num_devices", [1, 5, 8])
def test_an_interrupted_seeded_run_goes_on_to_the_same_bits_at_no_cost(
    tmp_path: Path, finished, num_devices: int
) -> None:
    whole, _, _ = finished
    config = tiny_run.config(whole, "example-shared", {"simulation": {"secure": True}})
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, "broken", on_progress=tiny_run.interrupt_after(num_devices))
    run(tmp_path, config, "broken", resume=True)
    assert adapter_bytes(tmp_path, "broken") == adapter_bytes(whole, "direct")
    assert ledger_content(tmp_path, "broken") == ledger_content(whole, "direct")


def test_an_interrupted_unseeded_run_asks_its_devices_for_a_new_attempt(tmp_path: Path) -> None:
    changes = {"rounds": {"spare_attempts": 1}, "simulation": {"secure": True}}
    config = tiny_run.config(tmp_path, "example-shared", changes)
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": None})})
    with pytest.raises(tiny_run.KilledError):
        run(tmp_path, config, "run", on_progress=tiny_run.interrupt_after(7))
    result = run(tmp_path, config, "run", resume=True)
    lines = ledger_content(tmp_path, "run")
    assert [line[:2] for line in lines] == [(1, 0), (2, 0), (2, 1), (3, 0)]
    assert [line["num_survivors"] for line in result.history[1:]] == [5, 5, 5], "every device allowed it"


def test_the_statement_says_how_the_sum_was_formed_and_what_that_rests_on(finished) -> None:
    _, direct, secure = finished
    assert direct.privacy["secure_aggregation"].startswith("none")
    found = secure.privacy["secure_aggregation"]
    # Four devices at least, so a threshold of three: 2 * 3 > 4 + 1, and no more.
    assert "a server that lies, together with up to 1 of its devices, whichever 4 to 5" in found["holds_against"]
    assert any("4 or more devices are in every sum" in assumption for assumption in found["assumes"])
    guarantee = secure.privacy["guarantees"][0]
    assert guarantee["epsilon_of_a_lone_honest_device"] > guarantee["epsilon"]
    assert "the server included" in guarantee["holds_against"]


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ({"cohort_size": 151, "min_survivors": 4}, "at most 150 devices a round"),
        ({"cohort_size": 4, "over_selection": 1.75}, "needs 5 to stay, and min_survivors is 4"),
        ({"cohort_size": 5, "min_survivors": 3}, "needs 4 to stay, and min_survivors is 3"),
    ],
)
def test_a_cohort_that_could_never_be_summed_is_said_before_training(
    tmp_path: Path, rounds: dict[str, Any], message: str
) -> None:
    config = tiny_run.config(tmp_path, "example-shared", {"rounds": rounds, "simulation": {"secure": True}})
    options = SimulationOptions(cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match=message):
        simulation.simulate(
            config, data=tiny_run.rows(num_people=160, num_examples=4), output=tmp_path / "x", options=options
        )
