"""One TOML file describes a run; whatever is wrong in it is named, with what would be right."""

from pathlib import Path

import pytest

from fedmini import config
from fedmini.errors import ConfigError

MINIMAL = """
[run]
name = "tiny"
[base]
name = "smollm2-135m-q4"
[data]
source = "chitchat"
held_out_devices = 4
[local]
sampling_rate = 0.1
[rounds]
num_rounds = 3
cohort_size = 8
[privacy.example]
noise = "shared"
clip_norm = 1.0
noise_multiplier = 1.0
target_delta = 1e-5
"""


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> config.RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return config.load_run_config(path, overrides)


def test_the_minimal_file_is_a_whole_configuration(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert found.rounds.cohort_size == 8
    assert found.lora.trained == "B"


def test_a_dumped_configuration_loads_as_the_same(tmp_path: Path) -> None:
    found = load(tmp_path, MINIMAL, "lora.layers=[1,2]", "rounds.max_participations=2")
    path = tmp_path / "again.toml"
    path.write_text(config.dump_run_config(found))
    assert config.load_run_config(path) == found


def test_an_override_replaces_one_value_and_unset_removes_it(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        MINIMAL,
        "privacy.example.target_epsilon=8",
        "privacy.example.noise_multiplier=unset",
        "run.name=other",
    )
    assert found.privacy.example is not None
    assert found.privacy.example.target_epsilon == 8
    assert found.privacy.example.noise_multiplier is None
    assert found.run.name == "other"


def test_a_relative_data_file_is_taken_from_the_configs_own_folder(tmp_path: Path) -> None:
    found = load(tmp_path, MINIMAL, "data.source=mine.jsonl")
    assert found.data.source == str(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.held_out_device=3", "unknown key data.held_out_device: did you mean held_out_devices?"),
        ("privacy.exampel.noise=local", "unknown key privacy.exampel: did you mean example?"),
        ("privacy.example.clipnorm=1", "unknown key privacy.example.clipnorm: did you mean clip_norm?"),
        ("local.sampling_rate=1.5", "local.sampling_rate: input should be less than or equal to 1, got 1.5"),
        ("local.sampling_rate=nan", "local.sampling_rate"),
        ("rounds.num_rounds=0", "rounds.num_rounds: input should be greater than or equal to 1, got 0"),
        ("privacy.example.target_epsilon=8", "give exactly one of target_epsilon and noise_multiplier"),
        ("privacy.example.noise_multiplier=unset", "give exactly one of target_epsilon and noise_multiplier"),
        ("privacy.none=true", "none = true stands beside"),
        ("privacy.example.noise=server", "privacy.example.noise: input should be 'local' or 'shared', got 'server'"),
        ("local.num_steps=2", "local.num_steps must be 1"),
        ("local.optimizer=adam", "there is no local optimizer"),
        ("data.held_out_devices=0", "hold people out"),
        ("rounds.min_survivors=9", "min_survivors = 9 is above cohort_size = 8"),
        ("data.min_examples=900", "min_examples is above max_examples_per_device"),
        ("base.path=x.gguf", "give exactly one of name, path, hub_id; got name, path"),
        ("run.name=a/b", "run.name"),
        ("local", "--set expects section.key=value"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL, override)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_any_privacy_table_has_to_say_so(tmp_path: Path) -> None:
    bare = MINIMAL[: MINIMAL.index("[privacy.example]")]
    with pytest.raises(ConfigError, match="privacy is missing"):
        load(tmp_path, bare)
    with pytest.raises(ConfigError, match="or say none = true"):
        load(tmp_path, bare + "[privacy]\nnone = false\n")
    assert load(tmp_path, bare + "[privacy]\nnone = true\n").privacy.none


def test_shared_example_noise_cannot_stand_beside_a_device_unit(tmp_path: Path) -> None:
    device = '\n[privacy.device]\nnoise = "shared"\nclip_norm = 1.0\nnoise_multiplier = 1.0\ntarget_delta = 1e-5\n'
    with pytest.raises(ConfigError, match="can't stand beside"):
        load(tmp_path, MINIMAL + device)
    both = load(tmp_path, MINIMAL + device, "privacy.example.noise=local")
    assert both.privacy.device is not None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"[run\n", "is not valid TOML"), (b"\xff\xfe", "is not UTF-8"), (None, "can't read the config")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        config.load_run_config(path)
