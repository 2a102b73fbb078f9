"""The whole federated algorithm: one pure function over immutable values, devices reached through one argument.

Nothing here knows a network, a disk or an accelerator, and nothing here has a name for one device's update.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmini import attempts, cohorts, metrics, sums
from fedmini.errors import AttemptsError, StateError
from fedmini.privacy.ledger import Ledger
from fedmini.privacy.noise import Streams
from fedmini.server_step import ServerPlan, num_asked, server_step
from fedmini.types import (
    Aggregate,
    DeviceId,
    Manifest,
    Roster,
    RoundReport,
    ServerState,
    SumCohort,
    TrainTask,
)

OnRound = Callable[[ServerState, RoundReport], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as the server knows it.

    `is_seeded`: its randomness comes from a seed, and so protects nobody. `is_replayed`: all of it does, the devices'
    too, so that an attempt can be repeated bit for bit.
    """

    manifest: Manifest
    server: ServerPlan
    population: Callable[[], Sequence[DeviceId]]  # whom a round may ask, now
    streams: Streams
    is_seeded: bool
    is_replayed: bool


class Aggregates(Protocol):
    """Where a sum is kept from when it is there until its round is committed, so that a crash can't lose it."""

    def load(self, run_id: str, round_num: int) -> Aggregate | None:
        """The sum of this round, where one was kept."""

    def save(self, aggregate: Aggregate) -> None:
        """Keep a sum: it is on the disk when this returns."""


class KeepsNone:
    """Keeps no sum: a seeded run forms it again, any other pays for a new attempt."""

    def load(self, run_id: str, round_num: int) -> None:
        """Nothing."""

    def save(self, aggregate: Aggregate) -> None:
        """Nothing is kept."""


def train(state: ServerState, run: Run, sum_cohort: SumCohort, ledger: Ledger, on_round: OnRound) -> ServerState:
    """Run the rounds that are left, calling `on_round` with each new state before the next round begins.

    Raises PrivacyBudgetError before the round that would pass the budget, CohortError where too few devices are left.
    """
    while state.round_num < run.manifest.num_rounds:
        state, report = run_round(state, run, sum_cohort, ledger)
        on_round(state, report)
    return state


def run_round(
    state: ServerState, run: Run, sum_cohort: SumCohort, ledger: Ledger, aggregates: Aggregates | None = None
) -> tuple[ServerState, RoundReport]:
    """One round, in as many attempts as it takes: a debited attempt that lost too many devices stays paid for.

    A sum that `aggregates` kept is taken as it is: nothing is asked for, and nothing debited, again.
    """
    aggregates = aggregates or KeepsNone()
    round_num = state.round_num + 1
    kept = aggregates.load(run.manifest.run_id, round_num)
    if kept is not None:
        _check_kept(kept, run, ledger)
        return _committed(state, run, kept, ledger, started=time.monotonic())
    debited = ledger.last_attempt(round_num)
    attempt = 0 if run.is_replayed or debited is None else debited + 1
    while True:
        try:
            started = time.monotonic()
            aggregate = _attempt(state, run, sum_cohort, ledger, attempt)
            aggregates.save(aggregate)
            return _committed(state, run, aggregate, ledger, started)
        except attempts.LostCohortError as error:
            state = replace(state, participations=cohorts.participations(state, error.roster, counted=False))
            if _num_lost(state, run, ledger, attempt) > run.server.spare_attempts:
                raise AttemptsError(
                    f"round {round_num}: {error}, and no spare attempt is left; "
                    "raise rounds.over_selection or rounds.spare_attempts"
                ) from error
            attempt += 1


def _num_lost(state: ServerState, run: Run, ledger: Ledger, attempt: int) -> int:
    """Attempts that were debited and never committed, up to this one: over the whole run, as the calibration counts.

    Not those that come after it in the ledger, so that a replay decides as the first time did.
    """
    if not run.manifest.release.units:
        return attempt + 1  # nothing is ever debited
    return ledger.num_debits_until(state.round_num + 1, attempt) - state.round_num


def _check_kept(kept: Aggregate, run: Run, ledger: Ledger) -> None:
    """Raise StateError unless a sum that was kept was paid for, and fits the run."""
    roster, release = kept.roster, run.manifest.release
    is_paid = not release.units or ledger.is_debited(roster.round_num, roster.attempt)
    enough = release.min_survivors <= kept.num_devices <= len(roster.devices)
    if not (is_paid and enough and kept.integers.shape == (run.manifest.num_coordinates,)):
        raise StateError(
            f"the sum that was kept for round {roster.round_num}, attempt {roster.attempt}, is not in the ledger, or not of "
            "this run: bring ledger and sum back from one backup"
        )


def _attempt(state: ServerState, run: Run, sum_cohort: SumCohort, ledger: Ledger, attempt: int) -> Aggregate:
    """The sum of one attempt, with all its noise. Raises CohortError: attempts.LostCohortError where it was debited before."""
    manifest, release = run.manifest, run.manifest.release
    round_num = state.round_num + 1
    chosen = cohorts.choose(
        state,
        run.population(),
        release,
        num_asked(release.cohort_size, run.server.over_selection),
        run.streams("cohort", "round", round_num, "attempt", attempt),
    )
    task = TrainTask(manifest.hash, round_num, attempt, state.adapter)
    abandoned = max(0, ledger.num_debits - state.round_num)  # debited, never committed: everybody may have been in them

    def pay(roster: Roster) -> None:
        counts = (state.participations[device].count for device in roster.devices if device in state.participations)
        participation = max(counts, default=0) + abandoned + 1
        attempts.debit(roster, manifest, ledger, participation, is_seeded=run.is_seeded)

    roster, cohort = attempts.sum_attempt(manifest, chosen, task, sum_cohort, pay)
    return Aggregate(roster, cohort.num_devices, attempts.noised_by_server(cohort, manifest, run.streams, task))


def _committed(
    state: ServerState, run: Run, aggregate: Aggregate, ledger: Ledger, started: float
) -> tuple[ServerState, RoundReport]:
    """The state after a round whose sum is there: the same for the same sum, whenever it is taken."""
    manifest, roster = run.manifest, aggregate.roster
    total = aggregate.integers / manifest.release.scale
    mean = total[: manifest.num_trained] / sums.mean_denominator(manifest)
    new_state = replace(
        server_step(state, mean, manifest, run.server),
        round_num=roster.round_num,
        participations=cohorts.participations(state, roster, counted=True),
        ledger=ledger.position,
    )
    report = _report(run, total, mean, aggregate.num_devices, ledger)
    return new_state, replace(
        report,
        round_num=roster.round_num,
        num_sampled=len(roster.devices),
        seconds=time.monotonic() - started,
    )


def _report(
    run: Run, total: NDArray[np.float64], mean: NDArray[np.float64], num_devices: int, ledger: Ledger
) -> RoundReport:
    manifest, release = run.manifest, run.manifest.release
    noise_std = sums.noise_std_of_sum(manifest, num_devices)
    expected_noise = noise_std / sums.mean_denominator(manifest) * math.sqrt(len(mean))
    found = None
    if release.num_metrics:
        tail = total[-release.num_metrics :]
        found = metrics.decode(tail, release.encoding_norm, manifest.local.max_length, noise_std)
    signal = math.sqrt(max(float(mean @ mean) - expected_noise**2, 0.0))
    return RoundReport(
        round_num=0,
        num_sampled=0,
        num_survivors=num_devices,
        upload_bytes_per_device=sums.upload_bytes(manifest),
        download_bytes_per_device=sums.download_bytes(manifest),
        seconds=0.0,
        noise_to_signal=expected_noise / signal if signal > 0 and math.isfinite(expected_noise) else None,
        epsilon={unit.unit: ledger.epsilon(unit.unit, unit.target_delta) for unit in release.units},
        train_loss=found.loss if found else None,
        train_loss_error=found.loss_error if found else None,
        clipped_fraction=found.clipped_fraction if found else None,
        clipped_fraction_error=found.clipped_fraction_error if found else None,
    )
