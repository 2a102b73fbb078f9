"""The seam by secure aggregation: when it debits, what it gives, and what the rounds make of a lost cohort."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from fedmini import vectors
from fedmini.errors import CohortError, PrivacyBudgetError, UpdateError
from fedmini.secagg.messages import Stage
from fedmini.secagg.server_session import Refusal
from fedmini.secure_sum import SecureSum
from fedmini.types import DeviceId, Roster, TrainTask
from tests.secagg.cohort import MODEL, Cohort, a_manifest


class Line:
    """A transport to a cohort in this process, which writes down the order of what happens."""

    def __init__(self, cohort: Cohort, silent: dict[Stage, tuple[DeviceId, ...]] | None = None) -> None:
        self.cohort, self.silent = cohort, silent or {}
        self.events: list[str] = []
        self.rosters: list[Roster] = []
        self.refusals: list[Refusal] = []

    def exchange(self, stage: Stage, requests: Iterator[tuple[DeviceId, bytes]]) -> Iterable[tuple[DeviceId, bytes]]:
        self.events.append(stage.name)
        return self.cohort.answers(stage, requests, drop=self.silent)

    def debit(self, roster: Roster) -> None:
        self.events.append("debit")
        self.rosters.append(roster)

    def task(self) -> TrainTask:
        adapter = vectors.from_bytes(MODEL, self.cohort.manifest.template)
        return TrainTask(self.cohort.manifest.hash, 1, 0, adapter)

    def sum(self):
        by_protocol = SecureSum(
            self.cohort.manifest, self.cohort.trust, self.exchange, lambda refusals: self.refusals.extend(refusals)
        )
        return by_protocol(tuple(reversed(self.cohort.devices)), self.task(), self.debit)


def test_the_sum_is_that_of_the_devices_and_the_model_reaches_them_unchanged():
    line = Line(Cohort(5))
    found = line.sum()
    assert found.num_devices == 5
    np.testing.assert_array_equal(found.total, line.cohort.sum_of(line.cohort.devices))
    assert {bytes(owner.models[0]) for owner in line.cohort.owners.values()} == {MODEL}


def test_the_ledger_is_debited_once_when_shares_are_there_and_before_any_vector_is_asked_for():
    line = Line(Cohort(7), silent={Stage.SHARE: ("d001",), Stage.CONTRIBUTE: ("d004",)})
    line.sum()
    assert line.events == ["ADVERTISE", "SHARE", "debit", "CONTRIBUTE", "AGREE", "UNMASK"]
    assert line.rosters == [Roster("run", 1, 0, ("d000", "d002", "d003", "d004", "d005", "d006"))], (
        "those who dealt shares"
    )


@pytest.mark.parametrize("stage", [Stage.ADVERTISE, Stage.SHARE])
def test_too_few_devices_before_the_debit_spend_nothing(stage: Stage):
    line = Line(Cohort(6, a_manifest(min_survivors=5)), silent={stage: ("d000", "d001")})
    with pytest.raises(CohortError, match=r"4 devices .* 5 are needed; nothing was spent"):
        line.sum()
    assert "debit" not in line.events


@pytest.mark.parametrize("stage", [Stage.CONTRIBUTE, Stage.AGREE, Stage.UNMASK])
def test_too_few_devices_after_the_debit_say_that_it_stays(stage: Stage):
    line = Line(Cohort(6), silent={stage: ("d000", "d001")})
    with pytest.raises(CohortError, match=r"4 devices .* 5 are needed; what was debited stays spent"):
        line.sum()
    assert line.events.count("debit") == 1


def test_a_debit_that_is_refused_asks_nobody_for_a_vector():
    line = Line(Cohort(5))

    def refuse(roster: Roster) -> None:
        raise PrivacyBudgetError("over")

    line.debit = refuse  # type: ignore[method-assign]
    with pytest.raises(PrivacyBudgetError):
        line.sum()
    assert line.events == ["ADVERTISE", "SHARE"]
    assert all(owner.models == [] for owner in line.cohort.owners.values())


def test_answers_that_were_not_used_are_told_with_their_reason():
    line = Line(Cohort(5))
    honest = line.cohort.answers

    def answers(stage, requests, tamper=None, drop=None):
        for device, answer in honest(stage, requests, tamper, drop):
            yield device, b"\x00" if (stage, device) == (Stage.CONTRIBUTE, "d002") else answer

    line.cohort.answers = answers  # type: ignore[method-assign]
    assert line.sum().num_devices == 4
    assert [(refusal.device, refusal.stage) for refusal in line.refusals] == [("d002", Stage.CONTRIBUTE)]


def test_an_adapter_of_another_shape_never_reaches_a_device():
    line = Line(Cohort(5))
    task = TrainTask(line.cohort.manifest.hash, 1, 0, {"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(UpdateError, match="expected shape"):
        SecureSum(line.cohort.manifest, line.cohort.trust, line.exchange)(line.cohort.devices, task, line.debit)
    assert line.events == []
