"""Consent: nothing trains until its owner has agreed to the very manifest; and whom a device believes."""

from pathlib import Path

import pytest

from fedmini.errors import ConfigError, ProtocolError, StateError
from fedmini.flower.codec import Envelope
from fedmini.offer import Offer, write
from fedmini.secagg import trust
from tests import tiny_trust
from tests.device import world
from tests.device.world import Round, a_run, offered, operator, signed, wait_for_status


def test_nothing_trains_until_its_owner_agrees(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices()
    owned.device.start()
    answer = server.offer(offered(manifest))
    assert (answer.kind, answer.fields["code"]) == ("refusal", "consent")
    status = owned.device.status()
    assert status.why_not_training == "run run-1 waits for consent" and status.problem is None
    (found,) = status.offers
    assert (found.run_id, found.manifest_hash) == ("run-1", manifest.hash)
    assert any("may cost" in line for line in found.terms)
    work = Round(manifest, server.ask)
    assert work.run(1).num_devices == 3, "and whoever asks before is refused"
    assert "never agreed to it" in work.reason(next(iter(work.answers)))[1]
    since = len(owned.heard.events)
    owned.device.consent(manifest.hash)
    assert owned.device.status().offers == () and [run.run_id for run in owned.device.status().runs] == ["run-1"]
    owned.heard.wait_for("device.connected", since)  # it asks its server again at once
    assert server.offer(offered(manifest)).kind == "ready"
    assert Round(manifest, server.ask).run(1).num_devices == 4


def test_an_offer_and_a_consent_are_remembered_and_a_changed_manifest_asks_again(base, server, devices) -> None:
    manifest, changed = a_run(base), a_run(base, "run-1", num_steps=2)
    owned = devices()
    owned.device.start()
    server.offer(offered(manifest))
    owned.device.close()
    owned = devices(examples=[])
    assert [found.manifest_hash for found in owned.device.status().offers] == [manifest.hash]
    owned.device.consent(manifest.hash)
    owned.device.consent(manifest.hash)  # the same again is fine
    owned.device.close()
    owned = devices(examples=[])
    owned.device.start()
    assert server.offer(offered(manifest)).kind == "ready"
    assert owned.device.status().offers == ()
    answer = server.offer(offered(changed))
    assert answer.kind == "refusal" and "another one for" not in str(answer.fields["reason"])
    assert "a run has one manifest" in owned.device.status().why_not_training
    other = a_run(base, "run-2", num_steps=2)
    assert server.offer(offered(other)).fields["code"] == "consent"


def test_consent_to_what_was_never_offered_is_an_error(devices) -> None:
    owned = devices()
    with pytest.raises(ConfigError, match="no run with the manifest 000000000000 was offered; offered: none"):
        owned.device.consent("0" * 64)
    stranger = devices(name="ben", is_enrolled=False)
    with pytest.raises(ConfigError, match="not enrolled"):
        stranger.device.consent("0" * 64)


def test_a_run_that_is_left_is_left_for_good(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    server.offer(offered(manifest))
    Round(manifest, server.ask).run(1)
    owned.device.withdraw(manifest.hash)
    status = owned.device.status()
    assert status.runs == () and status.rounds_joined == 1 and status.epsilon_spent["device"] > 0
    assert status.last_adapter is None, "it speaks by the base alone"
    answer = server.offer(offered(manifest))
    assert answer.kind == "refusal"
    assert "has left run 'run-1', for good" in owned.device.status().why_not_training
    with pytest.raises(ProtocolError, match="has left that run"):
        owned.device.withdraw(manifest.hash)
    with pytest.raises(ConfigError, match="was offered"):
        owned.device.consent(manifest.hash)


def test_leaving_a_run_ends_its_training(base: Path, server, devices) -> None:
    from tests.device.test_device_rounds import begin_long

    owned, work, thread, results = begin_long(base, server, devices)
    owned.device.withdraw(work.manifest.hash)
    thread.join(60)
    assert results[0].num_devices == 3 and owned.device.receipts() == ()
    assert owned.device.status().rounds_joined == 1


def test_a_run_beyond_its_limits_is_refused_and_the_reason_shown(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest, floors={"max_epsilon": 0.5})
    owned.device.start()
    answer = server.offer(offered(manifest))
    assert answer.kind == "refusal"
    status = owned.device.status()
    assert "does not take part in run run-1" in status.why_not_training and "epsilon" in status.why_not_training
    assert status.offers == () and status.runs == ()


def test_an_offer_that_its_operator_did_not_sign_is_refused_and_the_reason_shown(base, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    answer = server.offer(offered(manifest, by=tiny_trust.an_operator()))
    assert answer.kind == "refusal"
    assert "signed with the operator key" in owned.device.status().why_not_training
    good = signed(manifest)
    forged = Offer(type(good)(a_run(base, "run-9"), 0, good.operator_key, good.signature), (), None, None)
    assert server.offer(Envelope("offer", {}, write(forged))).kind == "refusal"
    assert "it was changed after it was signed" in owned.device.status().why_not_training
    assert owned.device.status().runs == () and owned.device.status().offers == ()


def test_an_older_list_of_revocations_is_refused(base: Path, server, devices) -> None:
    manifest = a_run(base)
    first = trust.revoke(operator(), None, [tiny_trust.enrol(operator(), "x").certificate.device_key])
    second = trust.revoke(operator(), first, [tiny_trust.enrol(operator(), "y").certificate.device_key])
    owned = devices(manifest)
    owned.device.start()
    assert server.offer(offered(manifest, second)).kind == "ready"
    assert server.offer(offered(manifest, first)).kind == "refusal"
    assert "plays back an old one" in owned.device.status().why_not_training
    assert server.offer(offered(manifest, second)).kind == "ready"


def test_a_revoked_device_says_so_and_stays_quiet(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest)
    owned.device.start()
    server.offer(offered(manifest))
    own = trust.revoke(operator(), None, [owned.device_key])
    assert server.offer(offered(manifest, own)).kind == "refusal"
    status = wait_for_status(
        owned.device, lambda found: "revoked it, for good" in str(found.why_not_training), "its end"
    )
    assert not status.is_connected
    owned.device.close()
    calls = len(server.calls)
    owned = devices(manifest, examples=[])
    owned.device.start()
    wait_for_status(owned.device, lambda found: "revoked it, for good" in str(found.why_not_training), "the same")
    assert len(server.calls) == calls, "it does not even call"


def test_a_device_is_enrolled_while_it_runs(base: Path, server, devices) -> None:
    manifest = a_run(base)
    owned = devices(manifest, is_enrolled=False)
    owned.device.start()
    wait_for_status(owned.device, lambda found: "not enrolled: give its device.pub" in str(found.why_not_training), "")
    with pytest.raises(ConfigError):
        owned.device.enrol(b"{}", b"no key")
    assert owned.device.status().is_running, "a mistake stops nothing"
    world.enrol(owned.device, owned.folder)
    assert server.offer(offered(manifest)).kind == "ready"
    with pytest.raises((ConfigError, ProtocolError, StateError)):
        owned.device.enrol(b"{}", b"no key")
    assert owned.device.status().name == "anna", "and loses nothing"
    assert server.offer(offered(manifest)).kind == "ready"
