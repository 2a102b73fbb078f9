"""A device's side of secure rounds: what it writes down before it answers, and what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest

from fedmini import config, planning, vectors
from fedmini.errors import CohortError, PrivacyBudgetError, ProtocolError
from fedmini.member import ForThisProcess, Member, OwnLedger
from fedmini.privacy.device_ledger import DeviceLedger, LifetimeLimits
from fedmini.secagg import masks
from fedmini.secagg.checks import Agreed
from fedmini.secagg.messages import Stage
from fedmini.secure_sum import SecureSum
from fedmini.types import CohortSum, Contribution, DeviceId, Manifest, Residues, TrainTask
from tests import tiny_trust

DEVICES = ("anna", "ben", "carl")
TEMPLATE = (("w", (3, 2)),)


def a_manifest(max_participations: int = 3, min_separation: int = 1) -> Manifest:
    """Six coordinates and four metrics, three devices a round, shared noise for each device's whole update."""
    parsed = config.parse_run_config(
        {
            "run": {"name": "test"},
            "base": {"name": "smollm2-135m-q4"},
            "data": {"source": "x.jsonl", "held_out_devices": 1},
            "local": {"sampling_rate": 0.5, "expected_batch_size": 4.0},
            "rounds": {
                "num_rounds": 9,
                "cohort_size": 3,
                "max_participations": max_participations,
                "min_separation": min_separation,
            },
            "privacy": {
                "device": {"noise": "shared", "clip_norm": 1.0, "noise_multiplier": 2.0, "target_delta": 1e-5},
            },
        }
    )
    return planning.make_manifest(parsed, "test-run", planning.Base("f" * 64, TEMPLATE), None)


class Phones:
    """Three members of one run, each with a ledger of its own in `folder`."""

    def __init__(self, folder: Path, manifest: Manifest, lifetime_epsilon: float = 100.0) -> None:
        self.manifest, self.folder = manifest, folder
        operator = tiny_trust.an_operator()
        self.trust = tiny_trust.trust_in(operator)
        self.tasks: list[tuple[DeviceId, TrainTask]] = []
        self.failures: dict[DeviceId, Exception] = {}
        words = np.frombuffer(os.urandom(4 * manifest.num_coordinates), np.uint32)
        self.vector: Residues = words & np.uint32(2**manifest.release.modulus_bits - 1)
        limits = LifetimeLimits(lifetime_epsilon, 1e-5)
        self.members = {
            device: Member(
                tiny_trust.enrol(operator, device),
                ForThisProcess(Agreed(device, manifest, self.trust)),
                lambda task, device=device: self._train(device, task),
                OwnLedger(folder / f"{device}.jsonl", limits),
            )
            for device in DEVICES
        }

    def _train(self, device: DeviceId, task: TrainTask) -> Contribution:
        assert self.releases(device)[-1][1:] == (task.round_num, task.attempt), "the debit is on the disk by now"
        self.tasks.append((device, task))
        return Contribution(self.vector)

    def releases(self, device: DeviceId) -> list[tuple[str, int, int]]:
        with DeviceLedger.open(self.folder / f"{device}.jsonl") as ledger:
            return [(found.run_id, found.round_num, found.attempt) for found in ledger.releases()]

    def round(self, round_num: int, attempt: int = 0, lost: tuple[Stage, DeviceId] | None = None) -> CohortSum:
        """One round with the whole cohort, in which one device may fall silent at one stage."""

        def exchange(stage, requests):
            for device, request in requests:
                if (stage, device) == lost:
                    continue
                try:
                    answer = self.members[device].answer(request)
                except (ProtocolError, PrivacyBudgetError) as error:
                    self.failures[device] = error
                    continue
                yield device, answer

        adapter = vectors.unflatten(np.arange(6, dtype=np.float32), TEMPLATE)
        task = TrainTask(self.manifest.hash, round_num, attempt, adapter)
        return SecureSum(self.manifest, self.trust, exchange)(DEVICES, task, lambda roster: None)


def test_members_take_part_and_their_ledgers_say_so(tmp_path: Path) -> None:
    phones = Phones(tmp_path, a_manifest())
    found = phones.round(1)
    expected = masks.reduce(phones.vector * np.uint32(3), phones.manifest.release.modulus_bits)
    np.testing.assert_array_equal(found.total, expected)
    assert [device for device, _ in phones.tasks] == list(DEVICES)
    _, task = phones.tasks[0]
    assert task.manifest_hash == phones.manifest.hash and task.adapter["w"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert {device: phones.releases(device) for device in DEVICES} == {
        device: [("test-run", 1, 0)] for device in DEVICES
    }


@pytest.mark.parametrize(("round_num", "attempt"), [(2, 1), (2, 0), (1, 7)])
def test_a_server_that_goes_back_is_refused_before_any_key_is_sent(
    tmp_path: Path, round_num: int, attempt: int
) -> None:
    """A second session with the same number, and a server restored from a backup."""
    phones = Phones(tmp_path, a_manifest())
    phones.round(2, attempt=1)
    with pytest.raises(CohortError, match="0 devices sent their keys, 3 are needed; nothing was spent"):
        phones.round(round_num, attempt)
    assert all("later than round 2, attempt 1" in str(error) for error in phones.failures.values())
    assert len(phones.tasks) == 3


class ForgetfulLedger(OwnLedger):
    """The defence removed: it admits every attempt, and writes down nothing."""

    def admit(self, manifest, context) -> None: ...

    def debit(self, manifest, context) -> None: ...


def test_twin_a_device_that_forgets_contributes_twice_under_one_number(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        Phones, "_train", lambda self, device, task: self.tasks.append(task) or Contribution(self.vector)
    )
    phones = Phones(tmp_path, a_manifest())
    for member in phones.members.values():
        member._ledger = ForgetfulLedger(tmp_path / "none", LifetimeLimits(1.0, 1e-5))
    assert phones.round(1).num_devices == phones.round(1).num_devices == 3
    assert len(phones.tasks) == 6, "two releases where everybody's ledger knows of one"


def test_a_device_stops_by_itself_where_its_manifest_says_so(tmp_path: Path) -> None:
    phones = Phones(tmp_path, a_manifest(max_participations=2))
    phones.round(1)
    phones.round(2)
    with pytest.raises(CohortError, match="0 devices sent their keys, 3 are needed; nothing was spent"):
        phones.round(3)
    assert all("at most 2 contributions" in str(error) for error in phones.failures.values())
    assert len(phones.tasks) == 6


def test_a_round_that_comes_too_soon_is_refused_before_any_key_is_sent(tmp_path: Path) -> None:
    phones = Phones(tmp_path, a_manifest(min_separation=3))
    phones.round(1)
    with pytest.raises(CohortError, match="0 devices sent their keys, 3 are needed; nothing was spent"):
        phones.round(3)
    assert all("3 rounds or more since round 1, got round 3" in str(error) for error in phones.failures.values())
    assert phones.round(4).num_devices == 3


class OnlyAtTheDebit(OwnLedger):
    """The first of the two checks removed."""

    def admit(self, manifest, context) -> None: ...


def test_twin_without_the_check_at_the_invitation_the_debit_still_refuses(tmp_path: Path) -> None:
    phones = Phones(tmp_path, a_manifest(min_separation=3))
    for device, member in phones.members.items():
        member._ledger = OnlyAtTheDebit(tmp_path / f"{device}.jsonl", LifetimeLimits(100.0, 1e-5))
    phones.round(1)
    with pytest.raises(CohortError, match="0 devices sent their vectors, 3 are needed; what was debited stays spent"):
        phones.round(3)
    assert len(phones.tasks) == 3


def test_a_device_stops_before_its_lifetime_epsilon_is_passed(tmp_path: Path) -> None:
    """At multiplier 2 and delta 1e-5 a participation costs epsilon 2.0, and two of them cost 2.9."""
    phones = Phones(tmp_path, a_manifest(), lifetime_epsilon=2.5)
    phones.round(1)
    with pytest.raises(CohortError, match="0 devices sent their keys, 3 are needed; nothing was spent"):
        phones.round(2)
    assert all(isinstance(error, PrivacyBudgetError) for error in phones.failures.values())
    assert len(phones.tasks) == 3


def test_an_invitation_ends_the_round_that_went_on(tmp_path: Path) -> None:
    """The server lost the first attempt after its devices were debited, and asks for another."""
    phones = Phones(tmp_path, a_manifest())
    with pytest.raises(CohortError):
        phones.round(1, attempt=0, lost=(Stage.AGREE, "ben"))
    assert phones.round(1, attempt=1).num_devices == 3
    assert phones.failures == {}
    assert phones.releases("anna") == [("test-run", 1, 0), ("test-run", 1, 1)]


def test_what_is_no_invitation_begins_nothing(tmp_path: Path) -> None:
    phones = Phones(tmp_path, a_manifest())
    for request in (b"", b"\x00", b"\x95\x01\x03", os.urandom(100)):
        with pytest.raises(ProtocolError):
            phones.members["anna"].answer(request)
    phones.round(1)


def test_the_repr_of_a_member_shows_its_name_and_stage_only(tmp_path: Path) -> None:
    phones = Phones(tmp_path, a_manifest())
    phones.round(1)
    assert repr(phones.members["anna"]) == "Member('anna', DeviceSession('anna', DONE))"
    phones.members["anna"].close()
    assert repr(phones.members["anna"]) == "Member('anna', None)"


def test_a_request_that_comes_while_another_is_answered_is_refused(tmp_path: Path) -> None:
    phones = Phones(tmp_path, a_manifest())
    found: list[str] = []

    def train(device: DeviceId, task: TrainTask) -> Contribution:
        with pytest.raises(ProtocolError, match="one at a time") as refused:
            phones.members[device].answer(b"another")
        found.append(str(refused.value))
        return Contribution(phones.vector)

    phones._train = train  # type: ignore[method-assign]
    assert phones.round(1).num_devices == len(found) == 3
