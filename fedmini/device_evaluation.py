"""The loss on what devices hold back from training: a secure sum of its own, paid for in a ledger of its own.

It teaches the model nothing and holds up no round: where too few devices are there, it is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmini import attempts, metrics, schedule, sums
from fedmini.errors import CohortError
from fedmini.privacy.ledger import Ledger, epsilon_over
from fedmini.privacy.noise import RandomStream, Streams
from fedmini.types import Adapter, DeviceId, EvaluationManifest, Manifest, Roster, SumCohort, TrainTask, Unit


@dataclass(frozen=True, slots=True)
class DeviceLoss:
    """What one evaluation says; the numbers are None where its noise drowns it."""

    loss: float | None  # nats a token, the mean over examples (or devices), each capped
    error: float | None  # one standard deviation of the noise in it
    num_devices: int


@dataclass(frozen=True, slots=True)
class DeviceEvaluations:
    """A run's evaluations on its devices, as the server knows them. `is_seeded`, `is_replayed`: as a run has them."""

    trained: Manifest
    manifest: EvaluationManifest
    num_asked: int
    population: Callable[[], Sequence[DeviceId]]  # whom one may ask, now
    streams: Streams
    ledger: Ledger
    is_seeded: bool
    is_replayed: bool

    def is_due(self, round_num: int) -> bool:
        """Whether one is to be made after this round, and was not paid for before: nothing is paid for twice."""
        plan, num_rounds = self.trained.evaluation, self.trained.num_rounds
        if plan is None or not schedule.is_due(round_num, plan.every, num_rounds):
            return False
        return self.is_replayed or not self.ledger.is_debited(self._index(round_num), 0)

    def measure(self, adapter: Adapter, round_num: int, sum_cohort: SumCohort) -> DeviceLoss:
        """The devices' loss with the adapter after a round.

        Raises CohortError where too few devices are there, PrivacyBudgetError where its own budget is spent.
        """
        manifest, index = self.manifest, self._index(round_num)
        release = manifest.release
        eligible = sorted(self.population())
        if len(eligible) < release.min_survivors:
            raise CohortError(
                f"{len(eligible)} devices are there, {release.min_survivors} are needed; nothing was spent"
            )
        stream = self.streams("evaluated", "round", index)
        chosen = tuple(eligible[i] for i in stream.subset(len(eligible), min(self.num_asked, len(eligible))))
        task = TrainTask(manifest.hash, index, 0, adapter)

        def pay(roster: Roster) -> None:
            # As if one device were in all of them: that is what the calibration counts.
            attempts.debit(roster, manifest, self.ledger, self._num_paid_before(index) + 1, is_seeded=self.is_seeded)

        _, cohort = attempts.sum_attempt(manifest, chosen, task, sum_cohort, pay)
        integers = attempts.noised_by_server(cohort, manifest, self._own_streams, task)
        noise_std = sums.noise_std_of_sum(manifest, cohort.num_devices)
        found = metrics.decode_evaluation(integers / release.scale, release.encoding_norm, noise_std)
        loss, error = found if found is not None else (None, None)
        return DeviceLoss(loss, error, cohort.num_devices)

    def spent(self, training: Ledger) -> Mapping[Unit, float]:
        """What training and evaluations have cost the worst unit together."""
        units = self.trained.release.units
        return {unit.unit: epsilon_over((training, self.ledger), unit.unit, unit.target_delta) for unit in units}

    def _index(self, round_num: int) -> int:
        plan = self.trained.evaluation
        assert plan is not None
        return schedule.index_after(round_num, plan.every, self.trained.num_rounds)

    def _num_paid_before(self, index: int) -> int:
        return self.ledger.num_debits_until(index - 1, 0)

    def _own_streams(self, *purpose: str | int) -> RandomStream:
        return self.streams("evaluation", *purpose)
