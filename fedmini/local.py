"""One device's training in one round: read it down and you know what a device computes.

A device's steps are a generator: it asks for gradients and is sent them, so that whoever drives it may answer one device
alone, or many at once. All else stays within it: what it draws, clips, rounds and noises, and its optimizer.

Opacus is the engine: `IntegerDPOptimizer` is its `DPOptimizer` with the sum of clipped per-example gradients taken
over integers, as docs/accounting.md argues, so that its noise is exact and drawn from the injected generator.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from fedmini import metrics
from fedmini.model import together
from fedmini.model.lora import LoraModel
from fedmini.model.together import GradientRequest, Gradients
from fedmini.privacy import clipping, encoding, noise
from fedmini.privacy.noise import Streams
from fedmini.types import EncodedExample, IntVector, LocalPlan, UnitPlan, Vector

Result = TypeVar("Result")
Steps: TypeAlias = Generator[GradientRequest, Gradients, Result]
Parameters: TypeAlias = list[torch.nn.Parameter]  # an adapter, as LoraModel.parameters gives it


@dataclass(frozen=True, slots=True)
class Training:
    """What a device's local steps gave: the change of the adapter, and what its metrics would say."""

    delta: Vector  # (num_parameters,)
    loss: float  # nats a token, mean over the examples drawn; 0 where none was
    mean_targets: float


class IntegerDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer, summing per-example gradients as integers.

    Each example's gradient (its metric coordinates behind it, where there are any) is clipped, scaled and rounded
    on its own before the sum: rounding the sum instead would let neighbouring data sets differ by more than the
    bound that the noise is sized for. `integer_sum` is the sum since the last step, shape (num_coordinates,), int64.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        unit: UnitPlan,
        plan: LocalPlan,
        num_metrics: int,
        streams: Streams,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=unit.noise_multiplier,
            max_grad_norm=unit.clip_norm,
            expected_batch_size=max(1, round(plan.expected_batch_size)),
        )
        self.unit, self.plan, self.num_metrics, self.streams = unit, plan, num_metrics, streams
        self.num_coordinates = sum(parameter.numel() for parameter in self.params) + num_metrics
        self.norm_bound = encoding.sensitivity(unit.clip_norm, unit.scale, self.num_coordinates)
        self.metric_rows: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None
        self.integer_sum: IntVector = np.zeros(self.num_coordinates, np.int64)
        self._rounding = streams("rounding")
        self._num_noise_draws = 0

    def observe(self, found: Gradients) -> None:
        """Take the next per-example gradients, and what their examples lost: their metric coordinates."""
        for parameter, part in zip(self.params, _parts(found.rows, self.params), strict=True):
            parameter.grad_sample = part.view(len(part), *parameter.shape)
        self.metric_rows = (found.losses, found.num_targets)

    def clip_and_accumulate(self) -> None:
        """Add the current per-example gradients, each clipped and rounded, to `integer_sum`."""
        samples = [parameter.grad_sample.flatten(1) for parameter in self.params]
        rows = torch.cat(samples, dim=1).to("cpu", torch.float64).numpy()  # (batch, num_parameters)
        if len(rows):
            self.integer_sum += encoding.round_sum(self._joint(rows), self.unit.scale, self.norm_bound, self._rounding)
        for parameter in self.params:
            parameter.grad_sample = None

    def add_noise(self) -> None:
        """Give the parameters the decoded sum, with one full discrete Gaussian added over the integers."""
        stream = self.streams("noise", self._num_noise_draws)
        self._num_noise_draws += 1
        noised = self.integer_sum + noise.discrete_gaussian(self.unit.noise_variance, self.num_coordinates, stream)
        self.integer_sum = np.zeros(self.num_coordinates, np.int64)
        decoded = torch.from_numpy((noised / self.unit.scale).astype(np.float32))
        start = 0
        for parameter in self.params:
            stop = start + parameter.numel()
            parameter.grad = decoded[start:stop].view_as(parameter).to(parameter.device)
            start = stop

    def scale_grad(self) -> None:
        """Divide by the manifest's expected batch size, which a device's own data can't move."""
        for parameter in self.params:
            parameter.grad /= self.plan.expected_batch_size

    def _joint(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        room = self.unit.clip_norm if self.num_metrics == 0 else metrics.room_for_vector(self.unit.clip_norm)
        rows, was_clipped = clipping.clip_rows(rows, room)
        if self.num_metrics == 0:
            return rows
        assert self.metric_rows is not None
        losses, targets = self.metric_rows
        behind = metrics.coordinates(losses, targets, was_clipped, self.unit.clip_norm, self.plan.max_length)
        return np.concatenate([rows, behind], axis=1)


@dataclass(frozen=True, slots=True)
class LocalRun:
    """What a device brings to its training: data, the plan it agreed to, and where its randomness comes from."""

    examples: Sequence[EncodedExample]
    plan: LocalPlan
    physical_batch_size: int  # examples in memory at once
    streams: Streams


def run_alone(model: LoraModel, steps: Steps[Result]) -> Result:
    """What one device's steps come to, whose adapter is the model's."""
    try:
        request = next(steps)
        while True:
            request = steps.send(together.answer_alone(model, request))
    except StopIteration as done:
        result: Result = done.value
        return result


def run_together(model: LoraModel, devices: Sequence[Steps[Result]], tokens_at_once: int) -> Iterator[Result]:
    """What several devices' steps come to, in the order in which they end: each asks once, then all are answered.

    Either every device computes at the model's adapter, or each at a copy of its own.
    """
    answers: list[tuple[Steps[Result], Gradients | None]] = [(steps, None) for steps in devices]
    while answers:
        asking: list[tuple[Steps[Result], GradientRequest]] = []
        while answers:
            steps, answer = answers.pop(0)  # what it was sent is let go as soon as it has used it
            try:
                asking.append((steps, next(steps) if answer is None else steps.send(answer)))
            except StopIteration as done:
                yield done.value
        if asking:
            found = together.answer_together(model, [request for _, request in asking], tokens_at_once)
            answers = [(steps, answer) for (steps, _), answer in zip(asking, found, strict=True)]


def sum_gradients(parameters: Parameters, run: LocalRun, unit: UnitPlan, num_metrics: int) -> Steps[IntVector]:
    """One Poisson batch's per-example gradients, each clipped and rounded, then added; no noise yet.

    Shape (num_parameters + num_metrics,), int64. An empty batch gives zeros.
    """
    optimizer = IntegerDPOptimizer(torch.optim.SGD(parameters, lr=1.0), unit, run.plan, num_metrics, run.streams)
    for chunk in _chunks(_poisson_batch(run, step=0), run.physical_batch_size):
        optimizer.observe((yield GradientRequest(chunk, parameters, of_mean=False)))
        optimizer.clip_and_accumulate()
    return optimizer.integer_sum


def train_adapter(parameters: Parameters, run: LocalRun, unit: UnitPlan | None) -> Steps[Training]:
    """A device's local steps, which move its adapter: DP-SGD where `unit` says so, else plain.

    The adapter's change is private with respect to `unit` after every step, whoever sees it.
    """
    start = _flat(parameters)
    plain = _OPTIMIZERS[run.plan.optimizer](parameters, lr=run.plan.learning_rate)
    optimizer = None if unit is None else IntegerDPOptimizer(plain, unit, run.plan, 0, run.streams)
    losses: list[NDArray[np.float64]] = []
    targets: list[NDArray[np.int64]] = []
    for step in range(run.plan.num_steps):
        batch = _poisson_batch(run, step)
        if optimizer is not None:
            yield from _private_step(parameters, optimizer, batch, run.physical_batch_size)
            continue
        for found in (yield from _plain_step(parameters, plain, batch, run.physical_batch_size)):
            losses.append(found.losses)
            targets.append(found.num_targets)
    num_seen = sum(len(found) for found in losses)
    return Training(
        delta=_flat(parameters) - start,
        loss=float(sum(found.sum() for found in losses) / max(1, num_seen)),
        mean_targets=float(sum(found.sum() for found in targets) / max(1, num_seen)),
    )


def _private_step(
    parameters: Parameters, optimizer: IntegerDPOptimizer, batch: Sequence[EncodedExample], physical_batch_size: int
) -> Steps[None]:
    chunks = _chunks(batch, physical_batch_size) or [[]]  # an empty batch is a legal one: noise only
    for index, chunk in enumerate(chunks):
        optimizer.observe((yield GradientRequest(chunk, parameters, of_mean=False)))
        optimizer.signal_skip_step(do_skip=index < len(chunks) - 1)
        optimizer.step()
        optimizer.zero_grad()


def _plain_step(
    parameters: Parameters, optimizer: torch.optim.Optimizer, batch: Sequence[EncodedExample], physical_batch_size: int
) -> Steps[list[Gradients]]:
    """One step on the batch's mean gradient; an empty batch moves nothing."""
    found: list[Gradients] = []
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    for chunk in _chunks(batch, physical_batch_size):
        answer = yield GradientRequest(chunk, parameters, of_mean=True)
        found.append(replace(answer, rows=answer.rows[:0]))
        total.add_(answer.rows[0], alpha=len(chunk) / len(batch))
    if batch:
        for parameter, part in zip(parameters, _parts(total[None], parameters), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    optimizer.zero_grad()
    return found


def _parts(rows: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> tuple[torch.Tensor, ...]:
    """The coordinates of each parameter, (num_rows, size): views."""
    return torch.split(rows, [parameter.numel() for parameter in parameters], dim=1)


def _flat(parameters: Parameters) -> Vector:
    return np.concatenate([parameter.detach().cpu().numpy().ravel() for parameter in parameters])


def _poisson_batch(run: LocalRun, step: int) -> list[EncodedExample]:
    """Each example with probability `sampling_rate`, on its own; never truncated: the accounting rests on that."""
    chosen = run.streams("sampling", step).poisson_sample(len(run.examples), run.plan.sampling_rate)
    return [run.examples[index] for index in chosen]


def _chunks(batch: Sequence[EncodedExample], size: int) -> list[list[EncodedExample]]:
    """The batch in pieces of like length, so that little is padded."""
    ordered = sorted(batch, key=lambda example: len(example.tokens))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}
