"""A device that lies, among honest ones: it can spoil or leave its own part, is named, and reads nobody's.

A test and its twin run the same attack; the twin switches the defence off and shows what the attack is good for then.
"""

import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedmini.errors import CohortError, UpdateError
from fedmini.secagg import bindings, checks, keys, masks, unmasking, wire
from fedmini.secagg.keys import SecretKey
from fedmini.secagg.messages import Advert, MaskedVector, Revealed, SealedShares, Stage
from fedmini.secagg.server_session import ServerSession
from fedmini.secagg.unmasking import Opening
from fedmini.types import DeviceId, Residues
from tests.secagg.cohort import MODEL, Cohort
from tests.secagg.lying_server import believe, take_anything_for_a_share

LIAR, VICTIM, INNOCENT = "d000", "d001", "d003"
Answers = Iterator[tuple[DeviceId, bytes]]


def run(
    cohort: Cohort, interfere: Callable[[Stage, Answers], Iterable[tuple[DeviceId, bytes]]],
    drop: Mapping[Stage, Sequence[DeviceId]] | None = None, server: ServerSession | None = None,
) -> ServerSession:  # fmt: skip
    """The whole protocol with an honest server; `interfere` sees and changes all that comes to it."""
    server = server or cohort.server()
    requests = server.invite()
    while server.stage is not Stage.DONE:
        stage = server.stage
        requests = server.step(interfere(stage, cohort.answers(stage, requests, drop=drop)))
    return server


def sums(server: ServerSession, cohort: Cohort, devices: Sequence[DeviceId]) -> bool:
    """Whether the exact sum of these devices came out."""
    return np.array_equal(server.cohort_sum.total, cohort.sum_of(devices))


def refused(server: ServerSession) -> list[tuple[DeviceId, Stage]]:
    return [(refusal.device, refusal.stage) for refusal in server.refusals]


# Shares.


def reveal_a_bad_share(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
    """One bit of the liar's share of somebody else's seed; it answers first, so that its shares would be used."""
    if (stage, device) != (Stage.UNMASK, LIAR):
        return answer
    revealed = wire.decode(answer, Revealed, 2**20)
    changed = [
        (dealer, bytes([share[0] ^ 1]) + share[1:] if dealer == INNOCENT else share)
        for dealer, share in revealed.seed_shares
    ]
    return wire.encode(replace(revealed, seed_shares=tuple(changed)))


def test_a_device_that_reveals_a_bad_share_is_named_and_others_are_used():
    cohort = Cohort(7)
    server = cohort.run(change=reveal_a_bad_share)
    assert sums(server, cohort, cohort.devices) and refused(server) == [(LIAR, Stage.UNMASK)]
    assert server.refusals[0].reason == f"{LIAR} revealed a share of {INNOCENT} that is not the one it was dealt"


def test_twin_a_bad_share_costs_the_round_and_names_an_innocent_dealer(monkeypatch):
    monkeypatch.setattr(Opening, "_check", believe)
    with pytest.raises(CohortError, match=f"{INNOCENT} dealt shares of another seed than it committed to: revoke it"):
        Cohort(7).run(change=reveal_a_bad_share)


def deal_again(cohort: Cohort, answer: bytes, holder: DeviceId, pair: tuple[bytes, bytes], is_committed: bool) -> bytes:
    """The liar's shares, with others for one holder."""
    dealt, session = wire.decode(answer, SealedShares, 2**20), cohort.sessions[LIAR]
    digest, place = session._digest, list(session._adverts).index(holder)
    secret = session._secrets.share_key.agree(session._adverts[holder].share_key)
    key, about = bindings.sealing_key(secret, digest, LIAR, holder), bindings.sealed_about(digest, LIAR, holder)
    sealed = dict(dealt.sealed) | {holder: keys.seal(key, b"".join(pair), about)}
    size, commitments = bindings.COMMITMENTS_BYTES, dealt.share_commitments
    if is_committed:
        changed = bindings.commit_shares(digest, LIAR, holder, pair)
        commitments = commitments[: size * place] + changed + commitments[size * (place + 1) :]
    return wire.encode(replace(dealt, sealed=tuple(sealed.items()), share_commitments=commitments))


def seal_a_share_that_was_not_committed_to(cohort: Cohort) -> ServerSession:
    def change(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        if (stage, device) != (Stage.SHARE, LIAR):
            return answer
        return deal_again(cohort, answer, VICTIM, (bytes(32), bytes(32)), is_committed=False)

    return cohort.run(change=change)


def test_a_device_with_a_wrong_commitment_is_named_by_the_holder_before_that_one_pays():
    cohort = Cohort(7)
    server = seal_a_share_that_was_not_committed_to(cohort)
    assert str(cohort.errors.pop(VICTIM)) == f"{LIAR} sealed other shares than it committed to" and not cohort.errors
    assert cohort.owners[VICTIM].models == [] and refused(server) == []
    assert sums(server, cohort, [device for device in cohort.devices if device != VICTIM])


def test_twin_a_wrong_commitment_makes_the_honest_holder_the_offender(monkeypatch):
    monkeypatch.setattr(checks, "share_commitments", believe)
    cohort = Cohort(7)
    server = seal_a_share_that_was_not_committed_to(cohort)
    assert cohort.owners[VICTIM].models == [MODEL] and refused(server) == [(VICTIM, Stage.UNMASK)]
    assert server.refusals[0].reason == f"{VICTIM} revealed a share of {LIAR} that is not the one it was dealt"


def deal_shares_that_are_no_numbers_of_the_field(cohort: Cohort, server: ServerSession) -> None:
    """To every holder, and committed to, so that all agrees until the shares are revealed."""

    def change(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        if (stage, device) != (Stage.SHARE, LIAR):
            return answer
        for holder in cohort.devices[1:]:
            answer = deal_again(cohort, answer, holder, (32 * b"\xff", 32 * b"\xff"), is_committed=True)
        return answer

    cohort.run(server=server, change=change)


def test_a_device_that_deals_impossible_shares_is_named_and_not_those_who_hold_them():
    cohort = Cohort(7)
    server = cohort.server()
    with pytest.raises(CohortError):
        deal_shares_that_are_no_numbers_of_the_field(cohort, server)
    assert not {device for device, _ in refused(server)} & set(cohort.devices[1:])
    assert set(cohort.errors) == set(cohort.devices[1:]) and all(LIAR in str(error) for error in cohort.errors.values())
    assert not any(cohort.owners[device].models for device in cohort.devices[1:])  # nobody paid


def test_twin_impossible_shares_that_are_taken_make_every_honest_holder_an_offender(monkeypatch):
    """What a holder looks at when it opens a share is switched off; the server still looks at what is revealed."""
    monkeypatch.setattr(checks, "share_commitments", believe)
    cohort = Cohort(7)
    server = cohort.server()
    with pytest.raises(CohortError, match="revealed their shares"):
        deal_shares_that_are_no_numbers_of_the_field(cohort, server)
    assert refused(server) == [(device, Stage.UNMASK) for device in cohort.devices[1:]]


def seal_rubbish_for_everybody(cohort: Cohort, server: ServerSession) -> None:
    def change(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        if (stage, device) != (Stage.SHARE, LIAR):
            return answer
        dealt = wire.decode(answer, SealedShares, 2**20)
        rubbish = tuple((peer, bytes(bindings.SEALED_BYTES)) for peer, _ in dealt.sealed)
        return wire.encode(replace(dealt, sealed=rubbish))

    cohort.run(server=server, change=change)


def test_a_device_that_seals_rubbish_ends_the_round_before_anybody_else_pays_and_each_holder_names_it():
    cohort = Cohort(7)
    server = cohort.server()
    with pytest.raises(CohortError, match="1 devices sent their vectors"):
        seal_rubbish_for_everybody(cohort, server)
    assert not any(cohort.owners[device].models for device in cohort.devices[1:]) and refused(server) == []
    assert set(cohort.errors) == set(cohort.devices[1:])
    assert all(LIAR in str(error) for error in cohort.errors.values())


def test_twin_rubbish_that_is_taken_for_shares_makes_every_honest_holder_pay_and_an_offender(monkeypatch):
    take_anything_for_a_share(monkeypatch)
    cohort = Cohort(7)
    server = cohort.server()
    with pytest.raises(CohortError, match="revealed their shares"):
        seal_rubbish_for_everybody(cohort, server)
    assert all(cohort.owners[device].models == [MODEL] for device in cohort.devices)
    assert refused(server) == [(device, Stage.UNMASK) for device in cohort.devices[1:]]


def deal_another_seed_than_is_used(cohort: Cohort) -> ServerSession:
    """The liar deals one seed, and commits to and masks with another."""

    def change(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        if (stage, device) != (Stage.SHARE, LIAR):
            return answer
        session = cohort.sessions[LIAR]
        session._secrets.seed = bytearray(b"\x07" * 32)
        commitment = bindings.commit_seed(session._digest, LIAR, session._secrets.seed)
        return wire.encode(replace(wire.decode(answer, SealedShares, 2**20), seed_commitment=commitment))

    return cohort.run(change=change)


def test_a_device_that_deals_another_seed_than_it_committed_to_is_named():
    with pytest.raises(CohortError, match=f"{LIAR} dealt shares of another seed than it committed to: revoke it"):
        deal_another_seed_than_is_used(Cohort(7))


def test_twin_with_commitments_that_bind_to_nothing_the_sum_is_wrong_and_nobody_is_named(monkeypatch):
    monkeypatch.setattr(bindings, "commit_seed", lambda *_: bytes(32))
    cohort = Cohort(7)
    server = deal_another_seed_than_is_used(cohort)
    assert refused(server) == [] and not sums(server, cohort, cohort.devices)


def deal_another_mask_key_than_was_sent(cohort: Cohort) -> ServerSession:
    """The liar deals shares of a key that is not the one it advertised, and then drops."""

    def change(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        if (stage, device) == (Stage.ADVERTISE, LIAR):
            cohort.sessions[LIAR]._secrets.mask_key = SecretKey(b"\x07" * 32)
        return answer

    return cohort.run(change=change, drop={Stage.CONTRIBUTE: [LIAR]})


def test_a_device_that_deals_another_key_than_it_advertised_is_named():
    with pytest.raises(CohortError, match=f"{LIAR} dealt shares of another key than it advertised: revoke it"):
        deal_another_mask_key_than_was_sent(Cohort(7))


class Agreeable(bytes):
    """A public key that is equal to every other."""

    def __ne__(self, other: object) -> bool:
        return False


class Unchecked(SecretKey):
    def public(self) -> bytes:
        return Agreeable(super().public())


def test_twin_unless_the_opened_key_is_compared_the_sum_is_wrong_and_nobody_is_named(monkeypatch):
    monkeypatch.setattr(unmasking, "SecretKey", Unchecked)
    cohort = Cohort(7)
    server = deal_another_mask_key_than_was_sent(cohort)
    assert refused(server) == [] and not sums(server, cohort, cohort.devices[1:])


# Keys.


def sign_a_bad_key(cohort: Cohort, mask_key: Callable[[Mapping[DeviceId, Advert]], bytes]) -> ServerSession:
    """The liar sends its keys last, and truly signs one of them that it did not draw."""

    def interfere(stage: Stage, answers: Answers) -> Answers:
        if stage is not Stage.ADVERTISE:
            yield from answers
            return
        sent = {device: wire.decode(answer, Advert, 2**20) for device, answer in answers}
        own = sent.pop(LIAR)
        fields = (own.session, LIAR, mask_key(sent), own.share_key)
        signed = replace(own, mask_key=fields[2], signature=cohort.identities[LIAR].sign("advert", *fields))
        cohort.sessions[LIAR]._adverts = {LIAR: signed}
        for device, advert in (*sent.items(), (LIAR, signed)):
            yield device, wire.encode(advert)

    return run(cohort, interfere)


BAD_KEYS = {
    "distinct_keys": lambda sent: sent[VICTIM].mask_key,
    "key_order": lambda sent: bytes(32),
}


@pytest.mark.parametrize("mask_key", BAD_KEYS.values(), ids=["a copied key", "an all-zero key"])
def test_a_device_with_a_bad_key_is_left_out_and_the_others_finish(mask_key):
    cohort = Cohort(7)
    server = sign_a_bad_key(cohort, mask_key)
    assert refused(server) == [(LIAR, Stage.ADVERTISE)] and sums(server, cohort, cohort.devices[1:])


@pytest.mark.parametrize(("check", "mask_key"), BAD_KEYS.items(), ids=["a copied key", "an all-zero key"])
def test_twin_one_device_with_a_bad_key_ends_the_round_of_all_where_the_server_does_not_look(
    monkeypatch, check, mask_key
):
    """The devices still do: each gives up when it sees the list."""
    real, cohort = getattr(checks, check), Cohort(7)
    monkeypatch.setattr(checks, check, lambda adverts: real(adverts) if is_a_whole_list(adverts) else None)
    with pytest.raises(CohortError, match="0 devices shared their secrets"):
        sign_a_bad_key(cohort, mask_key)
    assert set(cohort.errors) == set(cohort.devices)


def is_a_whole_list(adverts: Sequence[Advert]) -> bool:
    """Devices see all seven adverts at once, sorted; the server sees the liar's, the first, when it comes: the last."""
    return len(adverts) == 7 and adverts[0].sender == LIAR


# Vectors.


def send_vector(changed: Callable[[MaskedVector], bytes]) -> Callable[[Stage, DeviceId, bytes], bytes]:
    """The liar's masked vector, changed."""

    def change(stage: Stage, device: DeviceId, answer: bytes) -> bytes:
        if (stage, device) != (Stage.CONTRIBUTE, LIAR):
            return answer
        vector = wire.decode(answer, MaskedVector, 2**20)
        return wire.encode(replace(vector, packed=changed(vector)))

    return change


WRONG_VECTORS = {
    "a coordinate too short": lambda vector: vector.packed[:-3],
    "a byte too long": lambda vector: vector.packed + b"\0",
    "four bytes a coordinate": lambda vector: vector.packed + 10 * b"\xff",
    "empty": lambda vector: b"",
    "longer than any answer": lambda vector: bytes(200_000),
}


@pytest.mark.parametrize("changed", WRONG_VECTORS.values(), ids=WRONG_VECTORS.keys())
def test_a_device_with_a_wrong_length_or_out_of_range_vector_is_left_out(changed):
    """Every residue of the right width is in range: one that is out of it is a vector of another length."""
    cohort = Cohort(7)
    server = cohort.run(change=send_vector(changed))
    assert refused(server) == [(LIAR, Stage.CONTRIBUTE)]
    assert server.cohort_sum.num_devices == 6 and sums(server, cohort, cohort.devices[1:])


def test_twin_a_vector_that_is_too_short_spoils_the_sum(monkeypatch):
    def add_packed(total: Residues, packed: bytes, modulus_bits: int) -> None:
        add(total, packed.ljust(masks.packed_size(len(total), modulus_bits), b"\0"), modulus_bits)

    add = masks.add_packed
    monkeypatch.setattr(masks, "add_packed", add_packed)
    cohort = Cohort(7)
    server = cohort.run(change=send_vector(WRONG_VECTORS["a coordinate too short"]))
    expected = cohort.sum_of(cohort.devices)
    assert server.refusals == [] and server.cohort_sum.num_devices == 7
    np.testing.assert_array_equal(server.cohort_sum.total[:-1], expected[:-1])
    assert server.cohort_sum.total[-1] != expected[-1]


def answer_twice(cohort: Cohort, is_changed: bool, stages: Sequence[Stage] = tuple(Stage)) -> ServerSession:
    def interfere(stage: Stage, answers: Answers) -> Answers:
        for device, answer in answers:
            yield device, answer
            if device == LIAR and stage in stages:
                middle = len(answer) - 12  # inside the vector, where there is one
                changed = bytes([answer[middle] ^ is_changed])
                yield device, answer[:middle] + changed + answer[middle + 1 :]

    return run(cohort, interfere)


def test_a_device_that_answers_twice_with_different_content_counts_once_with_the_first():
    cohort = Cohort(7)
    server = answer_twice(cohort, is_changed=True)
    assert sums(server, cohort, cohort.devices) and refused(server) == [(LIAR, stage) for stage in list(Stage)[:-1]]
    assert {refusal.reason for refusal in server.refusals} == {"a second, different answer: the first one counts"}


def test_twin_a_device_that_answers_twice_counts_twice_and_spoils_the_sum(monkeypatch):
    def take_once(server: ServerSession, device: DeviceId, answer: bytes, take: Callable[..., None]) -> None:
        server._taken.pop(device, None)  # as if it were the first
        take_first(server, device, answer, take)

    take_first = ServerSession._take_once
    monkeypatch.setattr(ServerSession, "_take_once", take_once)
    cohort = Cohort(7)
    server = answer_twice(cohort, is_changed=True, stages=[Stage.CONTRIBUTE])
    assert server.refusals == [] and server.cohort_sum.num_devices == 7
    assert not sums(server, cohort, cohort.devices)


def test_a_device_that_sends_the_same_answer_again_counts_once_and_is_not_refused():
    cohort = Cohort(7)
    server = answer_twice(cohort, is_changed=False)
    assert sums(server, cohort, cohort.devices) and server.refusals == []


def answer_late(cohort: Cohort) -> ServerSession:
    """The liar's vector comes when the server has begun to ask who was told of which survivors."""
    late: list[tuple[DeviceId, bytes]] = []

    def interfere(stage: Stage, answers: Answers) -> Answers:
        if stage is Stage.AGREE:
            yield from late
        for device, answer in answers:
            if (stage, device) == (Stage.CONTRIBUTE, LIAR):
                late.append((device, answer))
            else:
                yield device, answer

    return run(cohort, interfere)


def test_a_device_that_answers_late_has_dropped():
    cohort = Cohort(7)
    server = answer_late(cohort)
    assert refused(server) == [(LIAR, Stage.AGREE)]
    assert server.cohort_sum.num_devices == 6 and sums(server, cohort, cohort.devices[1:])


def test_twin_a_late_vector_that_is_still_added_spoils_the_sum(monkeypatch):
    """Its own mask can't be taken off: the shares that the others reveal of it are those of its other secret."""

    def take(server: ServerSession, device: DeviceId, answer: bytes) -> None:
        try:
            take_agreement(server, device, answer)
        except UpdateError:
            server._take_vector(device, answer)

    take_agreement = ServerSession._take_agreement
    monkeypatch.setattr(ServerSession, "_take_agreement", take)
    cohort = Cohort(7)
    server = answer_late(cohort)
    assert refused(server) == [] and not sums(server, cohort, cohort.devices)
    assert not sums(server, cohort, cohort.devices[1:])


def answer_for_another(cohort: Cohort) -> ServerSession:
    """Before the victim's vector is there, the liar sends one in its name."""

    def interfere(stage: Stage, answers: Answers) -> Answers:
        for device, answer in answers:
            yield device, answer
            if (stage, device) == (Stage.CONTRIBUTE, LIAR):
                vector = wire.decode(answer, MaskedVector, 2**20)
                yield LIAR, wire.encode(replace(vector, sender=VICTIM))

    return run(cohort, interfere)


def test_a_device_that_answers_for_another_is_refused_whatever_it_says():
    cohort = Cohort(7)
    server = answer_for_another(cohort)
    assert refused(server) == [(LIAR, Stage.CONTRIBUTE)] and sums(server, cohort, cohort.devices)


def test_twin_where_an_answer_says_who_sent_it_the_victim_s_own_vector_comes_too_late(monkeypatch):
    """Who answers is what the transport says, and never what the answer says: two places compare the two."""

    def take_once(server: ServerSession, device: DeviceId, answer: bytes, take: Callable[..., None]) -> None:
        device = wire.decode(answer, MaskedVector, 2**20).sender if server.stage is Stage.CONTRIBUTE else device
        by_transport(server, device, answer, take)

    by_transport = ServerSession._take_once
    monkeypatch.setattr(ServerSession, "_take_once", take_once)
    cohort = Cohort(7)
    server = answer_for_another(cohort)
    assert [refusal.reason for refusal in server.refusals] == ["a second, different answer: the first one counts"]
    assert server.cohort_sum.num_devices == 7 and not sums(server, cohort, cohort.devices)


# Floods.


def test_a_flood_of_bad_answers_does_not_fill_the_server_s_memory():
    cohort = Cohort(7)
    server = cohort.server()

    def flood(stage: Stage, answers: Answers) -> Answers:
        for device, answer in answers:
            if (stage, device) == (Stage.ADVERTISE, LIAR):
                advert = wire.decode(answer, Advert, 2**20)
                for number in range(5_000):
                    yield device, wire.encode(replace(advert, sender=f"device {number}"))
            yield device, answer

    tracemalloc.start()
    try:
        run(cohort, flood, server=server)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sums(server, cohort, cohort.devices)
    assert (LIAR, Stage.ADVERTISE) in refused(server)
    assert grown < 2**18
