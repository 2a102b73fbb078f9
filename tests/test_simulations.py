"""The shipped configurations load, plan and promise what their comments say."""

from pathlib import Path

import pytest

from fedmini import config, forecast, planning
from fedmini.model import packaged, shapes

FOLDER = Path(__file__).parents[1] / "simulations"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.toml"))


def plan(name: str) -> tuple[config.RunConfig, forecast.Forecast]:
    chosen = config.load_run_config(FOLDER / name)
    known = shapes._llama_shapes(packaged.PACKAGED[str(chosen.base.name)].config)
    base = planning.Base("base", shapes.template(known, planning.lora_shape(chosen)))
    manifest = planning.make_manifest(chosen, "run", base, None)
    return chosen, forecast.forecast(manifest)


def test_the_four_of_them_are_there() -> None:
    assert CONFIGS == ["chat.toml", "population.toml", "shakespeare.toml", "sotu.toml"]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_can_be_planned_and_its_noise_does_not_drown_its_signal(name: str) -> None:
    chosen, found = plan(name)
    assert chosen.run.seed is None, "a shipped run protects people: it has no seed"
    for unit in found.units:
        budget = getattr(chosen.privacy, unit.plan.unit).target_epsilon
        assert 0.98 * budget < unit.epsilon <= budget <= 8
        assert unit.plan.target_delta <= 1e-5
    assert found.noise_to_signal is not None and found.noise_to_signal < forecast.NOISE_TO_SIGNAL_LIMIT
    assert found.cohort_needed is None


@pytest.mark.parametrize(
    ("name", "unit", "noise"),
    [
        ("chat.toml", "example", "shared"),
        ("shakespeare.toml", "example", "shared"),
        ("sotu.toml", "example", "local"),
        ("population.toml", "device", "shared"),
    ],
)
def test_each_shows_its_own_mode(name: str, unit: str, noise: str) -> None:
    _, found = plan(name)
    assert [(one.plan.unit, one.plan.noise) for one in found.units] == [(unit, noise)]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_stands_in_the_readme_beside_it(name: str) -> None:
    assert name in (FOLDER / "README.md").read_text(encoding="utf-8")
