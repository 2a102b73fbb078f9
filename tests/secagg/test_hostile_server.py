"""A server that lies: each lie is refused, and each twin shows what it is good for where nobody checks.

A test and its twin run the same attack. The twin switches off the defence that the test is about, and nothing else
(where several stand in each other's place it says so), and then reads what it should not: a vector, bit for bit.
"""

import ast
import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedmini import floors
from fedmini.errors import CohortError, ProtocolError
from fedmini.floors import Limits
from fedmini.member import ForThisProcess, Member, OwnLedger
from fedmini.privacy import accounting, clipping, encoding, noise
from fedmini.privacy.accounting import UnitRequest
from fedmini.privacy.device_ledger import LifetimeLimits
from fedmini.privacy.noise import RandomStream
from fedmini.secagg import bindings, checks, keys, signed_manifest, trust, wire
from fedmini.secagg.device_session import DeviceSession
from fedmini.secagg.keys import SecretKey
from fedmini.secagg.messages import Advert, Context, KeyList, Outcome, Stage, Work, hash_model
from fedmini.secagg.signed_manifest import SignedManifest
from fedmini.secagg.trust import Identity, Revocations, Trust
from fedmini.types import DeviceId, Manifest, Residues
from tests.secagg.cohort import MODEL, Cohort, Device, a_manifest, with_release
from tests.secagg.lying_server import Locked, LyingServer, Puppet, believe, take_anything_for_a_share

VICTIM = "d000"
OTHER_MODEL = MODEL[::-1]
P = 2**255 - 19


def comes_out(server: LyingServer, *devices: DeviceId, cancelling: Collection[DeviceId] = ()) -> bool:
    """Whether the server has the sum of these devices' vectors, bit for bit; of one device: its vector."""
    try:
        found = server.open(*devices, cancelling=cancelling)
    except Locked:
        return False
    return np.array_equal(found, server.cohort.sum_of(devices))


def refused(server: LyingServer, *devices: DeviceId, because: str) -> bool:
    """Whether these devices, and no other, refused, and said this."""
    return set(server.refusals) == set(devices) and all(because in str(error) for error in server.refusals.values())


# Stage 0 and 1: keys.


def swap_the_keys_of_all_peers(cohort: Cohort) -> LyingServer:
    """The victim is shown its peers' names and certificates, with keys that the server made."""
    server = LyingServer(cohort)
    server.invite()
    puppets = [Puppet(peer) for peer in cohort.devices if peer != VICTIM]
    swapped = {
        puppet.device: replace(
            server.adverts[puppet.device], mask_key=puppet.mask_key.public(), share_key=puppet.share_key.public()
        )
        for puppet in puppets
    }
    server.show({VICTIM: server.with_keys(swapped)})
    server.play(VICTIM, puppets)
    return server


def test_a_server_that_swaps_public_keys_is_refused():
    server = swap_the_keys_of_all_peers(Cohort())
    assert refused(server, VICTIM, because="d001: its keys are not signed for this session")
    assert not server.dealt and not comes_out(server, VICTIM)


def test_twin_a_server_that_swaps_public_keys_reads_the_victim_s_vector(monkeypatch):
    monkeypatch.setattr(checks, "advert_signatures", believe)
    assert comes_out(swap_the_keys_of_all_peers(Cohort()), VICTIM)


def surround_with_invented_devices(cohort: Cohort) -> LyingServer:
    """The victim is the only device; its peers have certificates by an operator that nobody enrolled with."""
    server = LyingServer(cohort)
    server.invite([VICTIM])
    puppets = [Puppet(peer) for peer in cohort.devices if peer != VICTIM]
    adverts = {puppet.device: puppet.advert(cohort.context.digest) for puppet in puppets}
    server.show({VICTIM: server.with_keys(adverts)})
    server.play(VICTIM, puppets)
    return server


def test_a_server_that_invents_devices_without_a_certificate_is_refused():
    server = surround_with_invented_devices(Cohort())
    assert refused(server, VICTIM, because="'d001' is not signed by the operator")
    assert not server.dealt and not comes_out(server, VICTIM)


def test_twin_a_server_that_invents_devices_reads_the_lone_victim_s_vector(monkeypatch):
    monkeypatch.setattr(checks, "certificates", believe)
    assert comes_out(surround_with_invented_devices(Cohort()), VICTIM)


def surround_with_revoked_devices(cohort: Cohort, shown: Revocations | None) -> LyingServer:
    """All peers were stolen, and revoked; the server has their keys, and shows an older list of revocations."""
    server = LyingServer(cohort)
    server.invite([VICTIM])
    puppets = [Puppet(peer, cohort.identities[peer]) for peer in cohort.devices if peer != VICTIM]
    adverts = [server.adverts[VICTIM], *(puppet.advert(cohort.context.digest) for puppet in puppets)]
    server.show({VICTIM: server.key_list(adverts, revocations=shown)})
    server.play(VICTIM, puppets)
    return server


def stolen_and_revoked(cohort: Cohort) -> tuple[Revocations, Revocations]:
    """The list before the theft and the one after, which every device has seen."""
    before = trust.revoke(cohort.operator, None, [])
    stolen = [cohort.identities[peer].certificate.device_key for peer in cohort.devices if peer != VICTIM]
    after = trust.revoke(cohort.operator, before, stolen)
    cohort.trust = Trust(cohort.trust.operator_key, after)
    cohort.begin(cohort.context)
    return before, after


@pytest.mark.parametrize("shown", ["the older list", "none", "the newest list"])
def test_a_server_that_hides_revocations_is_refused(shown):
    cohort = Cohort()
    before, after = stolen_and_revoked(cohort)
    server = surround_with_revoked_devices(cohort, {"the older list": before, "none": None}.get(shown, after))
    because = {"the older list": "plays back an old one", "none": "is missing"}.get(shown, "was revoked")
    assert refused(server, VICTIM, because=because)
    assert not comes_out(server, VICTIM)


def test_twin_a_server_that_hides_revocations_surrounds_the_victim_with_stolen_devices(monkeypatch):
    """A device without this check believes whatever list it is shown."""
    monkeypatch.setattr(checks, "revocations", lambda found, known: Trust(known.operator_key, found))
    cohort = Cohort()
    before, _ = stolen_and_revoked(cohort)
    assert comes_out(surround_with_revoked_devices(cohort, before), VICTIM)


def learn_a_mask_key_of_everybody(cohort: Cohort) -> dict[DeviceId, tuple[Advert, SecretKey]]:
    """One round for each peer, in which it is said to have dropped: nothing wrong with that, its key serves once."""
    learnt = {}
    for round_num, peer in enumerate(cohort.devices[1:], 1):
        cohort.begin(cohort.context_of(round_num))
        server = LyingServer(cohort)
        server.invite()
        server.show()
        left = [device for device in cohort.devices if device != peer]
        server.hand_out(dict.fromkeys(left, cohort.devices))
        server.tell(dict.fromkeys(left, left))
        server.unmask()
        learnt[peer] = (server.adverts[peer], SecretKey(server.secret("key", peer)))
    return learnt


def replay_old_keys(cohort: Cohort, whole: bool = False) -> LyingServer:
    """In a later round the victim is shown its peers' old mask keys, which the server knows by now.

    `whole`: the old adverts as they were, with their signatures.
    """
    learnt = learn_a_mask_key_of_everybody(cohort)
    cohort.begin(cohort.context_of(round_num=9))
    server = LyingServer(cohort)
    server.invite()
    replayed = {
        peer: advert if whole else replace(server.adverts[peer], mask_key=advert.mask_key)
        for peer, (advert, _) in learnt.items()
    }
    server.show({VICTIM: server.with_keys(replayed)} | dict.fromkeys(cohort.devices[1:], server.key_list()))
    server.mask_keys = {peer: key for peer, (_, key) in learnt.items()}
    server.hand_out()
    server.tell()
    server.unmask()
    return server


@pytest.mark.parametrize("whole", [True, False], ids=["whole adverts", "keys"])
def test_a_server_that_replays_old_keys_is_refused(whole):
    server = replay_old_keys(Cohort(), whole)
    assert refused(server, VICTIM, because="d001: its keys are not signed for this session: another round")
    assert not comes_out(server, VICTIM)


def test_twin_a_server_that_replays_old_keys_takes_all_masks_off_the_victim_s_vector(monkeypatch):
    """Two defences: each device signed its keys for this session, and all that follows is bound to one list of them."""
    monkeypatch.setattr(checks, "advert_signatures", believe)
    bind_to_no_list(monkeypatch)
    assert comes_out(replay_old_keys(Cohort()), VICTIM)


def bind_to_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyList, "digest", property(lambda key_list: key_list.session))


class WeakKey:
    """A public key of small order: what anybody has in common with it is zero."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def public(self) -> bytes:
        return self._public

    def agree(self, peer: bytes) -> bytes:
        return bytes(32)


def send_keys_of_small_order(cohort: Cohort) -> LyingServer:
    """The victim is shown ten keys of small order as its five peers', the one that is all zeros among them."""
    server = LyingServer(cohort)
    server.invite()
    puppets = [Puppet(peer) for peer in cohort.devices if peer != VICTIM]
    points = iter(sorted(checks.SMALL_ORDER))
    for puppet in puppets:
        puppet.mask_key, puppet.share_key = WeakKey(next(points)), WeakKey(next(points))
    weak = {
        puppet.device: replace(
            server.adverts[puppet.device], mask_key=puppet.mask_key.public(), share_key=puppet.share_key.public()
        )
        for puppet in puppets
    }
    server.show({VICTIM: server.with_keys(weak)})
    server.play(VICTIM, puppets)
    return server


def test_a_server_that_sends_keys_of_small_order_or_all_zero_is_refused():
    assert bytes(32) in sorted(checks.SMALL_ORDER)[:10]
    server = send_keys_of_small_order(Cohort())
    assert refused(server, VICTIM, because="d001: a public key is of small order")
    assert not server.dealt and not comes_out(server, VICTIM)


def test_twin_a_server_that_sends_keys_of_small_order_needs_no_key_to_read_the_victim_s_vector(monkeypatch):
    """Three defences: the list of points, the signatures, and the library, which refuses a secret of zeros."""

    def agree(key: SecretKey, peer: bytes) -> bytes:
        return bytes(32) if peer in checks.SMALL_ORDER else safe(key, peer)

    safe = SecretKey.agree
    monkeypatch.setattr(checks, "key_order", believe)
    monkeypatch.setattr(checks, "advert_signatures", believe)
    monkeypatch.setattr(SecretKey, "agree", agree)
    assert comes_out(send_keys_of_small_order(Cohort()), VICTIM)


Form = Callable[[bytes], bytes]

OTHER_FORMS: dict[str, Form] = {
    "with the bit that X25519 ignores": lambda key: key[:31] + bytes([key[31] ^ 0x80]),
    "plus the point of order two": lambda key: pow(int.from_bytes(key, "little"), -1, P).to_bytes(32, "little"),
}


COPIED, LONE, DROPPED = ("d000", "d001", "d002"), "d003", ("d004", "d005", "d006")
CORRUPT = ("d007", "d008", "d009")


def copy_mask_keys(cohort: Cohort, form: Form = bytes) -> LyingServer:
    """Three corrupt devices of ten, fewer than a third, sign copies of three honest devices' mask keys as their own.

    The masks that LONE has in common with a copied device, which comes before it, and with the copy, which comes after
    it, take each other away. Three more devices are said to have dropped: their masks are opened by right.
    """
    server = LyingServer(cohort, CORRUPT)
    server.invite()
    true, copies = dict(server.adverts), {}
    for copied, corrupt in zip(COPIED, CORRUPT, strict=True):
        public = (form(true[copied].mask_key), true[corrupt].share_key)
        signature = cohort.identities[corrupt].sign("advert", cohort.context.digest, corrupt, *public)
        copies[corrupt] = replace(true[corrupt], mask_key=public[0], share_key=public[1], signature=signature)
    for corrupt in CORRUPT:  # their own programs know of it
        cohort.sessions[corrupt]._adverts = {corrupt: copies[corrupt]}
    server.show(dict.fromkeys(cohort.devices, server.with_keys(copies)))
    left = [device for device in cohort.devices if device not in DROPPED]
    server.hand_out(dict.fromkeys(left, tuple(server.dealt)))
    server.tell({device: left for device in left})
    server.unmask()
    return server


def a_lone_vector_comes_out(server: LyingServer) -> bool:
    return comes_out(server, LONE, cancelling=(*COPIED, *CORRUPT))


def ten_of_whom_seven_must_survive() -> Cohort:
    return Cohort(10, a_manifest(min_survivors=7))


def test_a_server_with_duplicated_keys_is_refused():
    server = copy_mask_keys(ten_of_whom_seven_must_survive())
    assert refused(server, *server.cohort.devices, because="a public key is on the list twice")
    assert not a_lone_vector_comes_out(server)


def bind_masks_to_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "pair_mask_key", lambda secret, session, *_: keys.derive(secret, "mask", session))


def test_twin_with_duplicated_keys_two_masks_take_each_other_away_and_a_vector_stands_alone(monkeypatch):
    """Two defences: no key comes twice, and a mask is bound to the names of the two that have it in common."""
    monkeypatch.setattr(checks, "distinct_keys", believe)
    bind_masks_to_no_names(monkeypatch)
    assert a_lone_vector_comes_out(copy_mask_keys(ten_of_whom_seven_must_survive()))


@pytest.mark.parametrize("form", OTHER_FORMS.values(), ids=OTHER_FORMS.keys())
def test_a_server_with_a_key_in_two_forms_gets_no_vector_alone(form):
    """The bytes differ, and the secret in common with every other key is the same."""
    copied, peer = SecretKey.draw(bytes_of_seven), SecretKey(b"\x05" * 32)
    assert form(copied.public()) != copied.public() and peer.agree(form(copied.public())) == peer.agree(copied.public())
    assert not a_lone_vector_comes_out(copy_mask_keys(ten_of_whom_seven_must_survive(), form))


def bytes_of_seven(size: int) -> bytes:
    return b"\x07" * size


@pytest.mark.parametrize("form", OTHER_FORMS.values(), ids=OTHER_FORMS.keys())
def test_twin_with_a_key_in_two_forms_a_vector_stands_alone_where_masks_are_bound_to_no_names(monkeypatch, form):
    bind_masks_to_no_names(monkeypatch)
    assert a_lone_vector_comes_out(copy_mask_keys(ten_of_whom_seven_must_survive(), form))


ASIDE, LENT, OTHERS = [tuple(f"d{index:03d}" for index in range(*ends)) for ends in ((0, 5), (5, 7), (7, 24))]


def show_two_lists_of_keys(cohort: Cohort) -> LyingServer:
    """Nobody is corrupt. Seven devices are shown each other's keys only, all others the whole list: both are long enough.

    The seven agree that all of them are alive. The other seventeen agree that two of the seven dropped, and are enough
    to open the mask keys that those two dealt for the whole list: what is left of the seven's sum is the sum of five.
    """
    server = LyingServer(cohort)
    server.invite()
    short = server.key_list([server.adverts[device] for device in (*ASIDE, *LENT)])
    server.show(dict.fromkeys(ASIDE, short) | dict.fromkeys((*LENT, *OTHERS), server.key_list()))
    server.hand_out(dict.fromkeys(ASIDE, (*ASIDE, *LENT)) | dict.fromkeys(OTHERS, (*LENT, *OTHERS)))
    server.tell(dict.fromkeys(ASIDE, (*ASIDE, *LENT)) | dict.fromkeys(OTHERS, OTHERS))
    server.unmask()
    return server


def test_a_server_that_shows_two_lists_of_keys_gets_no_sum_of_fewer_devices_than_must_survive():
    server = show_two_lists_of_keys(Cohort(24, a_manifest(min_survivors=7)))
    assert refused(server, *ASIDE, because="a sealed share was changed, or was meant for somebody else")
    assert not comes_out(server, *ASIDE)


def test_twin_with_two_lists_of_keys_a_sum_of_five_comes_out_where_seven_must_survive(monkeypatch):
    """Shares, masks and signatures that are bound to the session, and not to the list of keys and the threshold in it."""
    bind_to_no_list(monkeypatch)
    server = show_two_lists_of_keys(Cohort(24, a_manifest(min_survivors=7)))
    assert not server.refusals and comes_out(server, *ASIDE)


@pytest.mark.parametrize("threshold", [1, 2, 4])
def test_a_server_that_sets_a_low_threshold_is_refused(threshold):
    server = set_the_threshold(Cohort(), threshold)
    assert refused(server, *server.cohort.devices, because="expected a threshold from 5 to 6")
    assert not server.dealt and not comes_out(server, VICTIM)


def set_the_threshold(cohort: Cohort, threshold: int) -> LyingServer:
    """The last device is corrupt: with a threshold of one, its share is the secret."""
    server = LyingServer(cohort, cohort.devices[-1:])
    server.invite()
    server.show(dict.fromkeys(cohort.devices, server.key_list(threshold=threshold)))
    server.hand_out()
    return server


def test_twin_with_a_threshold_of_one_a_single_corrupt_device_opens_everybody_s_vector(monkeypatch):
    monkeypatch.setattr(checks, "threshold", believe)
    server = set_the_threshold(Cohort(), threshold=1)
    assert all(comes_out(server, device) for device in server.cohort.devices)


def split_nine_devices(cohort: Cohort, threshold: int) -> LyingServer:
    """Three of nine are corrupt and sign anything; three honest ones are told that the victim is alive, three that not."""
    server = LyingServer(cohort, cohort.devices[6:])
    server.invite()
    server.show(dict.fromkeys(cohort.devices, server.key_list(threshold=threshold)))
    server.hand_out()
    without = [device for device in cohort.devices if device != VICTIM]
    told = dict.fromkeys(cohort.devices[:3], cohort.devices) | dict.fromkeys(cohort.devices[3:6], without)
    server.tell(told)
    server.unmask()
    return server


def test_a_server_that_sets_the_threshold_to_two_thirds_is_refused():
    server = split_nine_devices(Cohort(9), threshold=6)
    assert refused(server, *server.cohort.devices, because="expected a threshold from 7 to 9")
    assert not comes_out(server, VICTIM)
    assert not comes_out(split_nine_devices(Cohort(9), threshold=7), VICTIM)  # the least that is accepted is enough


def test_twin_at_two_thirds_a_third_of_the_devices_can_help_to_open_one_vector(monkeypatch):
    monkeypatch.setattr(checks, "lowest_threshold", lambda num_devices: 2 * num_devices // 3)
    assert comes_out(split_nine_devices(Cohort(9), threshold=6), VICTIM)


# Who is in the cohort.


def invite_fewer_than_must_survive(cohort: Cohort) -> LyingServer:
    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out()
    server.tell()
    server.unmask()
    return server


def test_a_server_that_invites_a_tiny_cohort_is_refused():
    server = invite_fewer_than_must_survive(Cohort(3, a_manifest(min_survivors=5)))
    assert refused(server, *server.cohort.devices, because="expected 5 to 150 devices, as the manifest says, got 3")
    assert not server.adverts


def test_twin_in_a_tiny_cohort_three_shares_of_the_noise_are_left_of_five(monkeypatch):
    """Three defences count devices: on the list of keys, of shares, and of survivors."""
    for name in ("cohort_size", "holders", "enough_survivors"):
        monkeypatch.setattr(checks, name, believe)
    server = invite_fewer_than_must_survive(Cohort(3, a_manifest(min_survivors=5)))
    assert comes_out(server, *server.cohort.devices)


def invite_more_than_the_modulus_has_room_for(cohort: Cohort) -> LyingServer:
    for owner in cohort.owners.values():
        owner.vector = np.full(cohort.manifest.num_coordinates, 2**22, np.uint32)
    return invite_fewer_than_must_survive(cohort)


def test_a_server_that_invites_too_many_devices_is_refused():
    server = invite_more_than_the_modulus_has_room_for(Cohort(5, a_manifest(max_devices=4)))
    assert refused(server, *server.cohort.devices, because="expected 2 to 4 devices, as the manifest says, got 5")


def test_twin_with_too_many_devices_the_sum_comes_out_wrapped(monkeypatch):
    monkeypatch.setattr(checks, "cohort_size", believe)
    server = invite_more_than_the_modulus_has_room_for(Cohort(5, a_manifest(max_devices=4)))
    assert set(server.open(*server.cohort.devices)) == {2**22} != {5 * 2**22}


def let_a_stranger_in(cohort: Cohort) -> LyingServer:
    """The cohort that everybody signs for has five devices; the list of keys has a sixth."""
    cohort.begin(replace(cohort.context, invited=cohort.devices[:5]))
    cohort.sessions["d005"] = cohort.session("d005")
    server = LyingServer(cohort, corrupt=["d005"])
    server.invite(cohort.devices)
    if "d005" not in server.adverts:  # it is corrupt: another program than ours answers for it
        server.adverts["d005"] = Puppet("d005", cohort.identities["d005"]).advert(cohort.context.digest)
    server.show()
    server.hand_out()
    server.tell()
    server.unmask()
    return server


def test_a_server_that_lets_an_uninvited_device_in_is_refused():
    server = let_a_stranger_in(Cohort())
    assert "d005 is not among the devices that are invited" in str(server.refusals.pop("d005"))
    assert refused(server, *server.cohort.devices[:5], because="d005 is on the list of keys, and was never invited")


def test_twin_an_uninvited_device_is_in_the_sum_of_a_cohort_that_nobody_signed_it_into(monkeypatch):
    """Two defences: the device's own, which was not invited, and that of all others, which see it on the list."""
    monkeypatch.setattr(checks, "invited", believe)
    monkeypatch.setattr(checks, "roster", believe)
    server = let_a_stranger_in(Cohort())
    assert "d005" not in server.cohort.context.invited
    assert comes_out(server, *server.cohort.devices)


# What a session is about.


def hold_a_session_about_another_run(cohort: Cohort) -> LyingServer:
    """One run's manifest, under which a device agreed to take part, and a session about another one."""
    other = replace(cohort.manifest, run_id="another run")
    cohort.context = replace(cohort.context, run_id=other.run_id, manifest_hash=bytes.fromhex(other.hash))
    return invite_fewer_than_must_survive(cohort)


def test_a_server_that_holds_a_session_about_another_manifest_is_refused():
    server = hold_a_session_about_another_run(Cohort())
    assert refused(server, *server.cohort.devices, because="the session is about run 'another run'")
    assert not server.adverts


def test_twin_devices_are_summed_in_a_run_that_they_never_agreed_to(monkeypatch):
    monkeypatch.setattr(checks, "manifest", believe)
    server = hold_a_session_about_another_run(Cohort())
    assert server.cohort.context.run_id != server.cohort.manifest.run_id
    assert comes_out(server, *server.cohort.devices)


def send_another_model_to_the_victim(cohort: Cohort) -> LyingServer:
    def change(device: DeviceId, work: Work) -> Work:
        return replace(work, model=OTHER_MODEL) if device == VICTIM else work

    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out(change=change)
    server.tell()
    server.unmask()
    return server


def test_a_server_that_sends_one_device_another_model_than_it_announced_is_refused():
    server = send_another_model_to_the_victim(Cohort())
    assert refused(server, VICTIM, because="the model is another than the one that the cohort was invited for")
    assert server.cohort.owners[VICTIM].models == [] and not comes_out(server, *server.cohort.devices)


def test_twin_an_update_on_a_model_made_for_the_victim_alone_is_in_the_sum(monkeypatch):
    monkeypatch.setattr(checks, "model", believe)
    server = send_another_model_to_the_victim(Cohort())
    assert server.cohort.owners[VICTIM].models == [OTHER_MODEL]
    assert comes_out(server, *server.cohort.devices)


def announce_another_model_to_the_victim(cohort: Cohort) -> LyingServer:
    """The victim is invited for another model, and gets it: for itself all is as it should be."""
    other = replace(cohort.context, model_hash=hash_model(OTHER_MODEL))

    def change(device: DeviceId, work: Work) -> Work:
        return replace(work, model=OTHER_MODEL) if device == VICTIM else work

    server = LyingServer(cohort)
    server.invite(contexts={VICTIM: other})
    server.show()
    server.hand_out(change=change)
    server.tell(dict.fromkeys(cohort.devices[1:], cohort.devices))
    server.unmask()
    return server


def test_a_server_that_announces_different_models_to_different_devices_is_refused():
    server = announce_another_model_to_the_victim(Cohort())
    assert refused(server, *server.cohort.devices, because="its keys are not signed for this session")
    assert not server.vectors


def bind_to_no_session(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let what is derived for a session be the same in every session."""

    def unbound(bound: Callable[..., bytes], place: int) -> Callable[..., bytes]:
        return lambda *arguments: bound(*arguments[:place], b"", *arguments[place + 1 :])

    places = {"pair_mask_key": 1, "sealing_key": 1, "sealed_about": 0, "commit_share": 0}
    for name in names:
        monkeypatch.setattr(bindings, name, unbound(getattr(bindings, name), places[name]))


def test_twin_without_signatures_the_victim_s_update_on_its_own_model_is_in_the_sum(monkeypatch):
    """Defences in a row: signatures over the session, sealed shares that name it, and masks that are derived from it."""
    monkeypatch.setattr(checks, "advert_signatures", believe)
    bind_to_no_session(monkeypatch, "sealing_key", "sealed_about", "commit_share", "pair_mask_key")
    server = announce_another_model_to_the_victim(Cohort())
    assert server.cohort.owners[VICTIM].models == [OTHER_MODEL]
    assert comes_out(server, *server.cohort.devices)


def test_without_signatures_and_sealing_the_masks_of_two_models_still_do_not_cancel(monkeypatch):
    monkeypatch.setattr(checks, "advert_signatures", believe)
    bind_to_no_session(monkeypatch, "sealing_key", "sealed_about", "commit_share")
    server = announce_another_model_to_the_victim(Cohort())
    assert set(server.vectors) == set(server.cohort.devices) and not server.refusals
    assert not comes_out(server, *server.cohort.devices)


def play_back_an_outcome(cohort: Cohort) -> LyingServer:
    """A man in the middle tells the devices what was said in the attempt before, where one had dropped."""
    left = [device for device in cohort.devices if device != "d005"]
    earlier = Outcome(cohort.context.digest, tuple(left), ("d005",))
    cohort.begin(cohort.context_of(round_num=1, attempt=1))
    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out()
    for device in left:
        server.tell_outcome(device, earlier)
    for device in server.outcomes:  # it makes the rest of it from what the devices signed
        server.outcomes[device] = replace(earlier, session=server.session(device))
    server.unmask()
    return server


def test_an_outcome_that_is_played_back_from_another_session_is_refused():
    server = play_back_an_outcome(Cohort())
    assert refused(server, *server.cohort.devices[:5], because="about another session than the one")
    assert not server.agreements and not server.shares


def test_twin_played_back_an_outcome_throws_a_device_out_that_sent_its_vector(monkeypatch):
    monkeypatch.setattr(checks, "session", believe)
    server = play_back_an_outcome(Cohort())
    assert "d005" in server.vectors
    assert comes_out(server, *server.cohort.devices[:5])


# Who survived, and what is opened.


def tell_different_survivors(cohort: Cohort) -> LyingServer:
    """Nobody is corrupt. Twelve devices, four victims: to each device all but one of the victims are said to have dropped.

    Each device is told of nine survivors, and nine must survive. Each victim is alive in three views, and dropped in the
    nine others, which are enough to open its mask key: what is left is the sum of eight.
    """
    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out()
    server.tell({device: view_with(cohort, alive) for device, alive in told_alive(cohort).items()})
    server.unmask()
    return server


def told_alive(cohort: Cohort) -> dict[DeviceId, DeviceId]:
    """For each device the victim that is alive in its view: for a victim itself."""
    return {device: cohort.devices[place % 4] for place, device in enumerate(cohort.devices)}


def view_with(cohort: Cohort, alive: DeviceId) -> list[DeviceId]:
    return [alive, *cohort.devices[4:]]


def twelve_of_whom_nine_must_survive() -> Cohort:
    return Cohort(12, a_manifest(min_survivors=9))


def test_a_server_that_tells_devices_different_survivors_is_refused():
    server = tell_different_survivors(twelve_of_whom_nine_must_survive())
    assert len(server.agreements) == 12
    assert refused(
        server, *server.cohort.devices, because="expected 9 survivors that were told the same outcome, got 3"
    )
    assert not server.shares and not comes_out(server, *server.cohort.devices[4:])


def test_twin_different_survivors_open_a_sum_of_fewer_than_any_device_agreed_to(monkeypatch):
    monkeypatch.setattr(checks, "agreements", believe)
    server = tell_different_survivors(twelve_of_whom_nine_must_survive())
    assert {len(outcome.survivors) for outcome in server.outcomes.values()} == {9}
    assert comes_out(server, *server.cohort.devices[4:])  # of eight


class Interrupted(Identity):
    """A device's identity whose signature under an outcome takes long: other requests come in before it is there."""

    __slots__ = ("on_signing",)

    def sign(self, purpose: str, *fields: Any) -> bytes:
        if purpose == "survivors":
            self.on_signing()
        return super().sign(purpose, *fields)


def tell_all_survivors_at_once(cohort: Cohort) -> LyingServer:
    """As `tell_different_survivors`; each device is told of every outcome while it signs the one before."""
    signed: dict[tuple[DeviceId, ...], dict[DeviceId, bytes]] = {}
    for device in cohort.devices:
        identity = cohort.identities[device]
        cohort.identities[device] = Interrupted(identity._key, identity.certificate)
    cohort.begin(cohort.context)
    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out()
    for device, last in told_alive(cohort).items():
        wanted = [last] if device == last else [*(set(cohort.devices[:4]) - {last}), last]
        outcomes = iter([outcome_with(server, device, alive) for alive in wanted])

        def tell_next(device: DeviceId = device, outcomes: Any = outcomes) -> None:
            outcome = next(outcomes, None)
            signature = server.tell_outcome(device, outcome) if outcome is not None else None
            if signature is not None:
                signed.setdefault(outcome.survivors, {})[device] = signature

        cohort.identities[device].on_signing = tell_next
        tell_next()
        server.outcomes[device] = outcome_with(server, device, last)
    for device, outcome in server.outcomes.items():
        server.ask_to_reveal(device, signed.get(outcome.survivors, {}))
    return server


def outcome_with(server: LyingServer, device: DeviceId, alive: DeviceId) -> Outcome:
    survivors = view_with(server.cohort, alive)
    dropped = set(server.cohort.devices) - set(survivors)
    return Outcome(server.session(device), tuple(sorted(survivors)), tuple(sorted(dropped)))


def test_a_device_that_is_told_of_other_survivors_while_it_signs_does_not_sign_twice():
    server = tell_all_survivors_at_once(twelve_of_whom_nine_must_survive())
    assert not server.shares and not comes_out(server, *server.cohort.devices[4:])


def test_twin_who_signs_two_outcomes_at_once_lets_a_sum_of_too_few_be_opened(monkeypatch):
    monkeypatch.setattr(checks, "stage", believe)
    server = tell_all_survivors_at_once(twelve_of_whom_nine_must_survive())
    assert comes_out(server, *server.cohort.devices[4:])


class Busy(Device):
    """A device that is asked something else while it trains."""

    def contribute(self, context: Context, model: bytes) -> Residues:
        vector = super().contribute(context, model)
        if len(self.models) == 1:
            self.meanwhile()
        return vector


def ask_for_a_vector_while_it_is_made(cohort: Cohort) -> LyingServer:
    cohort.owners[VICTIM] = Busy(cohort.owners[VICTIM].vector)
    cohort.begin(cohort.context)
    server = LyingServer(cohort)
    server.invite()
    server.show()
    shares = tuple(server.sealed(peer, VICTIM) for peer in cohort.devices[1:])
    work = Work(session=server.session(VICTIM), shares=shares, model=MODEL)
    cohort.owners[VICTIM].meanwhile = lambda: server.take_vector(VICTIM, work)
    server.take_vector(VICTIM, work)
    return server


def test_a_device_that_is_asked_for_its_vector_while_it_makes_it_makes_it_once():
    assert ask_for_a_vector_while_it_is_made(Cohort()).cohort.owners[VICTIM].models == [MODEL]


def test_twin_asked_again_while_it_makes_its_vector_a_device_trains_and_pays_twice(monkeypatch):
    monkeypatch.setattr(checks, "stage", believe)
    assert ask_for_a_vector_while_it_is_made(Cohort()).cohort.owners[VICTIM].models == [MODEL, MODEL]


def name_the_victim_alive_and_dead(cohort: Cohort) -> LyingServer:
    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out()
    for device in cohort.devices:
        server.tell_outcome(device, Outcome(server.session(device), cohort.devices, (VICTIM,)))
    server.unmask()
    return server


def test_a_server_that_names_a_device_alive_and_dead_is_refused():
    server = name_the_victim_alive_and_dead(Cohort())
    assert refused(server, *server.cohort.devices, because="don't make up the roster, each once")
    assert not server.agreements and not comes_out(server, VICTIM)


def test_twin_of_a_device_alive_and_dead_both_kinds_of_share_come_out_and_its_vector_with_them(monkeypatch):
    monkeypatch.setattr(checks, "partition", believe)
    assert comes_out(name_the_victim_alive_and_dead(Cohort()), VICTIM)


def ask_to_unmask_twice(cohort: Cohort) -> LyingServer:
    """First all are alive; then, when the shares of all seeds are there, the victim has dropped."""
    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out()
    server.tell()
    server.unmask()
    assert comes_out(server, *cohort.devices) and not comes_out(server, VICTIM)
    server.tell(dict.fromkeys(cohort.devices[1:], cohort.devices[1:]))
    server.unmask(cohort.devices[1:])
    return server


def test_a_server_that_asks_to_unmask_twice_is_refused():
    server = ask_to_unmask_twice(Cohort())
    assert refused(
        server, *server.cohort.devices[1:], because="expected a request of stage DONE, got one of stage AGREE"
    )
    assert not comes_out(server, VICTIM)


def test_twin_unmasked_twice_the_victim_s_vector_comes_out(monkeypatch):
    """Two defences: each stage comes once, and at the end every share that is held is dropped."""
    monkeypatch.setattr(checks, "stage", believe)
    monkeypatch.setattr(DeviceSession, "close", believe)
    assert comes_out(ask_to_unmask_twice(Cohort()), VICTIM)


FIRST_TEN = tuple(f"d{place:03d}" for place in range(10))


def ask_with_too_few_survivors(cohort: Cohort) -> LyingServer:
    """Two of twelve have dropped, says the server to all; nine would do for the threshold, eleven must survive."""
    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out()
    server.tell(dict.fromkeys(FIRST_TEN, FIRST_TEN))
    server.unmask()
    return server


def test_a_server_that_asks_with_too_few_survivors_is_refused():
    server = ask_with_too_few_survivors(Cohort(12, a_manifest(min_survivors=11)))
    assert refused(server, *FIRST_TEN, because="expected at least 11 survivors, got 10")
    assert not server.agreements and not comes_out(server, *FIRST_TEN)


def test_twin_with_too_few_survivors_a_sum_with_less_noise_than_planned_comes_out(monkeypatch):
    monkeypatch.setattr(checks, "enough_survivors", believe)
    assert comes_out(ask_with_too_few_survivors(Cohort(12, a_manifest(min_survivors=11))), *FIRST_TEN)


def go_on_after_two_stages_that_thirty_percent_dropped_in(cohort: Cohort) -> LyingServer:
    """Of twenty devices fourteen sent their keys, and ten of those their shares; fourteen must survive."""
    server = LyingServer(cohort)
    server.invite(cohort.devices[:14])
    server.show(dict.fromkeys(FIRST_TEN, server.key_list()))
    server.hand_out()
    server.tell()
    server.unmask()
    return server


def test_a_server_that_drops_thirty_percent_before_each_stage_gets_nothing_and_nobody_pays():
    server = go_on_after_two_stages_that_thirty_percent_dropped_in(Cohort(20, a_manifest(min_survivors=14)))
    assert refused(server, *FIRST_TEN, because="expected at least 14 devices that hold shares, got 10")
    assert not any(owner.models for owner in server.cohort.owners.values())
    assert not comes_out(server, *FIRST_TEN)


def test_twin_after_two_times_thirty_percent_a_sum_of_half_the_devices_comes_out(monkeypatch):
    """Two defences count: those who hold shares, before anything is paid, and those who survived."""
    monkeypatch.setattr(checks, "holders", believe)
    monkeypatch.setattr(checks, "enough_survivors", believe)
    server = go_on_after_two_stages_that_thirty_percent_dropped_in(Cohort(20, a_manifest(min_survivors=14)))
    assert comes_out(server, *FIRST_TEN)


@pytest.mark.parametrize("stage", list(Stage)[:-1], ids=lambda stage: stage.name)
def test_an_honest_server_from_which_thirty_percent_drop_before_each_stage_ends_cleanly(stage):
    """Up to `stage` they drop before every one; only where two stages have passed are too few left."""
    cohort = Cohort(20, a_manifest(min_survivors=10))
    left, drop = list(cohort.devices), {}
    for one in list(Stage)[: stage + 1]:
        drop[one] = left[: round(0.3 * len(left))]
        left = left[len(drop[one]) :]
    if stage <= Stage.SHARE:  # of 20 first 14 are left, then 10
        np.testing.assert_array_equal(cohort.run(drop=drop).cohort_sum.total, cohort.sum_of(left))
        return
    server = cohort.server()
    with pytest.raises(CohortError, match="7 devices sent their vectors, 10 are needed; what was debited stays spent"):
        cohort.run(drop=drop, server=server)
    assert server.stage is Stage.CONTRIBUTE


# Shares on their way.


def reflect_the_victim_s_shares(cohort: Cohort) -> LyingServer:
    """What the victim sealed for d005 comes back to it as what d005 sealed for it; then d005 is said to have dropped.

    Four devices are corrupt, one less than the threshold. The share that they lack the victim takes for one of d005's.
    """

    def reflect(device: DeviceId, work: Work) -> Work:
        if device != VICTIM:
            return work
        _, sealed, commitments = server.sealed(VICTIM, "d005")
        return replace(work, shares=(*work.shares[:-1], ("d005", sealed, commitments)))

    server = LyingServer(cohort, corrupt=cohort.devices[1:5])
    server.invite()
    server.show()
    server.hand_out(change=reflect)
    server.tell(dict.fromkeys(cohort.devices[:5], cohort.devices[:5]))
    server.unmask()
    reflected = server.shares["key", "d005"].pop(VICTIM, None)
    if reflected is not None:
        server.shares["key", VICTIM]["d005"] = reflected  # which is whose it is
    return server


def test_a_server_that_reflects_a_device_s_own_share_is_refused():
    server = reflect_the_victim_s_shares(Cohort())
    assert "a sealed share was changed, or was meant for somebody else" in str(server.refusals[VICTIM])
    assert VICTIM not in server.vectors and not comes_out(server, VICTIM)


def test_twin_a_reflected_share_makes_the_victim_reveal_its_own_mask_key_s_while_it_is_alive(monkeypatch):
    """Three defences: the sealing key and what is sealed name dealer and holder in their order; so do the commitments."""
    sealing_key, sealed_about = bindings.sealing_key, bindings.sealed_about
    monkeypatch.setattr(bindings, "sealing_key", lambda key, session, *pair: sealing_key(key, session, *sorted(pair)))
    monkeypatch.setattr(bindings, "sealed_about", lambda session, *pair: sealed_about(session, *sorted(pair)))
    monkeypatch.setattr(checks, "share_commitments", believe)
    server = reflect_the_victim_s_shares(Cohort())
    assert VICTIM in server.outcomes[VICTIM].survivors and not server.refusals
    assert comes_out(server, VICTIM)


def forward_shares_to_the_wrong_peers(cohort: Cohort) -> LyingServer:
    """Each device gets, under every dealer's name, what that dealer sealed for the next device."""

    def forward(device: DeviceId, work: Work) -> Work:
        shares = []
        for dealer, _, commitments in work.shares:
            around = [peer for peer in cohort.devices if peer != dealer]
            wrong = around[(around.index(device) + 1) % len(around)]
            shares.append((dealer, dict(server.dealt[dealer].sealed)[wrong], commitments))
        return replace(work, shares=tuple(shares))

    server = LyingServer(cohort)
    server.invite()
    server.show()
    server.hand_out(change=forward)
    return server


def test_a_server_that_forwards_shares_to_the_wrong_peers_is_refused():
    server = forward_shares_to_the_wrong_peers(Cohort())
    assert refused(server, *server.cohort.devices, because="was meant for somebody else")
    assert not server.vectors and not any(owner.models for owner in server.cohort.owners.values())


def test_twin_shares_that_went_to_the_wrong_peers_are_paid_for_and_open_nothing(monkeypatch):
    """Three defences: a share is sealed for its holder with a tag, is committed to by name, and is a number of the field."""
    take_anything_for_a_share(monkeypatch)
    server = forward_shares_to_the_wrong_peers(Cohort())
    server.tell()
    server.unmask()
    assert all(owner.models == [MODEL] for owner in server.cohort.owners.values())
    assert len(server.shares["seed", VICTIM]) == 6 and not comes_out(server, *server.cohort.devices)


def flip_a_bit(stage: Stage, device: DeviceId, request: bytes) -> bytes:
    """A man in the middle of an honest round: one bit of every sealed share that goes to the victim."""
    if stage is not Stage.CONTRIBUTE or device != VICTIM:
        return request
    work = wire.decode(request, Work, 2**30)
    changed = [
        (dealer, bytes([sealed[0] ^ 1]) + sealed[1:], commitments) for dealer, sealed, commitments in work.shares
    ]
    return wire.encode(replace(work, shares=tuple(changed)))


def test_a_tampered_ciphertext_is_refused_and_the_others_finish_without_its_receiver():
    cohort = Cohort(7)
    server = cohort.run(tamper=flip_a_bit)
    assert "a sealed share was changed" in str(cohort.errors.pop(VICTIM)) and not cohort.errors
    assert cohort.owners[VICTIM].models == [] and not server.refusals
    np.testing.assert_array_equal(server.cohort_sum.total, cohort.sum_of(cohort.devices[1:]))


def test_twin_a_tampered_ciphertext_makes_its_honest_receiver_the_offender_and_costs_it_its_privacy(monkeypatch):
    """Three defences: the tag of the sealed share, the dealer's commitment to it, and that it is a number of the field."""
    take_anything_for_a_share(monkeypatch)
    cohort = Cohort(7)
    server = cohort.run(tamper=flip_a_bit)
    assert cohort.owners[VICTIM].models == [MODEL]
    assert [(refusal.device, refusal.stage) for refusal in server.refusals] == [(VICTIM, Stage.UNMASK)]


# Round numbers, and what a device agrees to once.


ONCE = {"max_participations": 1, "max_releases": 1}


def a_noised_manifest() -> Manifest:
    """Six devices, five of whom must survive, whose whole updates are clipped to norm 1; noise multiplier 4 with five."""
    unit = accounting.plan_unit(
        UnitRequest(
            unit="device", noise="shared", clip_norm=1.0, num_coordinates=10, num_shares=5, target_delta=1e-5,
            noise_multiplier=4.0,
        )
    )  # fmt: skip
    return with_release(a_manifest(min_survivors=5, max_devices=6), device=unit, scale=unit.scale, **ONCE)


def hold_two_sessions_of_one_round(cohort: Cohort, folder: Path) -> np.ndarray:
    """The same round and attempt twice, the second time without the victim: the difference of the two sums.

    What the devices compute is the same both times. With fresh noise in it the server would have to ask more often.
    """
    for device in cohort.devices:
        ledger = OwnLedger(folder / device, LifetimeLimits(10.0, 1e-5))
        member = Member(
            cohort.identities[device],
            ForThisProcess(cohort.sessions[device].agreed),
            cohort.owners[device].answer,
            ledger,
        )
        cohort.sessions[device] = SimpleNamespace(step=member.answer)
    first = cohort.run().cohort_sum.total
    cohort.context = cohort.context_of(round_num=1, devices=cohort.devices[1:])
    second = cohort.run().cohort_sum.total
    return (first - second) & np.uint32(2**cohort.manifest.release.modulus_bits - 1)


def test_a_server_that_starts_a_second_session_with_the_same_round_number_is_refused(tmp_path):
    cohort = Cohort(manifest=a_noised_manifest())
    with pytest.raises(CohortError, match="0 devices sent their keys, 5 are needed"):
        hold_two_sessions_of_one_round(cohort, tmp_path)
    assert set(cohort.errors) == set(cohort.devices[1:])
    assert all("expected something later than round 1, attempt 0" in str(error) for error in cohort.errors.values())
    assert [len(owner.models) for owner in cohort.owners.values()] == 6 * [1]


def test_twin_the_sums_of_two_sessions_differ_by_the_victim_s_vector(monkeypatch, tmp_path):
    """A device that forgets: its ledger stops a second contribution when it is invited, and again when it is to pay."""
    monkeypatch.setattr(OwnLedger, "admit", believe)
    monkeypatch.setattr(OwnLedger, "debit", believe)
    cohort = Cohort(manifest=a_noised_manifest())
    np.testing.assert_array_equal(hold_two_sessions_of_one_round(cohort, tmp_path), cohort.sum_of([VICTIM]))


def join(cohort: Cohort, signed: SignedManifest, limits: Limits = floors.COMPILED) -> None:
    """What a device does before its first round; then all of them are ready for a session about that manifest."""
    signed_manifest.check_manifest(cohort.trust, signed)
    floors.check(signed.manifest, limits)
    cohort.manifest = signed.manifest
    cohort.begin(cohort.context_of(round_num=1))


def of_six_in_32_bits() -> Cohort:
    return Cohort(manifest=with_release(a_manifest(modulus_bits=32, max_devices=6), **ONCE))


def sum_in_another_modulus(cohort: Cohort, is_signed: bool) -> int:
    """The operator chose 32 bits, the server says 24. What comes out of six contributions of 2**22 in each coordinate."""
    signed = signed_manifest.sign_manifest(cohort.operator, cohort.manifest, None)
    changed = with_release(cohort.manifest, modulus_bits=24)
    lie = replace(signed, manifest=changed)
    if is_signed:  # an operator that takes part in it
        lie = signed_manifest.sign_manifest(cohort.operator, changed, None)
    join(cohort, lie, Limits(allow_no_privacy=True))
    for owner in cohort.owners.values():
        owner.vector = np.full(cohort.manifest.num_coordinates, 2**22, np.uint32)
    (found,) = set(cohort.run().cohort_sum.total)
    return int(found)


@pytest.mark.parametrize(
    ("is_signed", "because"),
    [(False, "it was changed after it was signed"), (True, "release.modulus_bits: expected 32")],
)
def test_a_server_that_sets_another_modulus_is_refused(is_signed, because):
    with pytest.raises(ProtocolError, match=because):
        sum_in_another_modulus(of_six_in_32_bits(), is_signed)


def test_twin_in_another_modulus_the_sum_is_another(monkeypatch):
    """Two defences: the operator's signature under the manifest, and what a device computes again from it."""
    monkeypatch.setattr(signed_manifest, "check_manifest", believe)
    monkeypatch.setattr(floors, "check", believe)
    assert sum_in_another_modulus(of_six_in_32_bits(), is_signed=False) == 2**23 != 6 * 2**22


def sum_with_another_clip_norm(cohort: Cohort, factor: float, is_signed: bool = False) -> float:
    """What the sum says of the victim's update, in standard deviations of the planned noise: all others are zero."""
    signed = signed_manifest.sign_manifest(cohort.operator, cohort.manifest, None)
    unit = replace(cohort.manifest.release.device, clip_norm=factor)
    lie = replace(signed, manifest=with_release(cohort.manifest, device=unit, encoding_norm=factor))
    if is_signed:
        lie = signed_manifest.sign_manifest(cohort.operator, lie.manifest, None)
    join(cohort, lie)
    for device, owner in cohort.owners.items():
        update = np.zeros(cohort.manifest.num_coordinates)
        update[0] = 1e6 if device == VICTIM else 0.0
        owner.vector = contribution(cohort.manifest, update, RandomStream.seeded(0, device))
    total = encoding.unwrap(cohort.run().cohort_sum.total, cohort.manifest.release.modulus_bits)
    return float(abs(total[0]) / np.sqrt(6 * unit.noise_variance))


def contribution(manifest: Manifest, update: np.ndarray, stream: RandomStream) -> np.ndarray:
    """A device's whole update as it leaves: clipped, rounded, noised."""
    unit = manifest.release.device
    bound = encoding.sensitivity(unit.clip_norm, unit.scale, len(update))
    integers = encoding.round_stochastically(clipping.clip(update, unit.clip_norm), unit.scale, bound, stream)
    noised = integers + noise.discrete_gaussian(unit.noise_variance, len(update), stream)
    return encoding.wrap(noised, manifest.release.modulus_bits)


@pytest.mark.parametrize(
    ("is_signed", "because"),
    [(False, "it was changed after it was signed"), (True, "release.device.scale: expected 81.92")],
)
def test_a_server_that_sets_the_clip_norm_a_hundred_times_higher_is_refused(is_signed, because):
    with pytest.raises(ProtocolError, match=because):
        sum_with_another_clip_norm(Cohort(manifest=a_noised_manifest()), 100.0, is_signed)
    assert sum_with_another_clip_norm(Cohort(manifest=a_noised_manifest()), 1.0) < 5  # as it was signed: noise


def test_twin_with_a_clip_norm_a_hundred_times_higher_the_victim_stands_out_of_the_noise(monkeypatch):
    """Two defences: the operator's signature under the manifest, and what a device computes again from it."""
    monkeypatch.setattr(signed_manifest, "check_manifest", believe)
    monkeypatch.setattr(floors, "check", believe)
    assert sum_with_another_clip_norm(Cohort(manifest=a_noised_manifest()), 100.0) > 15


# Twins.


def test_every_check_has_a_twin_that_switches_it_off():
    named = set()
    for path in sorted(Path(__file__).parent.glob("test_hostile_*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_twin_"):
                named |= switched_off(function)
    public = {name for name, _ in inspect.getmembers(checks, inspect.isfunction) if not name.startswith("_")}
    public = {name for name in public if getattr(checks, name).__module__ == checks.__name__}
    assert len(public) >= 18 and public - named == set()


def switched_off(function: ast.FunctionDef) -> set[str]:
    """The names in `monkeypatch.setattr(checks, "name", ...)`, and in a tuple that is looped over for it."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    patched = [call.args for call in calls if ast.unparse(call.func) == "monkeypatch.setattr"]
    of_checks = [args[1] for args in patched if ast.unparse(args[0]) == "checks"]
    found = {name.value for name in of_checks if isinstance(name, ast.Constant)}
    if any(isinstance(name, ast.Name) for name in of_checks):
        loops = [node.iter for node in ast.walk(function) if isinstance(node, ast.For)]
        found |= {name.value for loop in loops for name in ast.walk(loop) if isinstance(name, ast.Constant)}
    return found


def test_every_test_twin_stands_below_the_attack_whose_defence_it_switches_off():
    for path in sorted(Path(__file__).parent.glob("test_hostile_*.py")):
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        tests = [name for name in names if name.startswith("test_")]
        twins = [place for place, name in enumerate(tests) if name.startswith("test_twin_")]
        assert twins and all(not tests[place - 1].startswith("test_twin_") for place in twins)
