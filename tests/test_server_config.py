"""A server's own file: its name is needed, the rest has defaults, and what is wrong in it is named."""

from pathlib import Path

import pytest

from fedmini import config
from fedmini.errors import ConfigError


def load(tmp_path: Path, text: str = '[server]\nhost = "fl.example.org"\n', *overrides: str) -> config.ServerConfig:
    path = tmp_path / "server.toml"
    path.write_text(text)
    return config.load_server_config(path, overrides)


def test_a_name_is_all_that_a_server_needs(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert (found.server.host, found.server.port, found.server.log_format) == ("fl.example.org", 9092, "text")
    timing = found.timing
    assert (timing.advertise_s, timing.share_s, timing.contribute_s, timing.agree_s, timing.unmask_s) == (
        30,
        60,
        900,
        60,
        60,
    )
    assert (found.tls.certificate, found.limits.max_body_bytes) == (None, 8 * 2**20)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    values = {"server": {"host": "fl.example.org", "other_hosts": ["10.0.0.1", "FD00::1"]}, "timing": {"share_s": 5}}
    found = config.parse_server_config(values)
    assert found.server.other_hosts == ("10.0.0.1", "fd00::1")
    assert load(tmp_path, config.dump_server_config(found)) == found


def test_a_certificate_is_taken_from_the_file_s_own_folder(tmp_path: Path) -> None:
    text = '[server]\nhost = "a.org"\n[tls]\ncertificate = "own.crt"\nprivate_key = "/etc/own.key"\n'
    found = load(tmp_path, text)
    assert (found.tls.certificate, found.tls.private_key) == (tmp_path.resolve() / "own.crt", Path("/etc/own.key"))


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("server.host=unset", "server.host is missing"),
        ("server.host=https://fl.example.org", "server.host: expected a host's name or address"),
        ("server.host=fl.example.org:9092", "server.host: expected a host's name or address"),
        ("server.host=a..org", "server.host: expected a host's name or address"),
        ("server.host=-a.org", "server.host: expected a host's name or address"),
        ("server.host=10.0.0.256", "this is neither"),
        ("server.host=''", "server.host: expected a host's name or address"),
        ('server.other_hosts=["*.org"]', "server.other_hosts.0: expected a host's name or address"),
        ("server.port=0", "server.port: input should be greater than or equal to 1, got 0"),
        ("server.prot=1", "unknown key server.prot: did you mean port?"),
        ("server.log_format=xml", "server.log_format: input should be 'text' or 'json', got 'xml'"),
        ("tls.certificate=own.crt", "tls: give both of certificate and private_key, or neither"),
        ("timing.share_s=0", "timing.share_s: input should be greater than 0"),
        ("timing.unmask_s=inf", "timing.unmask_s: input should be a finite number"),
        ("limits.max_body_bytes=1", "limits.max_body_bytes: input should be greater than or equal to 65536"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, '[server]\nhost = "fl.example.org"\n', override)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
