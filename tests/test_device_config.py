"""A device's own file: what its owner allows. Everything in it has a default, and what is wrong in it is named."""

from pathlib import Path

import pytest

from fedmini import config
from fedmini.errors import ConfigError

WHOLE = """
[device]
lifetime_epsilon = 6.0
lifetime_delta = 1e-6
[floors]
max_epsilon = 4.0
min_survivors = 20
allow_server_noise = false
"""


def load(tmp_path: Path, text: str = WHOLE, *overrides: str) -> config.DeviceConfig:
    path = tmp_path / "device.toml"
    path.write_text(text)
    return config.load_device_config(path, overrides)


def test_an_empty_file_is_a_whole_configuration(tmp_path: Path) -> None:
    found = load(tmp_path, "")
    assert (found.device.lifetime_epsilon, found.device.lifetime_delta) == (10.0, 1e-5)
    assert set(found.floors.model_dump().values()) == {None}
    assert found == config.parse_device_config({})


def test_what_the_file_says_is_there(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert (found.device.lifetime_epsilon, found.device.lifetime_delta) == (6.0, 1e-6)
    assert (found.floors.max_epsilon, found.floors.min_survivors, found.floors.max_devices) == (4.0, 20, None)
    assert found.floors.allow_server_noise is False


def test_an_override_replaces_one_value_and_unset_removes_it(tmp_path: Path) -> None:
    found = load(tmp_path, WHOLE, "floors.max_epsilon=2", "device.lifetime_epsilon=unset")
    assert found.floors.max_epsilon == 2.0
    assert found.device.lifetime_epsilon == 10.0


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("device.lifetime_epsilom=3", "unknown key device.lifetime_epsilom: did you mean lifetime_epsilon?"),
        ("floors.max_epsilons=3", "unknown key floors.max_epsilons: did you mean max_epsilon?"),
        ("flors.max_epsilon=3", "unknown key flors: did you mean floors?"),
        ("run.name=tiny", "unknown key run: known here: device, base, floors, store, conditions, training, consent"),
        ("device.lifetime_epsilon=0", "device.lifetime_epsilon: input should be greater than 0, got 0"),
        ("device.lifetime_epsilon=inf", "device.lifetime_epsilon: input should be a finite number"),
        (
            "device.lifetime_delta=1e-12",
            "device.lifetime_delta: input should be greater than 0.000000000001, got 1e-12",
        ),
        ("device.lifetime_delta=1", "device.lifetime_delta: input should be less than 1, got 1"),
        ("floors.max_epsilon=nan", "floors.max_epsilon"),
        ("floors.max_epsilon=-1", "floors.max_epsilon: input should be greater than 0, got -1"),
        ("floors.min_corrupt_fraction=1", "floors.min_corrupt_fraction: input should be less than 1, got 1"),
        ("floors.min_survivors=0", "floors.min_survivors: input should be greater than or equal to 1, got 0"),
        ("floors.allow_no_privacy=perhaps", "floors.allow_no_privacy: input should be a valid boolean"),
        ("device.server='https://[::1'", "device.server: expected https://HOST:PORT"),
        ("device.server='https://h:99999'", "device.server: expected https://HOST:PORT"),
        ("device.server='https://me:secret@h'", "device.server: expected https://HOST:PORT"),
        ("store.max_age_days=1e308", "store.max_age_days: input should be less than or equal to 1000000"),
        ("floors", "--set expects section.key=value"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, WHOLE, override)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"[device\n", "is not valid TOML"), (b"\xff\xfe", "is not UTF-8"), (None, "can't read the config")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "device.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        config.load_device_config(path)


@pytest.mark.parametrize("server", ["https://h", "https://h:1", "https://[::1]:65535", "http://127.0.0.1:8443"])
def test_a_servers_address_is_taken_as_it_is(server: str) -> None:
    assert config.parse_device_config({"device": {"server": server}}).device.server == server


@pytest.mark.parametrize("key", ["max_examples", "max_bytes"])
def test_a_limit_of_the_store_is_one_that_its_database_can_hold(key: str) -> None:
    assert config.parse_device_config({"store": {key: 2**63 - 1}})
    with pytest.raises(ConfigError, match=f"store.{key}: input should be less than"):
        config.parse_device_config({"store": {key: 2**63}})


def test_a_key_that_a_terminal_would_obey_is_shown_spelled_out(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text('[device]\n"\\u001b[2J" = 1\n')
    with pytest.raises(ConfigError) as refused:
        config.load_device_config(tmp_path / "device.toml")
    assert "\\x1b[2J" in str(refused.value) and "\x1b" not in str(refused.value)
