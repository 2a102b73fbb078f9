"""The programs in clients/: their READMEs work when pasted, Node.js really talks to a device, device.toml is the truth."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedmini import cli
from fedmini import config as configuration
from fedmini.config import DeviceConfig
from tests import tiny_llama
from tests.deployment import deployed
from tests.device_service import serving

ROOT = Path(__file__).parent.parent
CLIENTS = ROOT / "clients"
BIN = Path(sys.executable).parent
READMES = ("README.md", "edge_daemon/README.md", "node/README.md")
WAIT_S = 170.0
NO_REGISTRY = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|ENETUNREACH|network")
KEY = re.compile(r"(?P<off># )?(?P<key>[a-z_]+) = (?P<value>\"[^\"]*\"|\[.*\]|[^#\s]+)(?P<comment>\s+# .+)?")


def run(*command: str | Path, folder: Path, typed: bytes = b"") -> tuple[int, str]:
    """A program's end, and all that it printed."""
    environment = serving.environment(PATH=f"{BIN}:{os.environ['PATH']}")
    ended = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        timeout=WAIT_S,
    )
    return ended.returncode, ended.stdout.decode()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The clients in a folder of their own, and beside them tiny.toml: a device's file that names the tiny model."""
    shutil.copytree(CLIENTS, tmp_path / "clients", ignore=shutil.ignore_patterns("node_modules"))
    gguf = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tiny.toml").write_text(f'[base]\npath = {json.dumps(str(gguf))}\ncompute_dtype = "float32"\n')
    return tmp_path


def install_node_modules(checkout: Path) -> None:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    code, said = run("npm", "ci", "--prefix", "clients/node", "--ignore-scripts", folder=checkout)
    if code and NO_REGISTRY.search(said):
        pytest.skip("npm's registry can't be reached")
    assert code == 0, said


def blocks(readme: str, language: str = "bash") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (CLIENTS / readme).read_text(), re.MULTILINE | re.DOTALL)


def pasted(readme: str) -> str:
    """All of its commands, as one script; each device that is made there gets the tiny model."""
    script = "".join(blocks(readme))
    return re.sub(r"^(fedmini device init (\S+).*)$", r"\1\ncp tiny.toml \2/device.toml", script, flags=re.MULTILINE)


def test_the_chat_program_of_the_readme_works_when_pasted(checkout: Path) -> None:
    script = pasted("README.md").split("\npython ")
    assert len(script) == 2, "one command that makes the folder, one that reads the terminal"
    assert run("bash", "-euc", script[0], folder=checkout)[0] == 0
    typed = b"ab\n/teach Tea, always.\n/teach\n/status\n/receipts\nb\xff\xfe\n/consent abc\n/help\n/forget\n/status\n/quit\nx"
    code, said = run("bash", "-euc", f"python {script[1]}", folder=checkout, typed=typed)
    assert code == 0, said
    assert "Traceback" not in said
    first, last = said.index("2 examples, 0 contributions, {}"), said.index("0 examples, 0 contributions, {}")
    assert first < said.index("this device is not enrolled") < said.rindex("/teach [A BETTER REPLY]") < last


def test_the_python_of_the_readme_works_when_pasted(checkout: Path) -> None:
    assert run("bash", "-euc", pasted("README.md").split("\npython ")[0], folder=checkout)[0] == 0
    (program,) = blocks("README.md", "python")
    code, said = run(sys.executable, "-c", program, folder=checkout)
    assert code == 0, said
    assert said.endswith("it was not started\n")


def test_the_daemons_readme_works_when_pasted(checkout: Path) -> None:
    code, said = run("bash", "-euc", pasted("edge_daemon/README.md"), folder=checkout)
    assert code == 0, said
    assert said.endswith("Added 1 example to edge: it keeps 1.\n")


@pytest.mark.slow
def test_the_readme_of_node_works_when_pasted_over_a_socket_and_over_loopback(checkout: Path) -> None:
    install_node_modules(checkout)
    script = pasted("node/README.md").replace("kill $!", "kill $!; wait $! && echo ended well")
    script = script.replace("7070", str(deployed.free_port()))
    code, said = run("bash", "-euc", f"trap 'kill $(jobs -p)' EXIT; {script}trap - EXIT", folder=checkout)
    assert code == 0, said
    assert said.count("taught: 2 examples") == 2 and said.count("ended well") == 2
    assert "keeps: 2 examples" in said and "keeps: 4 examples" in said


def test_node_uses_a_device_and_makes_it_forget(checkout: Path) -> None:
    install_node_modules(checkout)
    folder = serving.a_folder(checkout / "device")
    path = folder / "device.sock"
    with serving.serving(folder, "--socket", path) as daemon:
        code, said = run("node", "clients/node/example.mjs", path, "--forget", folder=checkout)
        assert code == 0, said
        assert re.match(r"the model says: .+?\ntaught: 2 examples\n", said, re.DOTALL)
        assert f"keeps: 2 examples, their key in {folder}/examples/store.key, 0600\n" in said
        assert said.endswith("not training: it was not started\nreceipts: 0\nafter forgetting: 0 examples\n")
        assert daemon.wait_for("service.answered", method="Reply")["code"] == "OK"
        assert "Tea" not in daemon.log.read_text()
        assert daemon.end() == 0


@pytest.mark.parametrize("readme", READMES)
def test_every_command_in_a_readme_exists_and_every_file_that_it_links_to(readme: str) -> None:
    text = (CLIENTS / readme).read_text()
    import typer

    known = typer.main.get_command(cli.app)
    for group, command in re.findall(r"fedmini (device|operator|server) ([a-z-]+)", text):
        assert command in known.commands[group].commands, f"{readme}: fedmini {group} {command}"
    for option in re.findall(r"(?<![\w-])--(?:socket|listen|server|server-key|token-file|log-format)\b", text):
        assert option in {name for one in known.commands["device"].commands["serve"].params for name in one.opts}
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (CLIENTS / readme).parent.joinpath(link).exists(), f"{readme}: {link}"


def shown(path: Path) -> Iterator[tuple[str, str, bool, str, str]]:
    """(section, key, whether it is in force, value, comment) for each key of a file, commented out or not."""
    section = ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if found := re.match(r"\[([a-z_]+)\]", line):
            section = found[1]
        elif found := KEY.fullmatch(line):
            yield section, found["key"], not found["off"], found["value"], (found["comment"] or "").strip()
        else:
            assert not line or line.startswith("# "), f"line {number}"


def defaults() -> Mapping[str, Mapping[str, Any]]:
    whole = DeviceConfig()
    return {section: dict(getattr(whole, section)) for section in DeviceConfig.model_fields}


def test_the_daemons_file_shows_every_key_of_every_section_once_with_its_default() -> None:
    found = list(shown(CLIENTS / "edge_daemon" / "device.toml"))
    known = [(section, key) for section, keys in defaults().items() for key in keys]
    assert sorted((section, key) for section, key, *_ in found) == sorted(known)
    for section, key, is_on, value, _ in found:
        default = defaults()[section][key]
        assert is_on == (default is not None), f"{section}.{key}: its default is {default}"
        parsed = tomllib.loads(f"value = {value}")["value"]
        if is_on:
            assert (list(default) if isinstance(default, tuple) else default) == parsed, f"{section}.{key}"


def test_every_value_that_the_daemons_file_shows_is_a_possible_one() -> None:
    for section, key, _, value, _ in shown(CLIENTS / "edge_daemon" / "device.toml"):
        needed = {"name": "smollm2-135m-q4"} if section == "base" and key not in ("name", "path", "hub_id") else {}
        configuration.parse_device_config({section: needed | tomllib.loads(f"{key} = {value}")})


def test_the_daemons_file_as_it_is_means_the_defaults(checkout: Path) -> None:
    assert configuration.load_device_config(CLIENTS / "edge_daemon" / "device.toml") == DeviceConfig()


def test_the_unit_starts_a_command_that_exists_and_systemd_takes_it(tmp_path: Path) -> None:
    unit = (CLIENTS / "edge_daemon" / "fedmini-device.service").read_text()
    (started,) = re.findall(r"^ExecStart=/opt/fedmini/bin/fedmini (.+)$", unit, re.MULTILINE)
    assert started == "device run /var/lib/fedmini/device --log-format json"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    here = tmp_path / "fedmini-device.service"
    here.write_text(unit.replace("/opt/fedmini/bin/fedmini", str(BIN / "fedmini")))
    assert run("systemd-analyze", "verify", here, folder=tmp_path) == (0, "")


def test_node_modules_are_never_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    assert run("git", "check-ignore", "-q", "clients/node/node_modules/x", folder=ROOT)[0] == 0


def test_what_node_installs_is_pinned_to_the_byte() -> None:
    wanted = json.loads((CLIENTS / "node" / "package.json").read_text())["dependencies"]
    locked = json.loads((CLIENTS / "node" / "package-lock.json").read_text())["packages"]
    assert set(wanted) == {"@grpc/grpc-js", "@grpc/proto-loader"}
    for name, version in wanted.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all(one["integrity"].startswith("sha512-") for name, one in locked.items() if name)


def test_the_apps_are_thin() -> None:
    for app in (*CLIENTS.glob("*.py"), *CLIENTS.glob("node/*.mjs")):
        assert len(app.read_text().splitlines()) <= 60, app
