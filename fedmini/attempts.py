"""One attempt at a cohort's sum, as a round and an evaluation have it: fixed, paid for, then collected."""

import math
from collections.abc import Callable

from fedmini.errors import CohortError, PrivacyBudgetError, ProtocolError
from fedmini.privacy import accounting, encoding, noise
from fedmini.privacy.ledger import Ledger
from fedmini.privacy.noise import Streams
from fedmini.types import CohortSum, DeviceId, IntVector, Manifest, Roster, SumCohort, TrainTask


class LostCohortError(CohortError):
    """Too few devices of a roster were left *after* the debit."""

    def __init__(self, message: str, roster: Roster) -> None:
        super().__init__(message)
        self.roster = roster


def sum_attempt(
    manifest: Manifest,
    chosen: tuple[DeviceId, ...],
    task: TrainTask,
    sum_cohort: SumCohort,
    pay: Callable[[Roster], None],
) -> tuple[Roster, CohortSum]:
    """Whom the attempt was about, and their sum; `pay` is called once, when that is fixed and before anything is asked.

    Raises CohortError where too few devices are there: LostCohortError where it was paid for before. ProtocolError where
    the sum is about others than were asked.
    """
    round_num, least = task.round_num, manifest.release.min_survivors
    rosters: list[Roster] = []

    def debit(roster: Roster) -> None:
        if rosters:
            raise ProtocolError(f"round {round_num}: the roster was fixed twice")
        _check_roster(roster, task, manifest, chosen)
        if len(roster.devices) < least:
            raise CohortError(f"{len(roster.devices)} devices came, {least} are needed; nothing was spent")
        pay(roster)
        rosters.append(roster)

    try:
        cohort = sum_cohort(chosen, task, debit)
    except CohortError as error:
        if rosters:
            raise LostCohortError(str(error), rosters[0]) from error
        raise CohortError(f"round {round_num}: {error}") from error
    if not rosters:
        raise CohortError(f"round {round_num}: a sum came, but no roster was ever fixed")
    if cohort.num_devices > len(rosters[0].devices):
        raise ProtocolError(
            f"round {round_num}: a sum of {cohort.num_devices} devices came, {len(rosters[0].devices)} on the roster"
        )
    if cohort.num_devices < least:
        raise LostCohortError(
            f"{cohort.num_devices} devices were left, {least} are needed; what was debited stays spent", rosters[0]
        )
    return rosters[0], cohort


def _check_roster(roster: Roster, task: TrainTask, manifest: Manifest, chosen: tuple[DeviceId, ...]) -> None:
    """Raise ProtocolError unless a roster is about this attempt and holds devices that were asked, each once."""
    expected = (manifest.run_id, task.round_num, task.attempt)
    is_this_attempt = (roster.run_id, roster.round_num, roster.attempt) == expected
    is_of_chosen = len(set(roster.devices)) == len(roster.devices) and set(roster.devices) <= set(chosen)
    if not (is_this_attempt and is_of_chosen):
        raise ProtocolError(
            f"round {task.round_num}, attempt {task.attempt}: expected a roster of this attempt that holds chosen devices, "
            "each once; got another; nothing was spent"
        )


def debit(roster: Roster, manifest: Manifest, ledger: Ledger, participation: int, *, is_seeded: bool) -> None:
    """Write what an attempt costs, before any contribution is asked for; PrivacyBudgetError where it would pass the budget.

    `participation`: as `Ledger.debit` has it. A replay of the same bits costs nothing, or is an error.
    """
    units = manifest.release.units
    if not units:
        return
    events = [accounting.event_of(unit, manifest) for unit in units]
    if ledger.is_debited(roster.round_num, roster.attempt):
        ledger.debit(roster, events, participation, is_seeded)
        return
    budgets = dict(manifest.target_epsilon)
    for unit, event in zip(units, events, strict=True):
        budget = budgets.get(unit.unit, math.inf)
        after = ledger.epsilon_after(event, participation, unit.target_delta)
        if after > budget * (1 + 1e-9):
            raise PrivacyBudgetError(
                f"round {roster.round_num} would bring the {unit.unit} epsilon to {after:.4g}, the budget is {budget:g}: "
                "the run ends here, with everything up to the round before saved"
            )
    ledger.debit(roster, events, participation, is_seeded)


def noised_by_server(cohort: CohortSum, manifest: Manifest, streams: Streams, task: TrainTask) -> IntVector:
    """The sum as integers, with the server's noise added over the integers where the plan says so. (num_coordinates,)"""
    release = manifest.release
    integers = encoding.unwrap(cohort.total, release.modulus_bits)
    if release.device is not None and release.device.noise == "server":
        stream = streams("server noise", "round", task.round_num, "attempt", task.attempt)
        integers = integers + noise.discrete_gaussian(release.device.noise_variance, len(integers), stream)
    return integers
