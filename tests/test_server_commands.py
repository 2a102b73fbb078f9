"""What the operator of a server does, through the command line: from an empty folder to devices that may log in."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from fedmini import config, manifest_file, operator_keys, server_folder
from fedmini.secagg import trust_text
from tests import tiny_run
from tests.command_line import Shell, a_shell, done


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return a_shell(tmp_path, capsys, monkeypatch)


def prepared(shell: Shell, *names: str) -> None:
    """An operator in op, a server in srv that knows it, and devices that are enrolled with both."""
    done(shell("operator", "init", "op"))
    done(shell("server", "init", "srv", "--host", "fl.example.org", "--operator", "op/operator.pub"))
    for name in names:
        done(shell("device", "init", name))
        done(shell("operator", "certify", "op", f"{name}/device.pub", "--name", name, "--output", f"{name}.json"))
        done(shell("server", "enroll", "srv", f"{name}/device.pub", "--certificate", f"{name}.json"))


def listed(shell: Shell) -> list[str]:
    """The devices that may log in, as they are shown."""
    said = done(shell("server", "devices", "list", "srv"))
    return re.findall(r"^device +(\S+),", said, re.MULTILINE)


def test_from_an_empty_folder_to_a_device_that_may_log_in_as_the_commands_say(shell: Shell) -> None:
    said = done(shell("server", "init", "srv", "--host", "fl.example.org", "--host", "10.0.0.1", "--port", "443"))
    for command in (
        "fedmini operator init OPERATOR",
        "fedmini server follow srv operator.pub",
        "fedmini operator certify OPERATOR DEVICE.pub --name NAME --output CERT.json",
        "fedmini server enroll srv DEVICE.pub --certificate CERT.json",
        "fedmini server start srv",
    ):
        assert f"  {command}" in said
    assert "srv/tls/ca.crt" in said and "sign-manifest" not in said
    found = server_folder.opened(Path("srv")).config.server
    assert (found.host, found.other_hosts, found.port) == ("fl.example.org", ("10.0.0.1",), 443)
    done(shell("operator", "init", "op"))
    assert "follow srv OPERATOR.pub" in shell("server", "devices", "list", "srv").complaint
    said = done(shell("server", "follow", "srv", "op/operator.pub"))
    assert operator_keys.read_public_key(Path("op/operator.pub")).hex() in said and "0 devices may log in" in said
    done(shell("device", "init", "anna"))
    said = done(shell("operator", "certify", "op", "anna/device.pub", "--name", "anna", "--output", "anna.json"))
    assert "fedmini server enroll DIR DEVICE.pub --certificate CERTIFICATE.json" in said
    said = done(shell("server", "enroll", "srv", "anna/device.pub", "--certificate", "anna.json"))
    key = operator_keys.read_device_keys(Path("anna/device.pub")).device_key.hex()
    assert f"Enrolled anna, which signs with {key}: is it the key that the device shows?" in said
    assert f"device       anna, signs with {key}" in done(shell("server", "devices", "list", "srv"))


def test_a_run_is_planned_with_the_folder_signed_elsewhere_and_put_where_it_is_said(
    shell: Shell, tmp_path: Path
) -> None:
    unit = {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 4.0, "target_delta": 1e-5}
    chosen = tiny_run.config(tmp_path, changes={"privacy": {"example": unit}})
    Path("run.toml").write_text(tomli_w.dumps(chosen.model_dump(mode="json", exclude_none=True)))
    said = shell("server", "init", "srv", "--host", "fl.example.org", "--run", "run.toml").out
    assert (
        "there, with srv/runs/tiny/manifest.json; then bring the answer here, as srv/runs/tiny/manifest.signed.json:"
        in said
    )
    assert "  fedmini operator sign-manifest OPERATOR manifest.json" in said
    done(shell("operator", "init", "op"))
    done(shell("operator", "sign-manifest", "op", "srv/runs/tiny/manifest.json"))
    signed = trust_text.read_signed_manifest(Path("srv/runs/tiny/manifest.signed.json").read_bytes())
    assert manifest_file.canonical(signed.manifest) == Path("srv/runs/tiny/manifest.json").read_bytes()
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", signed.manifest.run_id)
    assert config.load_run_config(Path("srv/runs/tiny/config.toml")).rounds == chosen.rounds


def test_a_new_login_key_needs_no_new_certificate(shell: Shell) -> None:
    prepared(shell, "anna")
    before = server_folder.opened(Path("srv")).devices()["anna"]
    done(shell("device", "new-login", "anna"))
    done(shell("server", "enroll", "srv", "anna/device.pub"))
    after = server_folder.opened(Path("srv")).devices()["anna"]
    assert after.certificate == before.certificate and after.login_key_bytes != before.login_key_bytes
    done(shell("device", "init", "new"))
    assert "is not enrolled yet: add --certificate" in shell("server", "enroll", "srv", "new/device.pub").complaint


def test_with_the_operator_s_folder_here_it_certifies_and_says_that_it_should_be_elsewhere(shell: Shell) -> None:
    prepared(shell)
    done(shell("device", "init", "anna"))
    said = done(shell("server", "enroll", "srv", "anna/device.pub", "--operator", "op", "--name", "anna"))
    assert "This machine has the operator's key: it is meant to be elsewhere" in said
    assert listed(shell) == ["anna"] and Path("op/devices/anna.json").exists()
    said = done(shell("server", "devices", "revoke", "srv", "anna", "--operator", "op"))
    assert "meant to be elsewhere" in said and "revocations number 1" in said
    assert listed(shell) == [] and not Path("op/devices/anna.json").exists()
    complaint = shell("server", "enroll", "srv", "anna/device.pub", "--operator", "op", "--name", "anna").complaint
    assert "this key was revoked" in complaint


def test_a_device_is_cut_off_here_or_by_the_operator_everywhere(shell: Shell) -> None:
    prepared(shell, "anna", "ben", "carl")
    said = done(shell("server", "devices", "revoke", "srv", "anna"))
    assert "fedmini operator revoke OPERATOR anna" in said and listed(shell) == ["ben", "carl"]
    done(shell("operator", "revoke", "op", "ben"))
    revoke = ("server", "devices", "revoke", "srv")
    complaint = shell(*revoke, "carl", "--revocations", "op/revocations.json").complaint
    assert "these revocations don't have the key of carl" in complaint and listed(shell) == ["ben", "carl"]
    done(shell(*revoke, "ben", "--revocations", "op/revocations.json"))
    assert listed(shell) == ["carl"]
    done(shell("operator", "revoke", "op", "carl"))
    assert "revocations  number 2" in done(shell("server", "follow", "srv", "op/revocations.json"))
    assert listed(shell) == []


def test_a_login_key_that_was_cut_off_is_refused_and_a_new_one_is_not(shell: Shell) -> None:
    prepared(shell, "anna")
    enroll = ("server", "enroll", "srv", "anna/device.pub", "--certificate", "anna.json")
    opened = server_folder.opened(Path("srv"))
    login_key = opened.device("anna").login_key_bytes
    done(shell("server", "devices", "revoke", "srv", "anna"))
    opened.note_spent(login_key)  # as a running server does that has cut it off
    opened.note_spent(login_key)
    complaint = shell(*enroll).complaint
    assert "the login key of anna was cut off" in complaint and "`fedmini device new-login`" in complaint
    assert listed(shell) == []
    done(shell("device", "new-login", "anna"))
    done(shell(*enroll))
    assert listed(shell) == ["anna"]


def test_a_server_follows_a_rotation_with_the_files_that_the_operator_has(shell: Shell) -> None:
    prepared(shell, "anna", "ben", "carl")
    done(shell("operator", "revoke", "op", "carl"))
    done(shell("operator", "rotate", "op"))
    files = ("op/rotations.json", "op/revocations.json", "op/devices/anna.json")
    said = done(shell("server", "follow", "srv", *files))
    assert re.search(r"anna, signs with [0-9a-f]{64}$", said, re.MULTILINE)
    assert re.search(
        r"ben, signs with [0-9a-f]{64}, NOT VALID: certified by an operator key of before$", said, re.MULTILINE
    )
    said = done(shell("server", "follow", "srv", "op/operator.pub", "op/devices/anna.json", "op/devices/ben.json"))
    assert "NOT VALID" not in said and "2 devices may log in" in said


def test_a_certificate_is_renewed_and_says_what_devices_need(shell: Shell) -> None:
    prepared(shell)
    before = Path("srv/tls/ca.crt").read_bytes()
    assert "No device has to know" in done(shell("server", "rotate-certificate", "srv"))
    assert Path("srv/tls/ca.crt").read_bytes() == before
    said = done(shell("server", "rotate-certificate", "srv", "--new-ca"))
    assert "give every device srv/tls/ca.crt" in said and "Where its key was stolen" in said
    assert Path("srv/tls/ca.crt").read_bytes().endswith(before)


def test_a_backup_says_what_is_in_it_and_a_restored_server_what_is_not(shell: Shell) -> None:
    prepared(shell, "anna")
    said = done(shell("server", "backup", "srv", "a.tar"))
    assert "secrets, not encrypted" in said and "fedmini server restore a.tar NEW-DIR" in said
    assert Path("a.tar").stat().st_mode & 0o777 == 0o600
    said = done(shell("server", "restore", "a.tar", "new"))
    assert "Never let two servers go on with one run" in said and "fedmini server follow new revocations.json" in said
    assert list(server_folder.opened(Path("new")).devices()) == ["anna"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("init srv --host a.org", "srv is there already"),
        ("init new", "Missing option '--host'"),
        ("init new --host https://a.org", "--host and --port: server.host: expected a host's name or address"),
        ("init new --host a.org --host b/c", "server.other_hosts.0: expected a host's name"),
        ("init new --host a.org --port 70000", "server.port: input should be less than or equal to 65535, got 70000"),
        ("init new --host a.org --operator op/operator.key", "got a private one"),
        ("init new --host a.org --operator gone.pub", "can't read gone.pub"),
        ("init new --host a.org --run gone.toml", "can't read the config gone.toml"),
        ("enroll op anna/device.pub --certificate anna.json", "op is no server's folder: make one with `fedmini server init op"),
        ("enroll srv anna.json --certificate anna.json", "this is another, or of another version"),
        ("enroll srv anna/device.key --certificate anna.json", "got a private one"),
        ("enroll srv anna/device.pub --certificate anna/device.pub", "\"format\": \"fedmini/certificate/v1\""),
        ("enroll srv anna/device.pub --certificate ben.json", "take both from the same device"),
        ("enroll srv ben/device.pub --certificate ben2.json", "this device is enrolled, as ben"),
        ("enroll srv ben/device.pub --certificate theirs.json", "'ben' is not signed by the operator key"),
        ("enroll srv ben/device.pub --certificate ben.json --operator op", "give either --certificate, or --operator"),
        ("enroll srv ben/device.pub --name ben", "give either --certificate, or --operator with --name"),
        ("enroll srv ben/device.pub --operator anna", "anna is no operator's folder"),
        ("enroll srv gone.pub", "can't read gone.pub"),
        ("devices list op", "op is no server's folder"),
        ("devices revoke srv ana", "no device is enrolled here as 'ana': did you mean anna?"),
        ("devices revoke srv anna --operator op --revocations x", "give either --operator or --revocations"),
        ("devices revoke srv anna --revocations anna.json", "anna.json: expected a file that says"),
        ("devices", "Missing command (see `fedmini server devices --help`)"),
        ("follow srv theirs/operator.pub", "relies on the operator key"),
        ("follow srv theirs/rotations.json", "another operator's, or changed"),
        ("follow srv anna/device.pub", "rotations, revocations or a certificate, one file of each, but for certificates"),
        ("follow srv theirs.json", "'ben' is not signed by the operator key"),
        ("rotate-certificate op", "op is no server's folder"),
        ("backup op b.tar", "op is no server's folder"),
        ("backup srv anna.json", "anna.json is there already"),
        ("backup srv gone/a.tar", "can't back srv up in gone/a.tar: No such file or directory"),
        ("restore anna.json new", "anna.json is no whole backup of a server's folder: it is no tar file, or was cut"),
        ("restore gone.tar new", "can't read gone.tar: No such file or directory"),
        ("restore a.tar srv", "srv is there already"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_said_in_one_line(shell: Shell, arguments: str, says: str) -> None:
    prepared(shell, "anna", "ben")
    done(shell("server", "backup", "srv", "a.tar"))
    done(shell("operator", "init", "theirs"))
    done(shell("operator", "certify", "theirs", "ben/device.pub", "--name", "ben", "--output", "theirs.json"))
    done(shell("operator", "rotate", "theirs"))
    Path("op/devices/ben.json").unlink()
    done(shell("operator", "certify", "op", "ben/device.pub", "--name", "ben2", "--output", "ben2.json"))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    answer = shell("server", *arguments.split())
    assert says in answer.complaint
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for secret in ("op/operator.key", "srv/tls/ca.key", "anna/device.key"):
        body = Path(secret).read_text().splitlines()[1]
        assert body[24:36] not in answer.out + answer.err


def test_an_encrypted_operator_key_needs_its_passphrase_here_too(shell: Shell) -> None:
    Path("pass").write_text("correct horse battery staple\n")
    done(shell("operator", "init", "op", "--passphrase-file", "pass"))
    done(shell("server", "init", "srv", "--host", "a.org", "--operator", "op/operator.pub"))
    done(shell("device", "init", "anna"))
    enroll = ("server", "enroll", "srv", "anna/device.pub", "--operator", "op", "--name", "anna")
    assert "add --passphrase-file" in shell(*enroll).complaint
    done(shell(*enroll, "--passphrase-file", "pass"))
    done(shell("server", "devices", "revoke", "srv", "anna", "--operator", "op", "--passphrase-file", "pass"))


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom fedmini import cli\nsys.argv[1:] = ['server', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as error:\n    assert not error.code\n"
        "heavy = ('torch', 'numpy', 'pydantic', 'rich', 'cryptography')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.endswith("[]\n")


@pytest.mark.parametrize(
    "command",
    [
        ("init",), ("enroll",), ("devices", "list"), ("devices", "revoke"), ("follow",), ("rotate-certificate",), ("backup",),
        ("restore",),
    ],
)  # fmt: skip
def test_the_help_of_a_command_says_what_its_arguments_are(shell: Shell, command: tuple[str, ...]) -> None:
    said = done(shell("server", *command, "--help"))
    assert "\\" not in said and re.search(r"^  DIR +The (server's folder|folder to be made)", said, re.MULTILINE)
    arguments = said.split("Arguments:\n")[1].split("\n\n")[0]
    assert all(re.match(r"  +\S+  +\S|   {8}", line) for line in arguments.splitlines()), arguments


@pytest.mark.parametrize("group", [("server",), ("server", "devices")])
def test_no_command_is_cut_short_in_the_list(shell: Shell, group: tuple[str, ...]) -> None:
    said = done(shell(*group, "--help"))
    assert "..." not in said.replace("COMMAND [ARGS]...", "")
