"""The loss on what devices hold back from training: a secure sum of its own, paid for in a ledger of its own.

It teaches the model nothing and holds up no round: where too few devices are there, it is left out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from fedmini import attempts, metrics, run_history, schedule, sums
from fedmini.errors import CohortError
from fedmini.privacy.ledger import Ledger, epsilon_over
from fedmini.privacy.noise import RandomStream
from fedmini.rounds import Run
from fedmini.server_step import num_asked
from fedmini.types import Adapter, EvaluationManifest, EvaluationPlan, Roster, SumCohort, TrainTask


@dataclass(frozen=True, slots=True)
class DeviceLoss:
    """What one evaluation says; the numbers are None where its noise drowns it."""

    loss: float | None  # nats a token, the mean over examples (or devices), each capped
    error: float | None  # one standard deviation of the noise in it
    num_devices: int


@dataclass(frozen=True, slots=True)
class DeviceEvaluations:
    """A run's evaluations on its devices, as the server knows them: whom it asks, and by what randomness, is the run's."""

    run: Run
    manifest: EvaluationManifest
    ledger: Ledger  # theirs, not the training's

    @classmethod
    def of(cls, run: Run, ledger: Ledger | None) -> Self | None:
        """Those of a run; None where it has none, and so no ledger for them."""
        manifest = run.manifest.for_evaluation
        return None if manifest is None or ledger is None else cls(run, manifest, ledger)

    def is_due(self, line: Mapping[str, Any]) -> bool:
        """Whether one is to be made after a round, by its line in the metrics. Nothing is paid for twice."""
        plan, round_num = self._plan, int(line["round"])
        if line["device_loss"] is not None or not schedule.is_due(round_num, plan.every, self.run.manifest.num_rounds):
            return False
        return self.run.is_replayed or not self.ledger.is_debited(self._index(round_num), 0)

    def measure(self, adapter: Adapter, round_num: int, sum_cohort: SumCohort) -> DeviceLoss:
        """The devices' loss with the adapter after a round.

        Raises CohortError where too few devices are there, PrivacyBudgetError where its own budget is spent.
        """
        manifest, index = self.manifest, self._index(round_num)
        release = manifest.release
        eligible = sorted(self.run.population())
        if len(eligible) < release.min_survivors:
            raise CohortError(
                f"{len(eligible)} devices are there, {release.min_survivors} are needed; nothing was spent"
            )
        stream = self.run.streams("evaluated", "round", index)
        wanted = num_asked(release.cohort_size, self.run.server.over_selection)
        chosen = tuple(eligible[place] for place in stream.subset(len(eligible), min(wanted, len(eligible))))
        task = TrainTask(manifest.hash, index, 0, adapter)

        def pay(roster: Roster) -> None:
            # As if one device were in all of them: that is what the calibration counts.
            participation = self.ledger.num_debits_until(index - 1, 0) + 1
            attempts.debit(roster, manifest, self.ledger, participation, is_seeded=self.run.is_seeded)

        _, cohort = attempts.sum_attempt(manifest, chosen, task, sum_cohort, pay)
        integers = attempts.noised_by_server(cohort, manifest, self._own_streams, task)
        noise_std = sums.noise_std_of_sum(manifest, cohort.num_devices)
        found = metrics.decode_evaluation(integers / release.scale, release.encoding_norm, noise_std)
        loss, error = found if found is not None else (None, None)
        return DeviceLoss(loss, error, cohort.num_devices)

    def add_to(self, line: dict[str, Any], found: DeviceLoss, training: Ledger) -> None:
        """Put what devices measured into its round's line."""
        position = asdict(self.ledger.position)
        line |= {"device_loss": found.loss, "device_loss_error": found.error, run_history.POSITION: position}
        self.add_cost_to(line, training)

    def add_cost_to(self, line: dict[str, Any], training: Ledger) -> None:
        """Put what training and evaluations have cost together into a round's line: the worst unit's."""
        ledgers = (training, self.ledger)
        units = self.run.manifest.release.units
        line["epsilon"] = {unit.unit: epsilon_over(ledgers, unit.unit, unit.target_delta) for unit in units}

    @property
    def _plan(self) -> EvaluationPlan:
        assert self.manifest.evaluation is not None  # it came from there
        return self.manifest.evaluation

    def _index(self, round_num: int) -> int:
        return schedule.index_after(round_num, self._plan.every, self.run.manifest.num_rounds)

    def _own_streams(self, *purpose: str | int) -> RandomStream:
        return self.run.streams("evaluation", *purpose)
