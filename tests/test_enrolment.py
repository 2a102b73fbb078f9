"""A device's own folder: what it remembers between runs, and what nobody can make it forget or believe.

Each lie that a check answers is a test; its twin switches that check off and shows that the lie then works. What stands
twice in a lie's way says so. Kills are real: a child process dies at each of its file system calls in turn.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmini import enrolment, floors, operator_keys, planning
from fedmini.config import parse_run_config
from fedmini.enrolment import Enrolment, agreement, records
from fedmini.errors import ConfigError, FedMiniError, PrivacyBudgetError, ProtocolError, StateError
from fedmini.member import Member, OwnLedger
from fedmini.privacy import accounting, consistency
from fedmini.privacy.device_ledger import LifetimeLimits
from fedmini.secagg import (
    device_keys,
    rotation,
    signatures,
    signed_manifest,
    signing_keys,
    trust,
    trust_text,
    wire,
)
from fedmini.secagg.messages import Context, Invitation, KeyList, hash_model
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Certificate, Identity, Revocations
from fedmini.types import Contribution, Manifest
from tests.kills import KILLED, run_and_kill
from tests.tiny_trust import an_operator, enrol

TEMPLATE = (("x.lora_B.weight", (8, 4)),)
NOTHING = Contribution(np.zeros(1, np.uint32))


@cache
def planned(noise_multiplier: float = 3.0, run_id: str = "run", **rounds: Any) -> Manifest:
    """What planning makes for five devices and three rounds: about epsilon 2 of each example with the usual noise."""
    unit = {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": noise_multiplier, "target_delta": 1e-5}
    values = {
        "run": {"name": "tiny"},
        "base": {"name": "smollm2-135m-q4"},
        "data": {"source": "x.jsonl", "held_out_devices": 1},
        "local": {"sampling_rate": 0.5, "expected_batch_size": 4.0},
        "rounds": {"num_rounds": 3, "cohort_size": 5, "min_survivors": 3} | rounds,
        "privacy": {"example": unit},
    }
    return planning.make_manifest(parse_run_config(values), run_id, planning.Base("ab" * 32, TEMPLATE), None)


def with_release(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, release=replace(manifest.release, **changes))


def clipped_at_100(manifest: Manifest) -> Manifest:
    """The clip norm a hundred times higher, and nothing else."""
    assert manifest.release.example is not None
    return with_release(manifest, example=replace(manifest.release.example, clip_norm=100.0))


class Office:
    """An operator in memory: its key, and all that it has signed with it."""

    def __init__(self) -> None:
        self.key = an_operator()
        self.rotations: tuple[Rotation, ...] = ()
        self.revocations: Revocations | None = None

    @property
    def public_key(self) -> bytes:
        return signing_keys.public_bytes(self.key)

    def certify(self, device_key: bytes, name: str = "anna") -> Certificate:
        return trust.certify(self.key, name, device_key)

    def revoke(self, identity: Identity) -> Revocations:
        self.revocations = trust.revoke(self.key, self.revocations, [identity.certificate.device_key])
        return self.revocations

    def rotate(self) -> None:
        """A new key; the revocations are signed anew with it."""
        new = an_operator()
        self.rotations = (*self.rotations, rotation.rotate(self.key, signing_keys.public_bytes(new)))
        self.key = new
        if self.revocations is not None:
            self.revocations = trust.revoke(new, self.revocations, ())

    def sign(self, manifest: Manifest) -> SignedManifest:
        return signed_manifest.sign_manifest(self.key, manifest, self.revocations)


@pytest.fixture
def office() -> Office:
    return Office()


@pytest.fixture
def folder(tmp_path: Path, office: Office) -> Path:
    """An enrolled device's folder."""
    return enrolled(tmp_path / "anna", office)


def enrolled(path: Path, office: Office) -> Path:
    device_key = operator_keys.create_device(path)
    enrolment.enrol(path, office.certify(device_key, path.name), office.public_key)
    return path


def device_key(folder: Path) -> bytes:
    return operator_keys.read_device_keys(folder / "device.pub").device_key


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that stands in its place, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def debit(folder: Path, manifest: Manifest, num_rounds: int, run_id: str) -> None:
    """What the device's own ledger says after some rounds of a run."""
    ledger = OwnLedger(folder / "ledger.jsonl", LifetimeLimits(1e9, 1e-5))
    manifest = replace(manifest, run_id=run_id)
    for round_num in range(1, num_rounds + 1):
        ledger.debit(manifest, context_of(manifest, round_num))


def context_of(manifest: Manifest, round_num: int = 1, devices: tuple[str, ...] = ("anna", "ben", "carl")) -> Context:
    return Context(manifest.run_id, round_num, 0, bytes.fromhex(manifest.hash), hash_model(b"model"), devices)


def never_called(*_: object) -> None:
    """What stands in the place of a check that is switched off."""


# Enrolling


def test_an_enrolled_device_knows_who_it_is_and_whom_it_believes(tmp_path: Path, office: Office) -> None:
    folder = tmp_path / "anna"
    key = operator_keys.create_device(folder)
    enrolment.enrol(folder, office.certify(key), office.public_key)
    with enrolment.opened(folder) as own:
        assert own.identity.certificate == office.certify(key)
        assert own.trust.operator_key == office.public_key
        assert (own.trust.revocations_sequence, dict(own.manifests)) == (0, {})
        own.trust.check_certificate(enrol(office.key, "ben").certificate)


def test_enrolling_the_same_again_changes_nothing(folder: Path, office: Office) -> None:
    before = contents(folder)
    enrolment.enrol(folder, office.certify(device_key(folder)), office.public_key)
    assert contents(folder) == before


def test_a_device_is_not_enrolled_with_another_operator(folder: Path, office: Office) -> None:
    """Two things stand in the way: the key is not the one that it relies on, and that one didn't sign the certificate."""
    before, thief = contents(folder), Office()
    with pytest.raises(ConfigError, match=r"relies on the operator key .*put this one's ledger.jsonl into it"):
        enrolment.enrol(folder, thief.certify(device_key(folder)), thief.public_key)
    with pytest.raises(ProtocolError, match=r"CERTIFICATE.json and OPERATOR.pub don't belong together"):
        enrolment.enrol(folder, thief.certify(device_key(folder)), office.public_key)
    assert contents(folder) == before


def test_a_certificate_for_another_key_is_refused(tmp_path: Path, folder: Path, office: Office) -> None:
    other = operator_keys.create_device(tmp_path / "ben")
    for path in (folder, tmp_path / "new"):
        if not path.exists():
            operator_keys.create_device(path)
        before = contents(path)
        with pytest.raises(ProtocolError, match=r"have the operator certify this folder's device.pub"):
            enrolment.enrol(path, office.certify(other), office.public_key)
        assert contents(path) == before


def invent_a_certificate(folder: Path, office: Office) -> None:
    """Somebody who is not the operator gives a fresh device a name of their choice."""
    key = operator_keys.create_device(folder)
    enrolment.enrol(folder, Office().certify(key, "sybil"), office.public_key)


def test_an_invented_certificate_is_refused(tmp_path: Path, office: Office) -> None:
    with pytest.raises(ProtocolError, match=r"CERTIFICATE.json and OPERATOR.pub don't belong together"):
        invent_a_certificate(tmp_path / "phone", office)
    assert sorted(os.listdir(tmp_path / "phone")) == ["device.key", "device.pub", "login.key"]


def test_twin_without_the_check_of_its_signature_an_invented_certificate_names_the_device(
    tmp_path: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "check_issued", never_called)
    invent_a_certificate(tmp_path / "phone", office)
    with enrolment.opened(tmp_path / "phone") as own:
        assert own.identity.certificate.device_id == "sybil"


def test_what_is_no_enrolled_folder_says_what_to_do(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="nowhere is no device's folder: make one with"), enrolment.opened(nowhere):
        pass
    operator_keys.create_device(tmp_path / "new")
    with (
        pytest.raises(ConfigError, match="new is not enrolled: `fedmini device enrol"),
        enrolment.opened(tmp_path / "new"),
    ):
        pass


def test_the_ledger_of_a_folder_before_stays_what_it_was(tmp_path: Path, folder: Path) -> None:
    """Who moves to another operator takes what was spent along."""
    debit(folder, planned(), 2, "old")
    new, office = tmp_path / "new", Office()
    key = operator_keys.create_device(new)
    shutil.copy(folder / "ledger.jsonl", new)
    enrolment.enrol(new, office.certify(key), office.public_key)
    with enrolment.opened(new) as own, own.ledger() as ledger:
        assert ledger.num_participations("old") == 2


# What it logs in with


def login_key_of(folder: Path) -> bytes:
    with enrolment.opened(folder) as own:
        assert "EllipticCurve" not in repr(own)
        return device_keys.login_bytes(own.login_key)


def test_an_enrolled_device_logs_in_with_the_key_that_its_device_key_vouches_for(folder: Path) -> None:
    public = operator_keys.read_device_keys(folder / "device.pub")
    assert login_key_of(folder) == public.login_key
    assert signatures.is_valid(device_key(folder), public.signature, "login", public.login_key)
    assert (folder / "login.key").stat().st_mode & 0o777 == 0o600


def test_a_new_login_key_leaves_everything_else_as_it_was(tmp_path: Path, folder: Path) -> None:
    operator_keys.create_device(tmp_path / "new")
    for path in (folder, tmp_path / "new"):
        before = contents(path)
        enrolment.new_login(path)
        changed = {name for name, content in contents(path).items() if content != before[name]}
        assert changed == {"login.key", "device.pub"}
        assert (path / "login.key").stat().st_mode & 0o777 == 0o600
        assert (path / "device.key").stat().st_mode & 0o777 == 0o600
    assert login_key_of(folder) == operator_keys.read_device_keys(folder / "device.pub").login_key


@pytest.mark.parametrize("name", ["login.key", "device.pub"])
@pytest.mark.parametrize("how", ["missing", "cut", "another device's"])
def test_a_login_key_that_was_lost_or_changed_is_named_and_replaced(
    tmp_path: Path, folder: Path, office: Office, name: str, how: str
) -> None:
    damage(folder / name, how, enrolled(tmp_path / "ben", office) / name)
    with pytest.raises(StateError, match="make another with `fedmini device new-login`"), enrolment.opened(folder):
        pass
    enrolment.new_login(folder)
    login_key_of(folder)


def test_a_login_key_that_others_can_read_is_refused(folder: Path) -> None:
    (folder / "login.key").chmod(0o640)
    with pytest.raises(StateError, match=r"login\.key can be read by others"), enrolment.opened(folder):
        pass


def test_no_error_shows_a_login_key(folder: Path) -> None:
    body = (folder / "login.key").read_text().splitlines()[1][40:]
    (folder / "login.key").write_text((folder / "login.key").read_text().replace("PRIVATE", "PIRATE"))
    with pytest.raises(StateError) as caught, enrolment.opened(folder):
        pass
    assert not any(body[start : start + 12] in str(caught.value) for start in range(len(body) - 12))


def test_a_new_login_key_whose_making_is_killed_anywhere_is_there_whole_or_not(folder: Path) -> None:
    """Which key that is differs from one try to the next: what counts is that both of its files are there."""
    before = contents(folder)
    for num_calls in range(100):
        code = run_and_kill(lambda: enrolment.new_login(folder), num_calls)
        login_key_of(folder)
        if code == 0:
            break
        assert code == KILLED
    assert code == 0 and num_calls > 3
    assert contents(folder).keys() == before.keys()


# Revocations


def test_what_was_revoked_stays_revoked_after_a_restart(folder: Path, office: Office) -> None:
    ben = enrol(office.key, "ben")
    newest = office.revoke(ben)
    with enrolment.opened(folder) as own:
        own.update(newest)
        own.update(newest)
    with enrolment.opened(folder) as own:
        assert own.trust.revocations == newest
        with pytest.raises(ProtocolError, match="'ben' was revoked"):
            own.trust.check_certificate(ben.certificate)


def play_an_old_list_back(folder: Path, office: Office) -> Identity:
    """After a restart the device is shown the list of before ben was revoked; ben."""
    ben = enrol(office.key, "ben")
    old = office.revoke(enrol(office.key, "carl"))
    with enrolment.opened(folder) as own:
        own.update(office.revoke(ben))
    with enrolment.opened(folder) as own:
        own.update(old)
    return ben


def test_an_old_list_that_is_played_back_after_a_restart_is_refused(folder: Path, office: Office) -> None:
    with pytest.raises(ProtocolError, match=r"expected revocations later than number 2, .*plays back an old one"):
        play_an_old_list_back(folder, office)
    with enrolment.opened(folder) as own:
        assert own.trust.revocations_sequence == 2


def test_twin_without_that_check_a_revoked_device_is_believed_again(
    folder: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "check_follows", never_called)
    ben = play_an_old_list_back(folder, office)
    with enrolment.opened(folder) as own:
        own.trust.check_certificate(ben.certificate)


# Rotations


def test_a_device_follows_its_operator_and_needs_a_certificate_by_the_new_key(folder: Path, office: Office) -> None:
    signed = office.sign(planned())
    with enrolment.opened(folder) as own:
        own.update(office.revoke(enrol(office.key, "ben")))
        own.accept(signed)
        first = own.trust.operator_key
    office.rotate()
    office.rotate()
    with enrolment.opened(folder) as own:
        own.follow(office.rotations, office.revocations)
        own.follow(office.rotations, office.revocations)
        with pytest.raises(ProtocolError, match=r"can't take part.*take it with `fedmini device enrol`"):
            own.member(planned().hash, lambda task: NOTHING)
    enrolment.enrol(folder, office.certify(device_key(folder)), office.public_key)
    with enrolment.opened(folder) as own:
        assert own.believed.operator_keys[0] == first and len(own.believed.operator_keys) == 3
        assert (own.trust.operator_key, own.trust.revocations) == (office.public_key, office.revocations)
        assert own.manifest(planned().hash) == planned(), "what it agreed to before holds"
        own.accept(signed)
        own.accept(office.sign(planned()))
        own.member(planned().hash, lambda task: NOTHING)
    with enrolment.opened(folder):
        pass


def test_the_certificate_may_come_with_the_rotation(folder: Path, office: Office) -> None:
    office.rotate()
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match=r"have the operator certify this folder's device.pub"):
            own.follow(office.rotations, None, enrol(office.key, "anna").certificate)
        assert own.believed.rotations == ()
        own.follow(office.rotations, None, office.certify(device_key(folder)))
        own.accept(office.sign(planned()))
        own.member(planned().hash, lambda task: NOTHING)


def test_a_device_that_was_enrolled_after_a_rotation_takes_the_whole_chain_and_follows_on(tmp_path: Path) -> None:
    office = Office()
    office.rotate()
    folder = enrolled(tmp_path / "anna", office)
    with enrolment.opened(folder) as own:
        own.follow(office.rotations)
        assert own.believed.operator_keys == (office.public_key,)
    office.rotate()
    with enrolment.opened(folder) as own:
        own.follow(office.rotations)
    with enrolment.opened(folder) as own:
        assert own.trust.operator_key == office.public_key


def lead_to_a_second_branch(folder: Path, office: Office) -> bytes:
    """Who found the operator's key after it was left signs another one that follows it; that one."""
    stolen = office.key
    office.rotate()
    with enrolment.opened(folder) as own:
        own.follow(office.rotations)
    thief = signing_keys.public_bytes(an_operator())
    with enrolment.opened(folder) as own:
        own.follow([rotation.rotate(stolen, thief)])
    return thief


def test_a_second_branch_after_a_restart_is_refused(folder: Path, office: Office) -> None:
    with pytest.raises(ProtocolError, match="somebody else signed with a key that the operator has left"):
        lead_to_a_second_branch(folder, office)
    with enrolment.opened(folder) as own:
        assert own.trust.operator_key == office.public_key


def test_twin_a_device_that_forgets_what_it_followed_is_led_to_the_thief(
    folder: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two things stand in the way: the rotations that it remembers, and the key that it relies on now."""
    monkeypatch.setattr(agreement, "check_extends", never_called)
    with pytest.raises(ProtocolError, match="don't go through the key that this device relies on"):
        lead_to_a_second_branch(folder, office)
    monkeypatch.setattr(rotation, "follow", lambda pinned, rotations: rotations[-1].new_key if rotations else pinned)
    thief = lead_to_a_second_branch(enrolled(folder.with_name("ben"), office), office)
    with enrolment.opened(folder.with_name("ben")) as own:
        assert own.trust.operator_key == thief


def test_rotations_of_before_lead_nobody_back(folder: Path, office: Office) -> None:
    office.rotate()
    older = office.rotations
    office.rotate()
    with enrolment.opened(folder) as own:
        own.follow(office.rotations)
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match="old ones played back"):
            own.follow(older)
        assert own.trust.operator_key == office.public_key


def test_a_rotation_brings_no_older_revocations_along(folder: Path, office: Office) -> None:
    revoked = office.revoke(enrol(office.key, "ben"))
    with enrolment.opened(folder) as own:
        own.update(revoked)
        office.rotate()
        with pytest.raises(ProtocolError, match="its revocations were not signed with the new one"):
            own.follow(office.rotations)
        with pytest.raises(ProtocolError, match="plays back an old one"):
            own.follow(office.rotations, trust.revoke(office.key, None, []))
        assert (own.trust.revocations, own.believed.rotations) == (revoked, ())


# Agreeing


def test_what_was_accepted_is_known_by_its_hash_after_a_restart(folder: Path, office: Office) -> None:
    signed = office.sign(planned())
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match="it never agreed to it"):
            own.manifest(planned().hash)
        assert own.accept(signed) == planned()
        assert own.accept(signed) == planned()
    before = contents(folder)
    with enrolment.opened(folder) as own:
        assert own.manifest(planned().hash) == planned()
        assert own.accept(signed) == planned()
        with pytest.raises(ProtocolError, match="never agreed to it"):
            own.manifest(planned(run_id="other").hash)
    assert contents(folder) == before


def test_the_manifest_of_another_operator_is_refused(folder: Path) -> None:
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match="it needs the rotation from the one to the other"):
            own.accept(Office().sign(planned()))
        assert not own.manifests
    assert list((folder / "manifests").iterdir()) == []


def test_twin_without_the_check_of_its_signature_anybodys_manifest_is_agreed_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the next start, where the signature is looked at once more: that one is switched off too."""
    monkeypatch.setattr(signed_manifest, "check_manifest_signature", never_called)
    with enrolment.opened(folder) as own:
        own.accept(Office().sign(planned()))
    with enrolment.opened(folder) as own:
        own.member(planned().hash, lambda task: NOTHING)
    monkeypatch.undo()
    with pytest.raises(StateError, match=f"{planned().hash}.json"), enrolment.opened(folder):
        pass


FAINT = planned(0.6)  # consistent: epsilon 7 of one contribution, and 12.4 of three
LOUD = clipped_at_100(planned())
WRAPPED = with_release(planned(cohort_size=50), modulus_bits=24)  # which their sum doesn't fit in


@pytest.mark.parametrize(
    ("manifest", "because"),
    [
        (FAINT, "epsilon of the whole run: expected 0 to 10, got .*beyond this device's limits"),
        (LOUD, "manifest.release.example.scale: expected .*the manifest contradicts itself"),
        (WRAPPED, "manifest.release.modulus_bits: expected 24 or 32, and 32 at least, got 24"),
    ],
)
def test_what_protects_nobody_is_refused_though_the_operator_signed_it(
    folder: Path, office: Office, manifest: Manifest, because: str
) -> None:
    with enrolment.opened(folder) as own, pytest.raises(ProtocolError, match=because):
        own.accept(office.sign(manifest))
    assert list((folder / "manifests").iterdir()) == []


def test_twin_without_the_floors_the_operator_alone_decides_what_a_device_gives_away(
    folder: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "check", never_called)
    with enrolment.opened(folder) as own:
        for number, manifest in enumerate((FAINT, LOUD, WRAPPED)):
            manifest = replace(manifest, run_id=f"run-{number}")
            own.accept(office.sign(manifest))
            own.member(manifest.hash, lambda task: NOTHING)
    assert FAINT.release.example is not None and LOUD.release.example is not None
    assert floors.run_epsilon(FAINT.release.example, FAINT) > 10
    assert consistency.epsilon_of(LOUD.release.example, LOUD, 3) == np.inf, "a hundredth of the noise that it says"


OTHER_BASE = replace(planned(), base_fingerprint="cd" * 32)  # which no floor knows of


@pytest.mark.parametrize("changed", [LOUD, WRAPPED, OTHER_BASE])
def test_what_was_changed_after_it_was_signed_is_refused(folder: Path, office: Office, changed: Manifest) -> None:
    with enrolment.opened(folder) as own, pytest.raises(ProtocolError, match="it was changed after it was signed"):
        own.accept(replace(office.sign(planned()), manifest=changed))


def test_twin_without_the_check_of_the_signature_the_server_writes_what_the_operator_signed(
    tmp_path: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where privacy is at stake, the floors stand in the way too."""
    monkeypatch.setattr(signed_manifest, "check_manifest_signature", never_called)
    signed = office.sign(planned())
    with enrolment.opened(enrolled(tmp_path / "anna", office)) as own:
        for changed in (LOUD, WRAPPED):
            with pytest.raises(ProtocolError, match="contradicts itself"):
                own.accept(replace(signed, manifest=changed))
        own.accept(replace(signed, manifest=OTHER_BASE))
    monkeypatch.setattr(floors, "check", never_called)
    for name, changed in (("ben", LOUD), ("carl", WRAPPED)):
        with enrolment.opened(enrolled(tmp_path / name, office)) as own:
            own.accept(replace(signed, manifest=changed))


def accept_two_for_one_run(folder: Path, office: Office) -> None:
    """The second asks for every device ten times as often, under the name of the first."""
    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned()))
    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned(num_rounds=30)))


def test_a_second_manifest_for_a_run_is_refused_after_a_restart_too(folder: Path, office: Office) -> None:
    with pytest.raises(ProtocolError, match="a run has one manifest"):
        accept_two_for_one_run(folder, office)
    with enrolment.opened(folder) as own:
        assert list(own.manifests.values()) == [planned()]
        own.withdraw(planned().hash)
        with pytest.raises(ProtocolError, match="a run has one manifest"):
            own.accept(office.sign(planned(num_rounds=30)))


def test_twin_without_that_check_a_run_asks_for_more_than_its_owner_was_told(
    folder: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "check_run", never_called)
    accept_two_for_one_run(folder, office)
    with enrolment.opened(folder) as own:
        most = [manifest.release.max_releases for manifest in own.manifests.values()]
        assert sorted(most) == [3, 30]
        assert {manifest.run_id for manifest in own.manifests.values()} == {"run"}


def test_a_run_that_only_the_ledger_remembers_has_one_manifest_too(folder: Path, office: Office) -> None:
    debit(folder, planned(), 1, "run")
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match="a run has one manifest"):
            own.accept(office.sign(planned(num_rounds=30)))
        own.accept(office.sign(planned()))


def test_a_manifest_that_asks_for_newer_revocations_waits_for_them(folder: Path, office: Office) -> None:
    office.revoke(enrol(office.key, "ben"))
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match="asks for revocations number 1 or later"):
            own.accept(office.sign(planned()))
        own.update(office.revocations)
        own.accept(office.sign(planned()))


def test_the_owners_own_limits_win_where_they_are_stricter(folder: Path, office: Office) -> None:
    (folder / "device.toml").write_text("[floors]\nmax_epsilon = 1.0\n")
    with enrolment.opened(folder) as own, pytest.raises(ProtocolError, match="expected 0 to 1, got"):
        own.accept(office.sign(planned()))
    (folder / "device.toml").write_text("[floors]\nmax_epsilon = 1000.0\n")
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match="expected 0 to 10, got"):
            own.accept(office.sign(FAINT))
        own.accept(office.sign(planned()))
    (folder / "device.toml").write_text("[floors]\nmin_survivors = 4\n")
    with enrolment.opened(folder) as own, pytest.raises(ProtocolError, match=r"release.min_survivors"):
        own.member(planned().hash, lambda task: NOTHING)
    (folder / "device.toml").write_text("[floors]\nmax_epsilom = 1\n")
    with pytest.raises(ConfigError, match="did you mean max_epsilon"), enrolment.opened(folder):
        pass


def test_where_the_lifetime_has_no_room_left_nothing_is_agreed_to(folder: Path, office: Office) -> None:
    (folder / "device.toml").write_text("[device]\nlifetime_epsilon = 0.1\n")
    with enrolment.opened(folder) as own:
        with pytest.raises(PrivacyBudgetError, match="no room for even one contribution to run 'run'"):
            own.accept(office.sign(planned()))
        assert not own.manifests


def test_other_runs_take_room_away_and_a_run_that_was_agreed_to_stays(folder: Path, office: Office) -> None:
    unit = planned().release.example
    assert unit is not None
    event = accounting.event_of(unit, planned())
    two, three = (accounting.epsilon(event, count, 1e-5) for count in (2, 3))
    (folder / "device.toml").write_text(f"[device]\nlifetime_epsilon = {(two + three) / 2}\n")
    debit(folder, planned(), 1, "before")
    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned()))
        assert own.epsilon_after(planned(), unit) == accounting.epsilon(event, 4, 1e-5)
        debit(folder, planned(), 1, "run")
        assert own.epsilon_after(planned(), unit) == accounting.epsilon(event, 4, 1e-5), "no release counts twice"
        own.accept(office.sign(planned()))
        with pytest.raises(PrivacyBudgetError, match="no room"):
            own.accept(office.sign(planned(run_id="late")))


def test_a_run_that_was_left_is_left_for_good(folder: Path, office: Office) -> None:
    with enrolment.opened(folder) as own:
        with pytest.raises(ProtocolError, match="never agreed"):
            own.withdraw(planned().hash)
        own.accept(office.sign(planned()))
        own.withdraw(planned().hash)
    with enrolment.opened(folder) as own:
        assert not own.manifests
        with pytest.raises(ProtocolError, match="has left that run"):
            own.member(planned().hash, lambda task: NOTHING)
        with pytest.raises(ProtocolError, match="has left run 'run', for good"):
            own.accept(office.sign(planned()))


# Taking part


def invite(manifest: Manifest, round_num: int = 1) -> bytes:
    return wire.encode(Invitation(context_of(manifest, round_num)))


def begin(office: Office, member: Member, manifest: Manifest, newest: Revocations | None) -> bytes:
    """A list of keys for a member that was invited: its own with those of two peers, and these revocations."""
    context = context_of(manifest)
    advert = wire.decode(member.answer(invite(manifest)), wire.Advert, 2**20)
    adverts = [advert, *(peer(office, name, context.digest, index) for index, name in enumerate(("ben", "carl")))]
    return wire.encode(KeyList(context.digest, 3, tuple(adverts), newest))


def peer(office: Office, name: str, session: bytes, index: int) -> wire.Advert:
    identity, keys = enrol(office.key, name), [bytes([9 + 2 * index + which]) + bytes(31) for which in (0, 1)]
    signature = identity.sign("advert", session, name, *keys)
    return wire.Advert(session, name, *keys, identity.certificate, signature)


def test_revocations_are_on_the_disk_before_the_answer_leaves_that_was_given_with_them(
    folder: Path, office: Office
) -> None:
    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned()))
        newest = office.revoke(enrol(office.key, "dora"))
        member = own.member(planned().hash, lambda task: NOTHING)
        member.answer(begin(office, member, planned(), newest))
        assert trust_text.read_revocations((folder / "revocations.json").read_bytes()) == newest
        assert own.trust.revocations == newest


def test_where_they_can_not_be_kept_nothing_is_answered(
    folder: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned()))
        newest = office.revoke(enrol(office.key, "dora"))
        member = own.member(planned().hash, lambda task: NOTHING)
        key_list = begin(office, member, planned(), newest)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StateError, match="No space left on device"):
                member.answer(key_list)
        with pytest.raises(StateError, match="is closed: open it again"):
            member.answer(invite(planned(), 2))
    with enrolment.opened(folder) as own:
        assert own.trust.revocations in (None, newest)


def test_what_one_run_has_seen_holds_in_every_other(folder: Path, office: Office) -> None:
    other = planned(run_id="other")
    with enrolment.opened(folder) as own:
        for manifest in (planned(), other):
            own.accept(office.sign(manifest))
        here, there = (own.member(one.hash, lambda task: NOTHING) for one in (planned(), other))
        old = office.revoke(enrol(office.key, "dora"))
        newest = office.revoke(enrol(office.key, "emil"))
        late = begin(office, there, other, old)
        here.answer(begin(office, here, planned(), newest))
        with pytest.raises(ProtocolError, match="plays back an old one"):
            there.answer(late)
        with pytest.raises(ProtocolError, match="plays back an old one"):
            there.answer(begin(office, there, other, old))
        assert own.trust.revocations == newest


def test_a_member_is_silent_once_its_folder_is_closed_or_its_run_was_left(folder: Path, office: Office) -> None:
    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned()))
        member = own.member(planned().hash, lambda task: NOTHING)
        member.answer(invite(planned()))
    too_late: list[Callable[[], object]] = [
        lambda: member.answer(invite(planned(), 2)),
        lambda: own.withdraw(planned().hash),
        lambda: own.accept(office.sign(planned(run_id="other"))),
        lambda: own.update(office.revoke(enrol(office.key, "dora"))),
    ]
    for act in too_late:
        with pytest.raises(StateError, match="is closed"):
            act()
    with enrolment.opened(folder) as own:
        member = own.member(planned().hash, lambda task: NOTHING)
        own.withdraw(planned().hash)
        with pytest.raises(ProtocolError, match="has left that run"):
            member.answer(invite(planned(), 2))
        with pytest.raises(ProtocolError, match="has left that run"):
            member.contribute(context_of(planned()), bytes(128))
    with enrolment.opened(folder) as own, own.ledger() as ledger:
        assert ledger.releases() == ()


def test_a_revoked_device_knows_it_and_takes_no_part(folder: Path, office: Office) -> None:
    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned()))
        member = own.member(planned().hash, lambda task: NOTHING)
        own.update(office.revoke(own.identity))
        with pytest.raises(ProtocolError, match="'anna' was revoked"):
            member.answer(invite(planned()))
        with pytest.raises(ProtocolError, match="'anna' was revoked"):
            own.member(planned().hash, lambda task: NOTHING)


# Files


def test_no_repr_and_no_error_shows_a_private_key(folder: Path, office: Office) -> None:
    body = (folder / "device.key").read_text().splitlines()[1][24:]
    with enrolment.opened(folder) as own:
        own.accept(office.sign(planned()))
        shown = [
            repr(own),
            repr(own.identity),
            repr(own.believed),
            repr(own.member(planned().hash, lambda task: NOTHING)),
        ]
    (folder / "device.key").write_text((folder / "device.key").read_text().replace("PRIVATE", "PIRATE"))
    with pytest.raises(StateError) as caught, enrolment.opened(folder):
        pass
    shown += [str(caught.value), repr(caught.value.__context__)]
    assert shown[0] == f"Enrolment({str(folder)!r}, 'anna')"
    for text in shown:
        assert not any(body[start : start + 12] in text for start in range(len(body) - 12))


FILES = (
    "device.key", "login.key", "device.pub", "enrolled.pub", "operator.pub", "rotations.json", "revocations.json",
    "certificate.json", f"manifests/{planned().hash}.json",
)  # fmt: skip


def a_full_folder(path: Path) -> Path:
    """A device that has followed its operator once, knows a revocation, and agreed to a run."""
    office = Office()
    enrolled(path, office)
    office.revoke(enrol(office.key, "ben"))
    office.rotate()
    with enrolment.opened(path) as own:
        own.follow(office.rotations, office.revocations, office.certify(device_key(path), path.name))
        own.accept(office.sign(planned()))
    return path


def damage(path: Path, how: str, other: Path) -> None:
    if how == "missing":
        path.unlink()
    elif how == "another device's":
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(path.read_bytes()[: {"cut": -7, "empty": 0}[how]])


@pytest.mark.parametrize(
    ("name", "how"),
    # A manifest that is missing was never accepted: there is nothing to refuse.
    [
        case
        for case in product(FILES, ("missing", "cut", "empty", "another device's"))
        if case != (FILES[-1], "missing")
    ],
)
def test_a_damaged_file_is_named_and_the_folder_stays_shut(tmp_path: Path, name: str, how: str) -> None:
    folder, other = a_full_folder(tmp_path / "anna"), a_full_folder(tmp_path / "ben")
    damage(folder / name, how, other / name)
    before = contents(folder)
    with pytest.raises(StateError, match=r"backup|ask the operator") as caught, enrolment.opened(folder):
        pass
    named = {path for path in FILES if path in str(caught.value)}
    expected = (
        {name} if how != "another device's" else {name, "device.key", "operator.pub", "rotations.json", "enrolled.pub"}
    )
    assert named & expected, str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["ledger.jsonl", "manifests"])
def test_what_was_spent_or_agreed_to_is_not_forgotten_quietly(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name) if name == "manifests" else (folder / name).unlink()
    with pytest.raises(StateError, match=f"{name} is missing"), enrolment.opened(folder):
        pass


def test_a_ledger_that_was_changed_keeps_the_folder_shut(folder: Path) -> None:
    debit(folder, planned(), 2, "run")
    ledger = folder / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"round":1', b'"round":3'))
    with pytest.raises(StateError, match="line 1 was changed"), enrolment.opened(folder):
        pass


def test_a_lost_certificate_is_taken_again(tmp_path: Path, folder: Path, office: Office) -> None:
    before = contents(folder)
    (folder / "certificate.json").write_bytes(b"{}")
    enrolment.enrol(folder, office.certify(device_key(folder)), office.public_key)
    assert contents(folder) == before


def test_revocations_of_a_backup_are_found_out_where_a_manifest_was_agreed_to_with_newer_ones(
    folder: Path, office: Office
) -> None:
    before = (folder / "revocations.json").read_bytes()
    with enrolment.opened(folder) as own:
        own.update(office.revoke(enrol(office.key, "ben")))
        own.accept(office.sign(planned()))
    (folder / "revocations.json").write_bytes(before)
    with (
        pytest.raises(StateError, match=r"when it was accepted, revocations\.json was newer"),
        enrolment.opened(folder),
    ):
        pass


def test_two_processes_do_not_work_in_one_folder(folder: Path, office: Office) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom fedmini import enrolment\n"
        "try:\n    with enrolment.opened(Path(sys.argv[1])):\n        print('opened')\n"
        "except enrolment.folder.StateError as error:\n    print(error)\n"
    )

    def another_process() -> str:
        command = [sys.executable, "-c", script, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with enrolment.opened(folder):
        assert "another process works in" in another_process()
        with pytest.raises(StateError, match="another process works in"):
            enrolment.enrol(folder, office.certify(device_key(folder)), office.public_key)
    assert another_process() == "opened\n"


# Killed in the middle


def states_after_kills(folder: Path, action: Callable[[], None]) -> list[dict[str, bytes]]:
    """What is in the folder after the action was killed at each of its calls in turn, and it was opened again.

    Whatever that is, the action leads to its end from there.
    """
    saved = folder.with_name("saved")
    shutil.copytree(folder, saved)
    states: list[dict[str, bytes]] = []
    ends: list[dict[str, bytes]] = []
    for num_calls in range(1000):
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        code = run_and_kill(action, num_calls)
        assert code in (0, KILLED)
        try:
            with enrolment.opened(folder):
                pass
        except ConfigError as error:
            assert "is not enrolled" in str(error)
        assert not (folder / "next").exists() and not list(folder.rglob(".*"))
        states.append(contents(folder))
        if code == 0:
            assert ends == [states[-1]] * len(ends)
            return states
        with contextlib.suppress(ProtocolError):  # a run that was left is not left again
            action()
        ends.append(contents(folder))
    raise AssertionError("the action never came to its end")


def assert_old_or_new(states: list[dict[str, bytes]], num_files: int) -> None:
    old, new = states[0], states[-1]
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    assert len(changed) == num_files, changed
    assert all(state in (old, new) for state in states)
    turn = states.index(new)
    assert 0 < turn < len(states) - 1, "it was killed on both sides of the point from which on it holds"
    assert all(state == new for state in states[turn:])


def test_an_enrolment_that_is_killed_anywhere_is_whole_or_none(tmp_path: Path, office: Office) -> None:
    folder = tmp_path / "anna"
    certificate = office.certify(operator_keys.create_device(folder))
    assert_old_or_new(states_after_kills(folder, lambda: enrolment.enrol(folder, certificate, office.public_key)), 6)


def test_a_rotation_that_is_killed_anywhere_is_followed_whole_or_not(folder: Path, office: Office) -> None:
    with enrolment.opened(folder) as own:
        own.update(office.revoke(enrol(office.key, "ben")))
    office.rotate()

    def follow() -> None:
        with enrolment.opened(folder) as own:
            own.follow(office.rotations, office.revocations, office.certify(device_key(folder)))

    assert_old_or_new(states_after_kills(folder, follow), 4)


def test_twin_files_that_are_replaced_one_after_the_other_are_neither_old_nor_new(
    folder: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_by_one(folder: Path, contents: dict[str, bytes]) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)

    monkeypatch.setattr(records, "commit", one_by_one)
    with pytest.raises(StateError):
        test_a_rotation_that_is_killed_anywhere_is_followed_whole_or_not(folder, office)


def test_a_manifest_or_a_list_whose_keeping_is_killed_anywhere_is_there_whole_or_not(
    folder: Path, office: Office
) -> None:
    signed, newest = office.sign(planned()), office.revoke(enrol(office.key, "ben"))
    with enrolment.opened(enrolled(folder.with_name("ben"), office)) as own:
        own.accept(signed)  # what it costs is known from here on, and no child computes it again

    def accept() -> None:
        with enrolment.opened(folder) as own:
            own.accept(signed)

    def withdraw() -> None:
        with enrolment.opened(folder) as own:
            own.withdraw(planned().hash)

    def update() -> None:
        with enrolment.opened(folder) as own:
            own.update(newest)

    for action, num_files in ((accept, 1), (withdraw, 2), (update, 1)):
        assert_old_or_new(states_after_kills(folder, action), num_files)
        shutil.rmtree(folder.with_name("saved"))


def test_a_disk_that_is_full_leaves_the_old_state_and_shuts_the_folder(
    folder: Path, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    office.rotate()
    before = contents(folder)
    actions: list[Callable[[Enrolment], object]] = [
        lambda own: own.follow(office.rotations),
        lambda own: own.accept(signed_manifest.sign_manifest(office.key, planned(), None)),
    ]
    with enrolment.opened(folder) as own, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match="No space left on device"):
            actions[0](own)
        with pytest.raises(StateError, match="is closed: open it again"):
            actions[1](own)
    with enrolment.opened(folder):
        assert contents(folder) == before


def test_every_error_of_a_folder_is_one_of_ours(tmp_path: Path, folder: Path) -> None:
    for path in (folder / "device.pub", tmp_path / "x" / "y"):
        with pytest.raises(FedMiniError), enrolment.opened(path):
            pass
