"""A server's folder: who may log in, and what nobody can make the server forget or believe.

Each lie that a check answers is a test; a twin switches that one check off and shows that the lie then works. Kills are
real: a child process dies at each of its file system calls in turn.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from fedmini import server_folder
from fedmini.config import ServerConfig, parse_server_config
from fedmini.errors import ConfigError, FedMiniError, ProtocolError, StateError
from fedmini.secagg import device_keys, rotation, signatures, signing_keys, trust, trust_text
from fedmini.secagg.device_keys import DeviceKeys
from fedmini.secagg.rotation import Rotation
from fedmini.secagg.trust import Certificate, Revocations
from fedmini.server_folder import ServerFolder, checks, roll
from tests.kills import KILLED, run_and_kill
from tests.tiny_trust import an_operator

NOW = datetime.now(UTC)
CONFIG: ServerConfig = parse_server_config({"server": {"host": "fl.example.org"}})


class Office:
    """An operator in memory: its key, and all that it has signed with it."""

    def __init__(self) -> None:
        self.key = an_operator()
        self.rotations: tuple[Rotation, ...] = ()
        self.revocations: Revocations | None = None

    @property
    def public_key(self) -> bytes:
        return signing_keys.public_bytes(self.key)

    def certify(self, keys: DeviceKeys, name: str = "anna") -> Certificate:
        return trust.certify(self.key, name, keys.device_key)

    def revoke(self, keys: DeviceKeys) -> Revocations:
        self.revocations = trust.revoke(self.key, self.revocations, [keys.device_key])
        return self.revocations

    def rotate(self) -> None:
        """A new key; the revocations are signed anew with it."""
        new = an_operator()
        self.rotations = (*self.rotations, rotation.rotate(self.key, signing_keys.public_bytes(new)))
        self.key = new
        if self.revocations is not None:
            self.revocations = trust.revoke(new, self.revocations, ())


class Phone:
    """A device in memory."""

    def __init__(self) -> None:
        self.key = signing_keys.draw()

    def keys(self) -> DeviceKeys:
        """Its public keys, with a fresh login key at every call."""
        return device_keys.vouch(self.key, device_keys.login_bytes(device_keys.draw_login()))


@pytest.fixture
def office() -> Office:
    return Office()


@pytest.fixture
def folder(tmp_path: Path, office: Office) -> ServerFolder:
    return server_folder.create(tmp_path / "server", CONFIG, NOW, office.public_key)


def enrolled(folder: ServerFolder, office: Office, name: str = "anna") -> DeviceKeys:
    keys = Phone().keys()
    folder.enroll(keys, office.certify(keys, name))
    return keys


def contents(folder: ServerFolder) -> dict[str, bytes]:
    """Every file that stands in its place, by name."""
    return {
        str(path.relative_to(folder.path)): path.read_bytes()
        for path in sorted(folder.path.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def refused(folder: ServerFolder, action: Callable[[], object], error: type[FedMiniError], says: str) -> None:
    """The action raises this, in one line, and changes nothing."""
    before = contents(folder)
    with pytest.raises(error, match=says) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


# Made, and opened again


def test_a_new_folder_says_who_the_operator_is_and_shows_no_secret(folder: ServerFolder, office: Office) -> None:
    opened = server_folder.opened(folder.path)
    assert (opened.operator_key, opened.devices(), opened.trust.revocations_sequence) == (office.public_key, {}, 0)
    assert opened.config == CONFIG
    assert len(bytes.fromhex(opened.token)) == 32
    assert repr(opened) == f"ServerFolder({str(folder.path)!r})"
    assert (folder.path / "loopback.token").stat().st_mode & 0o777 == 0o600
    for path in (folder.path, *(one for one in folder.path.iterdir() if one.is_dir())):
        assert path.stat().st_mode & 0o777 == 0o700


def test_nothing_is_overwritten(tmp_path: Path, folder: ServerFolder, office: Office) -> None:
    refused(folder, lambda: server_folder.create(folder.path, CONFIG, NOW), ConfigError, "is there already")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(folder, lambda: server_folder.create(tmp_path / "link", CONFIG, NOW), ConfigError, "is there already")


def test_two_folders_have_no_secret_in_common(tmp_path: Path, folder: ServerFolder) -> None:
    other = server_folder.create(tmp_path / "other", CONFIG, NOW)
    assert other.token != folder.token
    assert (other.path / "tls/ca.key").read_bytes() != (folder.path / "tls/ca.key").read_bytes()


def test_what_is_no_server_s_folder_says_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="is no server's folder: make one with `fedmini server init"):
            server_folder.opened(path)


def test_an_operator_is_taken_once(tmp_path: Path, office: Office) -> None:
    folder = server_folder.create(tmp_path / "server", CONFIG, NOW)
    refused(folder, folder.roll, ConfigError, "has no operator yet: `fedmini server follow")
    folder.adopt(office.public_key)
    folder.adopt(office.public_key)
    assert folder.operator_key == office.public_key
    refused(folder, lambda: folder.adopt(Office().public_key), ConfigError, "relies on the operator key")


def test_a_run_has_a_folder_of_its_own_inside(folder: ServerFolder) -> None:
    assert folder.run_folder("chat-1") == folder.path / "runs/chat-1"
    for name in ("..", ".", "", "a/b", "/etc", ".hidden", "a\n", "a" * 65, "\u00e9"):
        refused(folder, partial(folder.run_folder, name), ConfigError, "can't name a run")


def test_a_folder_is_made_whole_with_its_runs_or_not_at_all(tmp_path: Path) -> None:
    runs = {"chat": {"manifest.json": b"{}"}}
    made = server_folder.create(tmp_path / "server", CONFIG, NOW, None, runs)
    assert (made.run_folder("chat") / "manifest.json").read_bytes() == b"{}"
    with pytest.raises(ConfigError, match="can't name a run"):
        server_folder.create(tmp_path / "other", CONFIG, NOW, None, {"../chat": {}})
    assert sorted(os.listdir(tmp_path)) == ["server"]


# Enrolling


def test_an_enrolled_device_may_log_in_with_the_key_that_it_vouches_for(folder: ServerFolder, office: Office) -> None:
    keys = enrolled(folder, office)
    (found,) = server_folder.opened(folder.path).devices().values()
    assert (found.certificate.device_id, found.login_key_bytes) == ("anna", keys.login_key)
    folder.trust.check_certificate(found.certificate)
    assert folder.roll().is_current(found)


def test_the_same_again_changes_nothing_and_a_new_login_key_takes_the_old_ones_place(
    folder: ServerFolder, office: Office
) -> None:
    phone = Phone()
    first, second = phone.keys(), phone.keys()
    folder.enroll(first, office.certify(first))
    before = contents(folder)
    folder.enroll(first, office.certify(first))
    assert contents(folder) == before
    folder.enroll(second, office.certify(second))
    assert [device.login_key_bytes for device in folder.devices().values()] == [second.login_key]


def test_a_device_of_another_operator_is_refused(folder: ServerFolder) -> None:
    keys = Phone().keys()
    certificate = Office().certify(keys)
    refused(folder, lambda: folder.enroll(keys, certificate), ProtocolError, "'anna' is not signed by the operator key")


def test_twin_without_that_check_anybody_enrolls_themselves(
    folder: ServerFolder, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_certified", lambda *_: None)
    monkeypatch.setattr(roll, "is_signed", lambda *_: True)
    keys = Phone().keys()
    folder.enroll(keys, Office().certify(keys))
    assert list(folder.devices()) == ["anna"]


def test_the_keys_of_another_device_than_the_certificate_s_are_refused(folder: ServerFolder, office: Office) -> None:
    anna, ben = Phone().keys(), Phone().keys()
    refused(folder, lambda: folder.enroll(ben, office.certify(anna)), ConfigError, "take both from the same device")


def test_a_device_that_vouches_for_another_s_login_key_is_refused(folder: ServerFolder, office: Office) -> None:
    """Its signature is its own, and good; it would be taken for the other one whenever that one logs in."""
    anna, sybil = enrolled(folder, office), Phone()
    stolen = device_keys.vouch(sybil.key, anna.login_key)
    refused(
        folder, lambda: folder.enroll(stolen, office.certify(stolen, "sybil")), ConfigError, "sybil has the login key of anna"
    )  # fmt: skip


def test_twin_without_that_check_two_devices_have_one_login_key(
    folder: ServerFolder, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_free", lambda *_: None)
    anna, sybil = enrolled(folder, office), Phone()
    stolen = device_keys.vouch(sybil.key, anna.login_key)
    folder.enroll(stolen, office.certify(stolen, "sybil"))
    assert len({device.login_key_bytes for device in folder.devices().values()}) == 1


def test_a_name_and_a_key_are_one_device_s(folder: ServerFolder, office: Office) -> None:
    anna, other = enrolled(folder, office), Phone().keys()
    refused(folder, lambda: folder.enroll(other, office.certify(other)), ConfigError, "of this name with another key")
    refused(folder, lambda: folder.enroll(anna, office.certify(anna, "ben")), ConfigError, "is enrolled, as anna")


@pytest.mark.parametrize("name", ["../ben", "ben/../../x", "/etc/passwd", ".ben", "a b", "\u00e9", "a" * 65])
def test_a_name_that_leads_elsewhere_is_refused_though_it_is_certified(
    folder: ServerFolder, office: Office, name: str
) -> None:
    keys = Phone().keys()
    refused(folder, lambda: folder.enroll(keys, office.certify(keys, name)), ConfigError, "can't name a device")


def test_an_enrolment_that_is_killed_anywhere_is_whole_or_none(folder: ServerFolder, office: Office) -> None:
    phone = Phone()
    enrolled(folder, office, "ben")
    first = phone.keys()
    for keys in (first, phone.keys()):  # new, and in the place of another login key
        before, certificate = dict(folder.devices()), office.certify(keys)
        for num_calls in range(100):
            code = run_and_kill(partial(folder.enroll, keys, certificate), num_calls)
            if code == 0:
                break
            assert code == KILLED
            assert dict(folder.devices()) in (before, before | {"anna": roll.pair(keys, certificate)})
        assert code == 0 and num_calls > 3
        folder.enroll(keys, certificate)
        assert not list(folder.path.rglob(".*"))
        assert folder.devices()["anna"].login_key_bytes == keys.login_key


# Revoking


def test_a_revoked_device_is_cut_off_and_not_enrolled_again(folder: ServerFolder, office: Office) -> None:
    keys = enrolled(folder, office)
    enrolled(folder, office, "ben")
    after = folder.follow((), office.revoke(keys))
    assert list(after.devices) == ["ben"] and os.listdir(folder.path / "devices") == ["ben.json"]
    assert folder.trust.revocations_sequence == 1
    refused(folder, lambda: folder.enroll(keys, office.certify(keys)), ProtocolError, "'anna' was revoked")


def test_a_device_whose_file_is_still_there_is_cut_off_all_the_same(folder: ServerFolder, office: Office) -> None:
    keys = enrolled(folder, office)
    file = folder.path / "devices/anna.json"
    content = file.read_bytes()
    folder.follow((), office.revoke(keys))
    file.write_bytes(content)  # as if the power had gone before it was removed
    assert folder.devices() == {}


def test_a_device_that_is_only_cut_off_here_may_be_enrolled_again(folder: ServerFolder, office: Office) -> None:
    keys = enrolled(folder, office)
    folder.revoke_local("anna")
    assert folder.devices() == {}
    refused(folder, lambda: folder.revoke_local("anna"), ConfigError, "no device is enrolled here as 'anna'")
    refused(folder, lambda: folder.revoke_local("../server"), ConfigError, "no device is enrolled here")
    folder.enroll(keys, office.certify(keys))
    assert list(folder.devices()) == ["anna"]


def play_an_old_list_back(folder: ServerFolder, office: Office) -> None:
    ben = enrolled(folder, office, "ben")
    old = office.revoke(Phone().keys())
    folder.follow((), office.revoke(ben))
    folder.follow((), old)


def test_an_old_list_that_is_played_back_is_refused(folder: ServerFolder, office: Office) -> None:
    with pytest.raises(ProtocolError, match="expected revocations later than number 2"):
        play_an_old_list_back(folder, office)
    assert folder.trust.revocations_sequence == 2


def test_twin_without_that_check_the_old_list_holds(
    folder: ServerFolder, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "check_follows", lambda *_: None)
    play_an_old_list_back(folder, office)
    assert folder.trust.revocations_sequence == 1


def test_another_operator_s_list_is_refused(folder: ServerFolder, office: Office) -> None:
    keys = enrolled(folder, office)
    theirs = Office().revoke(keys)
    refused(
        folder,
        lambda: folder.follow((), theirs),
        ProtocolError,
        "not signed by the operator key .* this server relies on",
    )


# Rotations


def test_a_server_follows_its_operator_and_devices_stay_until_they_are_certified_anew(
    folder: ServerFolder, office: Office
) -> None:
    anna, ben, carl = (enrolled(folder, office, name) for name in ("anna", "ben", "carl"))
    folder.follow((), office.revoke(carl))
    office.rotate()
    office.rotate()
    after = folder.follow(office.rotations, office.revocations, [office.certify(anna)])
    assert (after.trust.operator_key, after.trust.revocations_sequence) == (office.public_key, 3)
    assert {name: after.is_current(device) for name, device in after.devices.items()} == {"anna": True, "ben": False}
    assert len(after.operator_keys) == 3 and after.rotations == office.rotations
    folder.follow(office.rotations, office.revocations, [office.certify(anna), office.certify(ben, "ben")])
    found = server_folder.opened(folder.path).roll()
    assert all(found.is_current(device) for device in found.devices.values())
    assert found.devices["ben"].login_key_bytes == ben.login_key
    folder.adopt(office.public_key)


def test_a_rotation_without_its_revocations_is_refused(folder: ServerFolder, office: Office) -> None:
    folder.follow((), office.revoke(enrolled(folder, office)))
    old = office.revocations
    office.rotate()
    refused(
        folder, lambda: folder.follow(office.rotations), ProtocolError, "its revocations were not signed with the new"
    )
    refused(
        folder, lambda: folder.follow(office.rotations, old), ProtocolError, "give those that the operator has beside"
    )
    refused(folder, lambda: folder.follow((), office.revocations), ProtocolError, "after a rotation give all files")


def lead_to_a_second_branch(folder: ServerFolder, office: Office) -> bytes:
    """Who found the operator's key after it was left signs another one that follows it; that one."""
    stolen = office.key
    office.rotate()
    folder.follow(office.rotations)
    thief = signing_keys.public_bytes(an_operator())
    folder.follow([rotation.rotate(stolen, thief)])
    return thief


def test_a_second_branch_is_refused(folder: ServerFolder, office: Office) -> None:
    with pytest.raises(ProtocolError, match="by somebody who found a key that the operator has left"):
        lead_to_a_second_branch(folder, office)
    assert folder.operator_key == office.public_key


def test_twin_a_server_that_does_not_look_at_what_it_followed_is_led_to_the_thief(
    folder: ServerFolder, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "follow", lambda before, *_: before.trust)
    assert lead_to_a_second_branch(folder, office) == folder.operator_key


def test_rotations_of_another_operator_and_certificates_of_strangers_are_refused(
    folder: ServerFolder, office: Office
) -> None:
    anna = enrolled(folder, office)
    other = Office()
    other.rotate()
    refused(folder, lambda: folder.follow(other.rotations), ProtocolError, "another operator's, or changed")
    refused(folder, lambda: folder.follow((), None, [other.certify(anna)]), ProtocolError, "'anna' is not signed by")
    stranger = office.certify(Phone().keys(), "anna")
    refused(folder, lambda: folder.follow((), None, [stranger]), ConfigError, "as 'anna' with this key: enroll it")


def test_following_that_is_killed_anywhere_leaves_the_old_key_or_the_new_one_and_is_ended_by_the_next(
    tmp_path: Path, folder: ServerFolder, office: Office
) -> None:
    anna, ben = enrolled(folder, office), enrolled(folder, office, "ben")
    enrolled(folder, office, "carl")
    folder.follow((), office.revoke(Phone().keys()))
    old_key = office.public_key
    office.rotate()
    office.revoke(ben)
    saved, codes, seen = tmp_path / "saved", [], set()
    shutil.copytree(folder.path, saved)
    follow = partial(folder.follow, office.rotations, office.revocations, [office.certify(anna)])
    for num_calls in range(200):
        shutil.rmtree(folder.path)
        shutil.copytree(saved, folder.path)
        codes.append(run_and_kill(follow, num_calls))
        found = folder.roll()
        seen.add((found.trust.operator_key == old_key, found.trust.revocations_sequence, tuple(found.devices)))
        assert found.trust.operator_key in (old_key, office.public_key)
        after = follow()
        assert (after.trust.operator_key, list(after.devices)) == (office.public_key, ["anna", "carl"])
        assert after.is_current(after.devices["anna"]) and not list(folder.path.rglob(".*"))
        assert sorted(os.listdir(folder.path / "devices")) == ["anna.json", "carl.json"]
        if codes[-1] == 0:
            break
    assert codes == [KILLED] * (len(codes) - 1) + [0]
    assert seen == {(True, 1, ("anna", "ben", "carl")), (False, 3, ("anna", "carl"))}


# What a running server reads


def test_the_fingerprint_changes_with_everything_that_a_running_server_has_read(
    folder: ServerFolder, office: Office
) -> None:
    phone = Phone()
    first, second = phone.keys(), phone.keys()
    actions: list[Callable[[], object]] = [
        lambda: folder.enroll(first, office.certify(first)),
        lambda: folder.enroll(second, office.certify(second)),
        lambda: folder.revoke_local("anna"),
        lambda: folder.follow((), office.revoke(first)),
        lambda: folder.rotate_certificate(NOW),
        office.rotate,
        lambda: folder.follow(office.rotations, office.revocations),
        lambda: (folder.path / "server.toml").write_text((folder.path / "server.toml").read_text() + "\n"),
    ]
    for action in actions:
        before = folder.fingerprint()
        action()
        assert (folder.fingerprint() == before) == (action == office.rotate)
    before = folder.fingerprint()
    (folder.path / "state/state.db").write_bytes(b"x")
    (folder.path / "devices/.anna.json-x").write_bytes(b"x")
    assert folder.fingerprint() == before, "neither what is in state/ nor what is not in its place yet"


def test_commands_keep_each_other_out_and_no_reader(folder: ServerFolder, office: Office) -> None:
    keys = enrolled(folder, office)
    holder = os.open(folder.path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    for change in (
        lambda: folder.enroll(keys, office.certify(keys)),
        lambda: folder.revoke_local("anna"),
        folder.follow,
        lambda: folder.rotate_certificate(NOW),
    ):
        refused(folder, change, StateError, "another command works in")
    assert list(folder.devices()) == ["anna"] and folder.fingerprint() and folder.token
    os.close(holder)
    folder.revoke_local("anna")


def planted(folder: ServerFolder, keys: DeviceKeys, certificate: Certificate, name: str) -> None:
    """Who can write to the folder, but has no key, puts a device of their own there."""
    device = roll.EnrolledDevice(certificate, keys.login_key, keys.signature)
    (folder.path / f"devices/{name}.json").write_bytes(roll.write_device(device))


def test_a_device_that_somebody_put_there_is_found(folder: ServerFolder, office: Office) -> None:
    keys = Phone().keys()
    planted(folder, keys, Office().certify(keys, "sybil"), "sybil")
    refused(folder, folder.devices, StateError, r"sybil\.json is not certified by this server's operator: remove it")
    planted(folder, keys, office.certify(keys, "other"), "sybil")
    refused(folder, folder.devices, StateError, "holds another device than its name says")


def test_a_login_key_that_somebody_put_beside_a_good_certificate_is_found(folder: ServerFolder, office: Office) -> None:
    keys, theirs = enrolled(folder, office), Phone().keys()
    planted(folder, replace(keys, login_key=theirs.login_key), office.certify(keys), "anna")
    refused(folder, folder.devices, StateError, r"anna\.json: the login key is not signed with the device key")
    planted(folder, theirs, office.certify(keys), "anna")
    refused(folder, folder.devices, StateError, r"anna\.json: the login key is not signed with the device key")


def test_twin_without_the_device_s_word_another_login_key_is_let_in(
    folder: ServerFolder, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, theirs = enrolled(folder, office), Phone().keys()
    planted(folder, replace(keys, login_key=theirs.login_key), office.certify(keys), "anna")
    really = signatures.is_valid

    def but_for_logins(key: bytes, signature: bytes, purpose: str, *rest: bytes) -> bool:
        return purpose == "login" or really(key, signature, purpose, *rest)

    monkeypatch.setattr(signatures, "is_valid", but_for_logins)
    assert folder.devices()["anna"].login_key_bytes == theirs.login_key


@pytest.mark.parametrize(
    "name", ["operator.pub", "rotations.json", "revocations.json", "devices/anna.json", "loopback.token"]
)
@pytest.mark.parametrize("how", ["cut", "empty", "another operator's"])
def test_a_damaged_file_is_named(tmp_path: Path, office: Office, name: str, how: str) -> None:
    full = []
    for path, one in ((tmp_path / "ours", office), (tmp_path / "theirs", Office())):
        folder = server_folder.create(path, CONFIG, NOW, one.public_key)
        enrolled(folder, one)
        one.revoke(Phone().keys())
        one.rotate()
        folder.follow(one.rotations, one.revocations)
        full.append(folder)
    file = full[0].path / name
    content = (full[1].path / name).read_bytes() if how == "another operator's" else file.read_bytes()
    file.write_bytes({"cut": content[:-7], "empty": b""}.get(how, content))
    if name == "loopback.token" and how == "another operator's":
        assert full[0].token == full[1].token
        return
    with pytest.raises(StateError, match=r"ours.*(backup|find out who put it there)"):
        full[0].roll()
        full[0].token  # noqa: B018


def test_a_list_of_nested_lists_in_a_device_s_file_is_refused(folder: ServerFolder, office: Office) -> None:
    enrolled(folder, office)
    file = folder.path / "devices/anna.json"
    values = json.loads(file.read_bytes())
    for value in ("[" * 900 + "]" * 900, "null", "{}", "1e999", '"\\ud800"'):
        changed = json.dumps(values | {"certificate": 0}, separators=(",", ":")).replace(
            '"certificate":0', f'"certificate":{value}'
        )
        file.write_text(changed + "\n")
        with pytest.raises(StateError, match=r"anna\.json"):
            folder.roll()


def test_what_the_operator_signs_is_read_as_the_operator_wrote_it(folder: ServerFolder, office: Office) -> None:
    newest = office.revoke(enrolled(folder, office))
    folder.follow((), newest)
    assert (folder.path / "revocations.json").read_bytes() == trust_text.write_revocations(newest)
