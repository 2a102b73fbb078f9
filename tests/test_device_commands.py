"""What a device's owner does, through the command line: enrolled, asked, told what it costs; and a whole round of it."""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fedmini import enrolment, floors, manifest_file, operator_keys, planning
from fedmini.config import parse_run_config
from fedmini.config.device_sections import DeviceSection, FloorsSection
from fedmini.errors import CohortError, FedMiniError
from fedmini.privacy import accounting
from fedmini.privacy.device_ledger import DeviceLedger
from fedmini.secagg import masks, signing_keys, trust_text
from fedmini.secagg.messages import Stage
from fedmini.secagg.trust import Trust
from fedmini.secure_sum import SecureSum
from fedmini.types import CohortSum, Contribution, DeviceId, Manifest, Residues, TrainTask
from tests.command_line import Shell, a_shell, done

NAMES = ("anna", "ben", "carl")
TEMPLATE = (("x.lora_B.weight", (64, 4)),)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return a_shell(tmp_path, capsys, monkeypatch)


def planned_with(privacy: dict[str, object], rounds: dict[str, object]) -> Manifest:
    values = {
        "run": {"name": "tiny"},
        "base": {"name": "smollm2-135m-q4"},
        "data": {"source": "x.jsonl", "held_out_devices": 1},
        "local": {"sampling_rate": 0.5, "expected_batch_size": 4.0},
        "rounds": rounds,
        "privacy": privacy,
    }
    return planning.make_manifest(parse_run_config(values), "tiny-0a1b2c3d", planning.Base("ab" * 32, TEMPLATE), None)


@cache
def planned(noise_multiplier: float = 3.0) -> Manifest:
    """Three devices, three rounds, and both units: about epsilon 1.6 of each example, and less of each device."""
    privacy = {
        "example": {"noise": "local", "clip_norm": 1.0, "noise_multiplier": noise_multiplier, "target_delta": 1e-5},
        "device": {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": 4.0, "target_delta": 1e-5},
    }
    return planned_with(privacy, {"num_rounds": 3, "cohort_size": 3, "min_survivors": 3})


def enrolled(shell: Shell, *names: str) -> None:
    """An operator in op, and devices that are enrolled with it, each in a folder of its name."""
    done(shell("operator", "init", "op"))
    for name in names:
        done(shell("device", "init", name))
        done(shell("operator", "certify", "op", f"{name}/device.pub", "--name", name, "--output", f"{name}.json"))
        done(shell("device", "enrol", name, f"{name}.json", "op/operator.pub"))


def signed(shell: Shell, manifest: Manifest | None = None) -> None:
    """The run's manifest, signed by op, in run.signed.json."""
    Path("run.json").write_bytes(manifest_file.canonical(manifest or planned()))
    done(shell("operator", "sign-manifest", "op", "run.json"))


def at_the_terminal(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    terminal = io.StringIO(typed)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)


# One command after the other


def test_from_an_empty_folder_to_a_run_that_was_agreed_to(shell: Shell) -> None:
    enrolled(shell, "anna")
    assert "fedmini device enrol new certificate.json operator.pub" in done(shell("device", "init", "new"))
    key = operator_keys.read_public_key(Path("op/operator.pub")).hex()
    said = done(shell("device", "enrol", "anna", "anna.json", "op/operator.pub"))
    assert f"Enrolled as anna with the operator {key}" in said and "in person" in said
    signed(shell)
    assert "Accepted run tiny-0a1b2c3d" in done(shell("device", "accept", "anna", "run.signed.json", "--yes"))
    said = done(shell("device", "accept", "anna", "run.signed.json"))
    assert "This device had agreed to it before" in said, "it asks nobody again"
    said = done(shell("device", "status", "anna"))
    assert f"operator       {key}" in said and "revocations    none seen" in said
    assert f"run            tiny-0a1b2c3d: 0 of at most 3 contributions; manifest {planned().hash}" in said


def test_what_a_run_may_cost_is_said_before_anything_is_asked(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    enrolled(shell, "anna")
    signed(shell)
    Path("anna/device.toml").write_text("[device]\nlifetime_epsilon = 1.5\n")
    at_the_terminal(monkeypatch, "\n")
    answer = shell("device", "accept", "anna", "run.signed.json")
    assert answer.code == 1 and "Agree? [y/N] Not accepted: nothing was changed" in answer.out
    assert "none accepted" in done(shell("device", "status", "anna"))

    release = planned().release
    assert release.example is not None and release.device is not None
    example, device = (accounting.rounded_up(floors.run_epsilon(unit, planned())) for unit in release.units)
    lone = accounting.rounded_up(floors.lone_epsilon(release.device, planned()))
    for line in (
        f"run            tiny-0a1b2c3d, manifest {planned().hash}",
        "takes part     at most 3 times, lost attempts counted, in 3 rounds of about 3 devices",
        f"may cost       example epsilon {example} at delta 1e-05, for one example of a device's frozen training set",
        f"may cost       device epsilon {device} at delta 1e-05, for one device's contribution to the run",
        "noise        local, 2.9998 times the clip norm 1",
        "noise        shared, 3.9998 times the clip norm 1",
        "against      everyone, the server included, whatever other devices do",
        "against      everyone, the server included, while at least 3 devices of every round are honest",
        f"lone         epsilon {lone}, were nobody else honest, nor the server",
        f"epsilon 0.000 of 1.5 is spent at delta 1e-05, 1.500 is left; {example} after the whole run",
        "that is above the limit: this device stops before",
    ):
        assert line in answer.out, line

    at_the_terminal(monkeypatch, "y\n")
    assert "Accepted run tiny-0a1b2c3d" in done(shell("device", "accept", "anna", "run.signed.json"))


def test_nobody_agrees_where_nobody_is(shell: Shell) -> None:
    enrolled(shell, "anna")
    signed(shell)
    answer = shell("device", "accept", "anna", "run.signed.json")
    assert "read the above, then add --yes" in answer.err and "may cost" in answer.out
    assert list(Path("anna/manifests").iterdir()) == []


def test_a_device_follows_a_rotation_with_its_certificate_and_revocations(shell: Shell) -> None:
    enrolled(shell, "anna", "ben")
    done(shell("operator", "revoke", "op", "ben"))
    said = done(shell("device", "follow", "anna", "op/revocations.json"))
    assert "revocations    number 1" in said and "certificate    by this operator key" in said
    shutil.copy("op/revocations.json", "old.json")
    done(shell("operator", "rotate", "op"))
    assert "plays back an old one" in shell("device", "follow", "anna", "op/rotations.json", "old.json").complaint
    said = done(shell("device", "follow", "anna", "op/rotations.json", "op/revocations.json"))
    assert "certificate    NOT VALID" in said and "which followed the one of the enrolment" in said
    said = done(shell("device", "follow", "anna", "op/devices/anna.json", "op/revocations.json", "op/rotations.json"))
    assert "certificate    by this operator key" in said and "revocations    number 2" in said
    said = done(shell("device", "follow", "ben", "op/rotations.json", "op/revocations.json"))
    assert "the certificate of device 'ben' was revoked by the operator; this device takes no part" in said
    signed(shell)
    done(shell("device", "accept", "anna", "run.signed.json", "--yes"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("enrol nowhere anna.json op/operator.pub", "nowhere is no device's folder: make one with `fedmini device init"),
        ("enrol anna ben.json op/operator.pub", "have the operator certify this folder's device.pub"),
        ("enrol anna anna.json op/operator.key", "got a private one"),
        ("enrol anna anna.json other/operator.pub", "anna relies on the operator key"),
        ("enrol anna run.signed.json op/operator.pub", 'run.signed.json: expected a file that says "format"'),
        ("enrol anna gone.json op/operator.pub", "can't read gone.json"),
        ("accept new run.signed.json --yes", "new is not enrolled: `fedmini device enrol new CERTIFICATE.json"),
        ("accept anna run.json --yes", "run.json is not signed: this device's operator has to, with `fedmini operator"),
        ("accept anna anna.json --yes", 'anna.json: expected a file that says "format": "fedmini/signed-manifest/v1"'),
        ("enrol anna op/operator.pub anna.json", "op/operator.pub is a public key: the order is DIR CERTIFICATE.json"),
        ("enrol new new.json other/operator.pub", "CERTIFICATE.json and OPERATOR.pub don't belong together"),
        ("withdraw anna 0123", "expected a manifest that this device agreed to, got 0123: it never agreed to it"),
        ("accept anna other.signed.json --yes", "the manifest is signed with the operator key"),
        ("status op", "op is no device's folder"),
        ("status new", "new is not enrolled"),
        ("follow anna run.json", "run.json: expected rotations, revocations or a certificate, one file of each"),
        ("follow anna anna.json anna.json", "anna.json: expected rotations, revocations or a certificate, one file of each"),
        ("follow anna op/operator.key", "op/operator.key: expected rotations, revocations or a certificate"),
        ("follow anna other/rotations.json", "don't go through the key that this device relies on"),
        ("init anna", "anna is there already"),
        ("", "Missing command (see `fedmini device --help`)"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_said_in_one_line(shell: Shell, arguments: str, says: str) -> None:
    enrolled(shell, "anna", "ben")
    signed(shell)
    done(shell("operator", "init", "other"))
    done(shell("operator", "rotate", "other"))
    done(shell("operator", "sign-manifest", "other", "run.json", "--output", "other.signed.json"))
    done(shell("device", "init", "new"))
    done(shell("operator", "certify", "op", "new/device.pub", "--name", "new", "--output", "new.json"))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    answer = shell("device", *arguments.split())
    assert says in answer.complaint
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    body = Path("op/operator.key").read_text().splitlines()[1]
    assert body[24:36] not in answer.out + answer.err


def test_a_damaged_folder_says_what_to_do_whatever_the_command(shell: Shell) -> None:
    enrolled(shell, "anna")
    signed(shell)
    file = Path("anna/rotations.json")
    file.write_bytes(file.read_bytes()[:-9])
    for command in (
        ("status", "anna"),
        ("accept", "anna", "run.signed.json", "--yes"),
        ("follow", "anna", "anna.json"),
    ):
        complaint = shell("device", *command).complaint
        assert "anna/rotations.json: expected rotations in JSON" in complaint and "from a backup" in complaint


def test_a_manifest_beyond_the_owners_limits_is_neither_shown_nor_accepted(shell: Shell) -> None:
    enrolled(shell, "anna")
    signed(shell)
    Path("anna/device.toml").write_text("[floors]\nmax_epsilon = 0.5\n")
    answer = shell("device", "accept", "anna", "run.signed.json", "--yes")
    assert "beyond this device's limits" in answer.complaint and "may cost" not in answer.out


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom fedmini import cli\nsys.argv[1:] = ['device', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as error:\n    assert not error.code\n"
        "heavy = ('torch', 'numpy', 'pydantic', 'rich', 'cryptography')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(
        re.search(rf"^  {name} ", said, re.MULTILINE) for name in ("init", "enrol", "accept", "status", "follow")
    )
    assert said.endswith("[]\n")


def test_a_device_that_is_enrolled_after_a_revocation_is_told_how_it_can_accept(shell: Shell) -> None:
    enrolled(shell, "ben")
    done(shell("operator", "revoke", "op", "ben"))
    done(shell("device", "init", "anna"))
    said = done(shell("operator", "certify", "op", "anna/device.pub", "--name", "anna"))
    assert "op/revocations.json need it too:\n  fedmini device follow DIR REVOCATIONS.json" in said
    done(shell("device", "enrol", "anna", "op/devices/anna.json", "op/operator.pub"))
    signed(shell)
    assert "op/revocations.json need it too" in done(shell("operator", "sign-manifest", "op", "run.json"))
    complaint = shell("device", "accept", "anna", "run.signed.json", "--yes").complaint
    assert complaint.endswith("take the newer list with `fedmini device follow DIR REVOCATIONS.json`")
    done(shell("device", "follow", "anna", "op/revocations.json"))
    done(shell("device", "accept", "anna", "run.signed.json", "--yes"))


def test_a_device_whose_certificate_is_not_valid_accepts_nothing(shell: Shell) -> None:
    enrolled(shell, "anna", "ben")
    done(shell("operator", "revoke", "op", "ben"))
    done(shell("device", "follow", "ben", "op/revocations.json"))
    signed(shell)
    complaint = shell("device", "accept", "ben", "run.signed.json", "--yes").complaint
    assert "this device can't take part: the certificate of device 'ben' was revoked" in complaint
    done(shell("operator", "rotate", "op"))
    signed(shell)
    done(shell("device", "follow", "anna", "op/rotations.json", "op/revocations.json"))
    complaint = shell("device", "accept", "anna", "run.signed.json", "--yes").complaint
    assert "after a rotation give all files to `fedmini device follow`" in complaint
    for name in ("anna", "ben"):
        assert "none accepted" in done(shell("device", "status", name))


def test_a_device_leaves_a_run_for_good_when_its_owner_says_so(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    enrolled(shell, "anna")
    signed(shell)
    done(shell("device", "accept", "anna", "run.signed.json", "--yes"))
    leave = ("device", "withdraw", "anna", planned().hash)
    assert "nobody is at the terminal to leave the run" in shell(*leave).complaint
    at_the_terminal(monkeypatch, "\n")
    answer = shell(*leave)
    assert answer.code == 1 and "for good? [y/N] Not left: nothing was changed" in answer.out
    assert planned().hash in done(shell("device", "status", "anna"))
    at_the_terminal(monkeypatch, "y\n")
    assert "Left run tiny-0a1b2c3d, for good" in done(shell(*leave))
    assert "none accepted" in done(shell("device", "status", "anna"))
    assert "has left run" in shell("device", "accept", "anna", "run.signed.json", "--yes").complaint
    assert "it has left that run" in shell(*leave, "--yes").complaint


def test_a_new_login_key_leaves_the_device_enrolled_and_says_what_the_server_needs(shell: Shell) -> None:
    enrolled(shell, "anna")
    before = operator_keys.read_device_keys(Path("anna/device.pub"))
    said = done(shell("device", "new-login", "anna"))
    assert "give anna/device.pub to the server" in said and "fedmini server enroll DIR DEVICE.pub" in said
    after = operator_keys.read_device_keys(Path("anna/device.pub"))
    assert after.device_key == before.device_key and after.login_key != before.login_key
    assert "device         anna, key" in done(shell("device", "status", "anna"))


def test_a_folder_of_before_login_keys_says_how_it_gets_one(shell: Shell) -> None:
    enrolled(shell, "anna")
    key = operator_keys.read_device_keys(Path("anna/device.pub")).device_key
    Path("anna/device.pub").write_bytes(signing_keys.write_public(key))
    Path("anna/login.key").unlink()
    assert "make another with `fedmini device new-login`" in shell("device", "status", "anna").complaint
    assert "`fedmini device new-login`" in shell("operator", "certify", "op", "anna/device.pub").complaint
    done(shell("device", "new-login", "anna"))
    done(shell("device", "status", "anna"))


def test_an_epsilon_that_was_not_counted_to_its_end_is_not_called_infinite(shell: Shell) -> None:
    """Of sixty devices' shares one is left: at a sixtieth of the variance, thirty rounds cost more than 100."""
    enrolled(shell, "anna")
    unit = {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": 4.0, "target_delta": 1e-5}
    rounds = {"num_rounds": 30, "cohort_size": 60, "min_survivors": 60}
    signed(shell, planned_with({"device": unit}, rounds))
    said = done(shell("device", "accept", "anna", "run.signed.json", "--yes"))
    assert "lone         epsilon above 100, or of too little noise to be counted, were nobody else" in said


@pytest.mark.parametrize("typed", ["", "y"])
def test_what_is_said_after_a_question_that_was_left_begins_on_a_new_line(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    enrolled(shell, "anna")
    signed(shell)
    at_the_terminal(monkeypatch, typed)
    said = shell("device", "accept", "anna", "run.signed.json").out
    assert "Agree? [y/N] \n" in said and re.search(r"^(Not a|A)ccepted", said, re.MULTILINE)


def test_a_key_that_is_missing_and_one_that_is_damaged_are_answered_alike(shell: Shell) -> None:
    enrolled(shell, "anna")
    Path("anna/device.key").write_bytes(Path("anna/device.key").read_bytes()[:-40])
    damaged = shell("device", "status", "anna").complaint
    Path("anna/device.key").unlink()
    assert shell("device", "status", "anna").complaint == damaged
    assert damaged.startswith("anna/device.key is missing or damaged: bring it back from a backup; or make another")


@pytest.mark.parametrize("name", ["certificate.json", "device.key"])
def test_who_may_not_read_the_folder_is_not_told_to_enrol_anew(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    enrolled(shell, "anna")
    really = Path.open

    def refuse(path: Path, *arguments: str):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return really(path, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    complaint = shell("device", "status", "anna").complaint
    assert complaint.endswith(
        f"anna/{name}: Permission denied; let the user who runs this own the folder and its files"
    )


def test_the_documents_table_of_device_toml_has_every_key_and_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs/secure-aggregation.md").read_text()
    rows = re.findall(r"^\| `\[(device|floors)\]` \| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE)
    defaults = {("device", name): field.default for name, field in DeviceSection.model_fields.items()}
    defaults |= {("floors", name): getattr(floors.COMPILED, name) for name in FloorsSection.model_fields}
    words = {"no limit": None, "none": None, "true": True, "false": False}
    assert {(group, key): words[value] if value in words else float(value) for group, key, value in rows} == defaults


COMMANDS = {
    "operator": ("init", "certify", "revoke", "rotate", "sign-manifest"),
    "device": ("init", "enrol", "new-login", "accept", "withdraw", "status", "follow", "serve", "run", "add"),
}


@pytest.mark.parametrize("command", [(group, name) for group, names in COMMANDS.items() for name in names])
def test_the_help_of_a_command_says_what_its_arguments_are(shell: Shell, command: tuple[str, str]) -> None:
    said = done(shell(*command, "--help"))
    assert "\\" not in said and "--help" in said
    assert re.search(r"^  DIR +The (operator's|device's own) folder", said, re.MULTILINE)
    arguments = said.split("Arguments:\n")[1].split("\n\n")[0]
    assert all(re.match(r"  +\S+  +\S|   {8}", line) for line in arguments.splitlines()), arguments


@pytest.mark.parametrize("group", COMMANDS)
def test_no_command_is_cut_short_in_the_list(shell: Shell, group: str) -> None:
    said = done(shell(group, "--help"))
    assert "..." not in said.replace("COMMAND [ARGS]...", "")
    assert [line.split()[0] for line in said.split("Commands:\n")[1].splitlines()] == list(COMMANDS[group])


# A whole round


class Phones:
    """Devices whose folders are open: members of the run, and what they refused."""

    def __init__(self, stack: ExitStack, manifest: Manifest) -> None:
        self.own = {name: stack.enter_context(enrolment.opened(Path(name))) for name in NAMES}
        bits = manifest.release.modulus_bits
        draws = (np.frombuffer(os.urandom(4 * manifest.num_coordinates), np.uint32) for _ in NAMES)
        self.vectors: dict[DeviceId, Residues] = {
            name: draw & np.uint32(2**bits - 1) for name, draw in zip(NAMES, draws, strict=True)
        }
        self.members = {name: own.member(manifest.hash, self.training(name)) for name, own in self.own.items()}
        self.errors: dict[DeviceId, FedMiniError] = {}
        self.sent_bytes = dict.fromkeys(NAMES, 0)

    def training(self, name: DeviceId):
        return lambda task: Contribution(self.vectors[name])

    def exchange(self, stage: Stage, requests: Iterator[tuple[DeviceId, bytes]]) -> Iterable[tuple[DeviceId, bytes]]:
        for name, request in requests:
            try:
                answer = self.members[name].answer(request)
            except FedMiniError as error:
                self.errors[name] = error
                continue
            self.sent_bytes[name] += len(answer)
            yield name, answer

    def sum_of(self, names: Sequence[DeviceId]) -> Residues:
        return masks.reduce(sum(self.vectors[name] for name in names), planned().release.modulus_bits)


def ask_for_round(phones: Phones, round_num: int) -> CohortSum:
    """What the server does, with the operator's public key, its newest revocations, and the signed manifest."""
    manifest = trust_text.read_signed_manifest(Path("run.signed.json").read_bytes()).manifest
    trust = Trust(operator_keys.read_public_key(Path("op/operator.pub")))
    if Path("op/revocations.json").exists():
        trust = trust.updated(trust_text.read_revocations(Path("op/revocations.json").read_bytes()))
    task = TrainTask(manifest.hash, round_num, 0, {TEMPLATE[0][0]: np.ones(TEMPLATE[0][1], np.float32)})
    return SecureSum(manifest, trust, phones.exchange)(NAMES, task, lambda roster: None)


def test_three_devices_from_their_folders_give_the_exact_sum_and_give_it_once(shell: Shell) -> None:
    enrolled(shell, *NAMES)
    signed(shell)
    for name in NAMES:
        done(shell("device", "accept", name, "run.signed.json", "--yes"))
    with ExitStack() as stack:
        phones = Phones(stack, planned())
        found = ask_for_round(phones, 1)
        np.testing.assert_array_equal(found.total, phones.sum_of(NAMES))
        assert (found.num_devices, phones.errors) == (3, {})
        assert "another process works in anna" in shell("device", "status", "anna").complaint

    said = done(shell("device", "accept", "anna", "run.signed.json"))
    forecast = int(re.search(r"about ([\d,]+) bytes each time", said)[1].replace(",", ""))
    assert 0.8 * forecast < phones.sent_bytes["anna"] < 1.2 * forecast

    with ExitStack() as stack:  # the devices were restarted, and the server was restored from its backup
        phones = Phones(stack, planned())
        with pytest.raises(CohortError, match="0 devices sent their keys, 3 are needed"):
            ask_for_round(phones, 1)
        assert set(phones.errors) == set(NAMES)
        assert all("was the server restored from a backup?" in str(error) for error in phones.errors.values())
        phones.errors.clear()
        np.testing.assert_array_equal(ask_for_round(phones, 2).total, phones.sum_of(NAMES))

    said = done(shell("device", "status", "ben"))
    assert "2 of at most 3 contributions" in said and "contributions  2, over all runs" in said
    for unit in planned().release.units:
        spent = accounting.rounded_up(accounting.epsilon(accounting.event_of(unit, planned()), 2, 1e-5))
        assert f"spent          {unit.unit} epsilon {spent} of 10 in a lifetime, at delta 1e-05" in said


def test_twin_devices_that_forget_the_round_give_a_second_draw_of_their_noise(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceLedger, "check_new", lambda *_: None)
    enrolled(shell, *NAMES)
    signed(shell)
    for name in NAMES:
        done(shell("device", "accept", name, "run.signed.json", "--yes"))
    with ExitStack() as stack:
        phones = Phones(stack, planned())
        first = ask_for_round(phones, 1).total
        phones.vectors["anna"] = phones.vectors["anna"] ^ np.uint32(1)
        assert np.any(ask_for_round(phones, 1).total != first)
