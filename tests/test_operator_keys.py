"""The operator's folder, through the command line: what an operator does, and what nobody can make it do.

Each attack that a check answers is a test; its twin switches that one check off and shows that the attack then works.
"""

import fcntl
import getpass
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmini import floors, manifest_file, operator_keys, planning
from fedmini.errors import ProtocolError, StateError
from fedmini.operator_keys import key_files, records
from fedmini.secagg import rotation, signed_manifest, signing_keys, trust, trust_text
from fedmini.secagg.trust import Identity, Trust
from fedmini.types import Manifest
from tests import tiny_run
from tests.command_line import Shell, a_shell, done
from tests.tiny_trust import enrol

PASSPHRASE = "correct horse battery staple"
PRIVACY = {"example": {"noise": "shared", "clip_norm": 1.0, "target_epsilon": 4.0, "target_delta": 1e-5}}


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return a_shell(tmp_path, capsys, monkeypatch)


def enrolled(shell: Shell, *names: str) -> None:
    """An operator in op, and devices that it certified, each in a folder of its name."""
    done(shell("operator", "init", "op"))
    for name in names:
        done(shell("device", "init", name))
        done(shell("operator", "certify", "op", f"{name}/device.pub", "--name", name))


def public_key() -> bytes:
    return operator_keys.read_public_key(Path("op/operator.pub"))


def certificate(name: str) -> trust.Certificate:
    return trust_text.read_certificate(Path(f"op/devices/{name}.json").read_bytes())


def revocations() -> trust.Revocations:
    return trust_text.read_revocations(Path("op/revocations.json").read_bytes())


def rotations() -> tuple[rotation.Rotation, ...]:
    return trust_text.read_rotations(Path("op/rotations.json").read_bytes())


def a_manifest(folder: Path, privacy: dict[str, object] | None = None) -> Manifest:
    chosen = tiny_run.config(folder, changes={"privacy": privacy or PRIVACY})
    base = planning.Base("ab" * 32, (("x.lora_B.weight", (64, 4)),))
    return planning.make_manifest(chosen, "tiny-0a1b2c3d", base, None)


def write_manifest(folder: Path) -> Manifest:
    manifest = a_manifest(folder)
    Path("manifest.json").write_bytes(manifest_file.canonical(manifest))
    return manifest


# From an empty folder to what devices believe


def test_from_two_folders_to_a_device_that_believes_its_peer_and_the_manifest(shell: Shell, tmp_path: Path) -> None:
    said = done(shell("operator", "init", "op"))
    assert public_key().hex() in said and "fedmini operator certify op DEVICE.pub" in said
    said = done(shell("device", "init", "phones/anna"))
    assert operator_keys.read_device_keys(Path("phones/anna/device.pub")).device_key.hex() in said
    arguments = ("op", "phones/anna/device.pub", "--name", "anna", "--output", "phones/anna/certificate.json")
    assert "Enrolled anna" in done(shell("operator", "certify", *arguments))
    manifest = write_manifest(tmp_path)
    said = done(shell("operator", "sign-manifest", "op", "manifest.json"))
    assert manifest.hash in said and "each example: epsilon 4.000 at delta 1e-05, shared noise" in said

    key = key_files.read_private_key(Path("phones/anna/device.key"), lambda: b"")
    anna = Identity(key, trust_text.read_certificate(Path("phones/anna/certificate.json").read_bytes()))
    peer = Trust(public_key())
    peer.check_certificate(anna.certificate)
    assert anna.certificate.device_id == "anna"
    assert anna.certificate.device_key == signing_keys.public_bytes(key)
    signed = trust_text.read_signed_manifest(Path("manifest.signed.json").read_bytes())
    signed_manifest.check_manifest(peer, signed)
    assert (signed.manifest, signed.min_revocations) == (manifest, 0)


def test_private_keys_are_for_their_owner_only(shell: Shell) -> None:
    enrolled(shell, "anna")
    done(shell("operator", "rotate", "op"))
    for path, mode in {
        "op": 0o700,
        "anna": 0o700,
        "op/operator.key": 0o600,
        "anna/device.key": 0o600,
        "anna/login.key": 0o600,
    }.items():
        assert Path(path).stat().st_mode & 0o777 == mode, path
    Path("op/operator.key").chmod(0o640)
    assert "can be read by others" in shell("operator", "revoke", "op", "anna").complaint


def test_no_command_shows_a_private_key(shell: Shell, tmp_path: Path) -> None:
    done(shell("operator", "init", "op"))
    done(shell("device", "init", "anna"))
    write_manifest(tmp_path)
    answers = [
        shell("operator", "certify", "op", "anna/device.key"),
        shell("operator", "certify", "op", "op/operator.key"),
        shell("operator", "certify", "op", "anna/device.pub"),
        shell("operator", "sign-manifest", "op", "op/operator.key"),
        shell("operator", "sign-manifest", "op", "manifest.json"),
    ]
    bodies = [Path(path).read_text().splitlines()[1] for path in ("op/operator.key", "anna/device.key")]
    Path("op/operator.key").write_text(Path("op/operator.key").read_text().replace("PRIVATE", "PIRATE"))
    answers.append(shell("operator", "certify", "op", "anna/device.pub"))
    for answer in answers:
        for body in bodies:
            # All but the head of the encoding, which every such key has.
            assert not any(body[start : start + 12] in answer.out + answer.err for start in range(24, len(body) - 12))
    assert "got a private one" in answers[0].complaint
    done(shell("operator", "init", "again"))
    with operator_keys.opened(Path("again"), lambda: b"") as opened:
        assert repr(opened) == f"OperatorFolder('again', {opened.public_key.hex()})"


def test_keys_are_never_overwritten(shell: Shell) -> None:
    enrolled(shell, "anna")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert "op is there already" in shell("operator", "init", "op").complaint
    assert "anna is there already" in shell("device", "init", "anna").complaint
    assert "can't make anna/device.key/x" in shell("device", "init", "anna/device.key/x").complaint
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("revoke nowhere anna", "nowhere is no operator's folder: make one with `fedmini operator init nowhere`"),
        ("rotate anna", "anna is no operator's folder"),
        ("revoke op ana", "no device is enrolled as 'ana': did you mean anna?"),
        ("revoke op ../../etc", "no device is enrolled as '../../etc': 1 are"),
        ("certify op gone.pub", "can't read gone.pub: No such file or directory"),
        ("certify op op/devices/anna.json", 'says "format": "fedmini/device-keys/v1": this is another'),
        ("certify op op/operator.pub", "got one key by itself: hand over the device.pub that"),
        ("certify op new/device.pub --name ../anna", "can't name a device"),
        ("certify op new/device.pub --name anna", "a device of this name with another key, as anna"),
        ("certify op anna/device.pub --name berta", "this key is enrolled, as anna"),
        ("certify op anna/device.pub --output op/operator.pub/x", "can't write op/operator.pub/x"),
        ("sign-manifest op gone.json", "can't read gone.json"),
        ("sign-manifest op op/devices/anna.json", "anna.json: this is no manifest that fedmini wrote"),
        ("sign-manifest op new/device.key", "new/device.key: it is not JSON"),
        ("sign-manifest op new/device.pub", "new/device.pub: this is no manifest"),
        ("sign-manifest nowhere gone.json", "nowhere is no operator's folder"),
        ("certify op new/device.pub --output gone/new.json", "can't write gone/new.json: there is no folder gone"),
        ("certify op new/device.pub --name=", "'' can't name a device"),
        ("", "Missing command (see `fedmini operator --help`)"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(shell: Shell, arguments: str, says: str) -> None:
    enrolled(shell, "anna")
    done(shell("device", "init", "new"))
    name = ("--name", "anna") if arguments.startswith("certify op anna/device.pub --output") else ()
    assert says in shell("operator", *arguments.split(), *name).complaint


def test_a_device_without_a_name_is_called_after_its_key_and_may_be_certified_twice(shell: Shell) -> None:
    done(shell("operator", "init", "op"))
    done(shell("device", "init", "phone"))
    name = f"device-{operator_keys.read_device_keys(Path('phone/device.pub')).device_key[:6].hex()}"
    for _ in range(2):
        assert f"Enrolled {name}" in done(shell("operator", "certify", "op", "phone/device.pub"))
    assert os.listdir("op/devices") == [f"{name}.json"]


# Passphrases


def test_an_encrypted_key_needs_its_passphrase_and_shows_neither(shell: Shell) -> None:
    Path("pass").write_text(f"{PASSPHRASE}\nsecond line\n")
    Path("wrong").write_text("another passphrase\n")
    Path("short").write_text("short\n")
    Path("none").write_text("\n")
    assert "at least 16 bytes" in shell("operator", "init", "op", "--passphrase-file", "short").complaint
    assert "expected a passphrase" in shell("operator", "init", "op", "--passphrase-file", "none").complaint
    assert "(encrypted)" in done(shell("operator", "init", "op", "--passphrase-file", "pass"))
    assert "ENCRYPTED" in Path("op/operator.key").read_text()
    done(shell("device", "init", "anna"))
    certify = ("operator", "certify", "op", "anna/device.pub", "--name", "anna")
    assert "add --passphrase-file" in shell(*certify).complaint
    wrong = shell(*certify, "--passphrase-file", "wrong")
    assert "the passphrase is not this private key's" in wrong.complaint and "another" not in wrong.err
    done(shell(*certify, "--passphrase-file", "pass"))
    assert "passphrase" in shell("operator", "rotate", "op", "--passphrase-file", "wrong").complaint
    done(shell("operator", "rotate", "op", "--passphrase-file", "pass"))
    assert "ENCRYPTED" in Path("op/operator.key").read_text()
    Trust(public_key()).check_certificate(certificate("anna"))


def test_who_sits_at_the_terminal_is_asked(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["short", PASSPHRASE, "correct horse battery stable", PASSPHRASE, PASSPHRASE, PASSPHRASE])
    asked: list[str] = []
    monkeypatch.setattr(getpass, "getpass", lambda question: (asked.append(question), next(typed))[1])
    assert "there is no terminal" in shell("operator", "init", "op", "--passphrase").complaint
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "at least 16 bytes" in shell("operator", "init", "op", "--passphrase").complaint
    assert len(asked) == 1, "it is not asked for twice"
    assert "the two passphrases differ" in shell("operator", "init", "op", "--passphrase").complaint
    done(shell("operator", "init", "op", "--passphrase"))
    done(shell("operator", "rotate", "op"))
    assert len(asked) == 6


# Revoking


def test_a_revoked_device_is_on_the_list_and_its_key_is_never_enrolled_again(shell: Shell) -> None:
    enrolled(shell, "anna", "bert")
    anna = certificate("anna")
    assert "number 1" in done(shell("operator", "revoke", "op", "anna"))
    assert os.listdir("op/devices") == ["bert.json"]
    assert "was revoked already, as 1 of them were" in shell("operator", "revoke", "op", "anna").complaint
    believed = Trust(public_key()).updated(revocations())
    believed.check_certificate(certificate("bert"))
    with pytest.raises(ProtocolError, match="revoked"):
        believed.check_certificate(anna)
    assert "this key was revoked" in shell("operator", "certify", "op", "anna/device.pub", "--name", "new").complaint
    done(shell("device", "init", "anna2"))
    done(shell("operator", "certify", "op", "anna2/device.pub", "--name", "anna"))  # the name is free again
    done(shell("operator", "revoke", "op", "bert"))
    assert believed.updated(revocations()).revocations_sequence == 2


def test_a_revocation_that_was_cut_short_is_finished_without_another_number(shell: Shell) -> None:
    enrolled(shell, "anna")
    file, content = Path("op/devices/anna.json"), Path("op/devices/anna.json").read_bytes()
    done(shell("operator", "revoke", "op", "anna"))
    file.write_bytes(content)  # as if the power had gone before it was removed
    assert "number 1" in done(shell("operator", "revoke", "op", "anna"))
    assert not file.exists() and revocations().sequence == 1


def test_a_manifest_that_is_signed_after_a_revocation_asks_for_it(shell: Shell, tmp_path: Path) -> None:
    enrolled(shell, "anna")
    manifest = write_manifest(tmp_path)
    done(shell("operator", "revoke", "op", "anna"))
    done(shell("operator", "sign-manifest", "op", "manifest.json", "--output", "signed.json"))
    signed = trust_text.read_signed_manifest(Path("signed.json").read_bytes())
    assert (signed.manifest.hash, signed.min_revocations) == (manifest.hash, 1)


# Rotating


def test_after_a_rotation_devices_of_before_find_the_new_key_and_all_is_signed_with_it(shell: Shell) -> None:
    enrolled(shell, "anna", "bert")
    done(shell("operator", "revoke", "op", "bert"))
    before, old_key = Trust(public_key()).updated(revocations()), Path("op/operator.key").read_bytes()
    said = done(shell("operator", "rotate", "op"))
    assert "certificates signed anew: 1" in said
    assert "fedmini device follow DIR rotations.json revocations.json devices/NAME.json" in said
    done(shell("operator", "rotate", "op"))
    after = before.rotated(rotations(), revocations())
    assert (after.operator_key, after.revocations_sequence) == (public_key(), 3)
    after.check_certificate(certificate("anna"))
    assert not any(path.read_bytes() == old_key for path in Path("op").rglob("*") if path.is_file())
    assert sorted(os.listdir("op")) == ["devices", "operator.key", "operator.pub", "revocations.json", "rotations.json"]


@pytest.mark.parametrize("num_writes", range(6))
def test_a_rotation_that_was_cut_short_anywhere_is_finished_by_the_next(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    """Six files are written: the key, the rotations, the revocations, two certificates, the public key."""
    enrolled(shell, "anna", "bert", "carl")
    done(shell("operator", "revoke", "op", "carl"))
    before, really, written = Trust(public_key()).updated(revocations()), key_files.replace_synced, []

    def write_until_the_disk_is_full(path: Path, content: bytes, mode: int = 0o644) -> None:
        if len(written) == num_writes:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        really(path, content, mode)

    monkeypatch.setattr(key_files, "replace_synced", write_until_the_disk_is_full)
    assert "No space left on device" in shell("operator", "rotate", "op").complaint
    monkeypatch.setattr(key_files, "replace_synced", really)
    if num_writes > 0:
        complaint = shell("operator", "revoke", "op", "anna").complaint
        assert "was cut short: finish it with `fedmini operator rotate op`" in complaint
    done(shell("operator", "rotate", "op"))
    assert len(rotations()) == 1
    after = before.rotated(rotations(), revocations())
    assert (after.operator_key, after.revocations_sequence) == (public_key(), 2)
    for name in ("anna", "bert"):
        after.check_certificate(certificate(name))
    done(shell("operator", "revoke", "op", "anna"))


def test_a_rotation_that_ended_just_before_the_old_key_went_is_finished_by_the_next(shell: Shell) -> None:
    enrolled(shell, "anna")
    pinned, old_key = Trust(public_key()), Path("op/operator.key").read_bytes()
    done(shell("operator", "rotate", "op"))
    Path("op/operator.key").rename("op/operator.key.next")
    Path("op/operator.key").write_bytes(old_key)
    Path("op/operator.key").chmod(0o600)
    assert "was cut short" in shell("operator", "certify", "op", "anna/device.pub").complaint
    before = [path.read_bytes() for path in (Path("op/rotations.json"), Path("op/devices/anna.json"))]
    done(shell("operator", "rotate", "op"))
    assert before == [path.read_bytes() for path in (Path("op/rotations.json"), Path("op/devices/anna.json"))]
    pinned.rotated(rotations()).check_certificate(certificate("anna"))
    assert sorted(os.listdir("op")) == ["devices", "operator.key", "operator.pub", "rotations.json"]


def test_a_rotation_names_only_the_files_that_there_are(shell: Shell) -> None:
    done(shell("operator", "init", "op"))
    assert done(shell("operator", "rotate", "op")).endswith("fedmini device follow DIR rotations.json\n")


def plant(name: str) -> None:
    """Who can write to the folder, but has no key, puts a device of their own there."""
    thief = Ed25519PrivateKey.generate()
    Path(f"op/devices/{name}.json").write_bytes(trust_text.write_certificate(enrol(thief, name).certificate))


def test_a_certificate_that_somebody_put_there_is_not_signed_anew(shell: Shell) -> None:
    enrolled(shell, "anna")
    key = public_key()
    plant("sybil")
    complaint = shell("operator", "rotate", "op").complaint
    assert "op/devices/sybil.json is not this operator's certificate for sybil: remove it" in complaint
    assert public_key() == key and not Path("op/operator.key.next").exists()
    Path("op/devices/sybil.json").unlink()
    Path("op/devices/anna2.json").write_bytes(Path("op/devices/anna.json").read_bytes())
    assert "not this operator's certificate for anna2" in shell("operator", "rotate", "op").complaint


def test_twin_without_that_check_a_rotation_enrols_whom_somebody_put_there(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled(shell, "anna")
    plant("sybil")
    monkeypatch.setattr(records, "is_signed", lambda *_: True)
    done(shell("operator", "rotate", "op"))
    Trust(public_key()).check_certificate(certificate("sybil"))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("revocations.json", "is not signed by this operator: bring it back"),
        ("rotations.json", "is no chain of rotations to this operator's key"),
        ("operator.pub", "is not the public half of operator.key"),
    ],
)
def test_records_of_another_operator_are_refused(shell: Shell, file: str, says: str) -> None:
    for folder in ("theirs", "op"):
        done(shell("operator", "init", folder))
        done(shell("device", "init", f"{folder}-phone"))
        done(shell("operator", "certify", folder, f"{folder}-phone/device.pub", "--name", "anna"))
        done(shell("operator", "revoke", folder, "anna"))
        done(shell("operator", "rotate", folder))
    done(shell("device", "init", "new"))
    Path(f"op/{file}").write_bytes(Path(f"theirs/{file}").read_bytes())
    command = ("rotate", "op") if file == "rotations.json" else ("certify", "op", "new/device.pub", "--name", "new")
    assert says in shell("operator", *command).complaint


def test_a_record_that_was_cut_is_named(shell: Shell) -> None:
    enrolled(shell, "anna")
    file = Path("op/devices/anna.json")
    file.write_bytes(file.read_bytes()[:-5])
    assert "op/devices/anna.json: expected a certificate in JSON" in shell("operator", "rotate", "op").complaint


def test_two_commands_do_not_work_in_one_folder_at_once(shell: Shell) -> None:
    enrolled(shell, "anna")
    holder = os.open("op", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    for command in (("rotate", "op"), ("revoke", "op", "anna")):
        assert "another command works in op" in shell("operator", *command).complaint
    os.close(holder)
    done(shell("operator", "revoke", "op", "anna"))


def test_the_folder_is_free_again_after_an_error(shell: Shell) -> None:
    enrolled(shell)
    with pytest.raises(StateError, match="on purpose"), operator_keys.opened(Path("op"), lambda: b""):
        raise StateError("on purpose")
    with operator_keys.opened(Path("op"), lambda: b"") as opened:
        assert opened.revocations() is None


# Manifests


def test_the_manifest_of_a_runs_directory_is_signed_too(shell: Shell, tmp_path: Path) -> None:
    done(shell("operator", "init", "op"))
    manifest = a_manifest(tmp_path)
    record = {"hash": manifest.hash, "environment": {}, "manifest": json.loads(manifest.canonical)}
    Path("run").mkdir()
    Path("run/manifest.json").write_text(json.dumps(record, indent=1, sort_keys=True))
    done(shell("operator", "sign-manifest", "op", "run/manifest.json"))
    assert trust_text.read_signed_manifest(Path("run/manifest.signed.json").read_bytes()).manifest == manifest
    assert "it is signed already" in shell("operator", "sign-manifest", "op", "run/manifest.signed.json").complaint
    record["manifest"]["num_rounds"] = 4
    Path("run/manifest.json").write_text(json.dumps(record))
    assert (
        "its hash is not that of the manifest in it"
        in shell("operator", "sign-manifest", "op", "run/manifest.json").complaint
    )


def test_a_manifest_that_no_device_would_agree_to_is_not_signed(shell: Shell, tmp_path: Path) -> None:
    done(shell("operator", "init", "op"))
    weak = a_manifest(tmp_path, {"none": True})
    Path("weak.json").write_bytes(manifest_file.canonical(weak))
    complaint = shell("operator", "sign-manifest", "op", "weak.json").complaint
    assert "weak.json: no device would agree to it: " in complaint and "a protected unit" in complaint
    assert complaint.endswith("; plan the run anew") and "leave the run" not in complaint
    manifest = a_manifest(tmp_path)
    assert manifest.release.example is not None
    unit = replace(manifest.release.example, clip_norm=100.0)
    loud = replace(manifest, release=replace(manifest.release, example=unit))
    Path("loud.json").write_bytes(manifest_file.canonical(loud))
    assert "no device would agree to it" in shell("operator", "sign-manifest", "op", "loud.json").complaint
    assert not Path("weak.signed.json").exists() and not Path("loud.signed.json").exists()


def test_twin_without_the_floors_the_operator_signs_what_protects_nobody(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "check", lambda *_: None)
    done(shell("operator", "init", "op"))
    Path("weak.json").write_bytes(manifest_file.canonical(a_manifest(tmp_path, {"none": True})))
    done(shell("operator", "sign-manifest", "op", "weak.json"))
    signed_manifest.check_manifest(
        Trust(public_key()), trust_text.read_signed_manifest(Path("weak.signed.json").read_bytes())
    )


def test_a_plan_writes_the_manifest_of_a_run_that_can_be_signed(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen = tiny_run.config(tmp_path, changes={"privacy": PRIVACY})
    values = chosen.model_dump(mode="json", exclude_none=True) | {
        "data": {"source": "gone.jsonl", "held_out_devices": 1}
    }
    Path("run.toml").write_text(tomli_w.dumps(values))
    said = done(shell("plan", "run.toml", "--manifest", "manifest.json"))
    manifest = manifest_file.parse(Path("manifest.json").read_bytes())
    assert manifest.hash in said and "Next: fedmini operator sign-manifest DIR manifest.json" in said
    assert manifest.run_id.startswith("tiny-") and len(manifest.base_fingerprint) == 64
    done(shell("operator", "init", "op"))
    done(shell("operator", "sign-manifest", "op", "manifest.json"))
    done(shell("plan", "run.toml", "--manifest", "again.json"))
    again = manifest_file.parse(Path("again.json").read_bytes())
    assert again.run_id != manifest.run_id and replace(again, run_id=manifest.run_id) == manifest
    assert "can't write run.toml/x: " in shell("plan", "run.toml", "--manifest", "run.toml/x").complaint
