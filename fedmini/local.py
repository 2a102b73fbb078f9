"""One device's training in one round: read it down and you know what a device computes.

A device's steps are a generator: it asks for gradients and is sent them, so that whoever drives it may answer one device
alone, or many at once. All else stays within it: what it draws, clips, rounds and noises, and its optimizer.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedmini.descent import Optimizer, Sgd
from fedmini.model import together
from fedmini.model.lora import LoraModel
from fedmini.model.together import GradientRequest, Gradients, Request
from fedmini.privacy.noise import Streams
from fedmini.types import EncodedExample, IntVector, LocalPlan, UnitPlan, Vector

if TYPE_CHECKING:
    from fedmini.integer_optimizer import IntegerDPOptimizer

Result = TypeVar("Result")
Steps: TypeAlias = Generator[Request, Gradients, Result]
Parameters: TypeAlias = list[torch.nn.Parameter]  # an adapter, as LoraModel.parameters gives it


@dataclass(frozen=True, slots=True)
class Training:
    """What a device's local steps gave: the change of the adapter, and what its metrics would say."""

    delta: Vector  # (num_parameters,)
    loss: float  # nats a token, mean over the examples drawn; 0 where none was
    mean_targets: float


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
        asking: list[tuple[Steps[Result], Request]] = []
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
    optimizer = _over_integers(Sgd(parameters, lr=1.0), unit, run, num_metrics)
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
    optimizer = None if unit is None else _over_integers(plain, unit, run, num_metrics=0)
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
    delta = _flat(parameters)
    delta -= start
    return Training(
        delta=delta,
        loss=float(sum(found.sum() for found in losses) / max(1, num_seen)),
        mean_targets=float(sum(found.sum() for found in targets) / max(1, num_seen)),
    )


def _over_integers(optimizer: Optimizer, unit: UnitPlan, run: LocalRun, num_metrics: int) -> "IntegerDPOptimizer":
    from fedmini.integer_optimizer import IntegerDPOptimizer  # with it comes Opacus, which only private steps need

    return IntegerDPOptimizer(optimizer, unit, run.plan, num_metrics, run.streams)


def _private_step(
    parameters: Parameters, optimizer: "IntegerDPOptimizer", batch: Sequence[EncodedExample], physical_batch_size: int
) -> Steps[None]:
    chunks = _chunks(batch, physical_batch_size) or [[]]  # an empty batch is a legal one: noise only
    for index, chunk in enumerate(chunks):
        optimizer.observe((yield GradientRequest(chunk, parameters, of_mean=False)))
        optimizer.signal_skip_step(do_skip=index < len(chunks) - 1)
        optimizer.step()
        optimizer.zero_grad()


def _plain_step(
    parameters: Parameters, optimizer: Optimizer, batch: Sequence[EncodedExample], physical_batch_size: int
) -> Steps[list[Gradients]]:
    """One step on the batch's mean gradient; an empty batch moves nothing."""
    found: list[Gradients] = []
    total = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    for chunk in _chunks(batch, physical_batch_size):
        answer = yield GradientRequest(chunk, parameters, of_mean=True)
        found.append(replace(answer, rows=answer.rows[:0]))
        total.add_(answer.rows[0], alpha=len(chunk) / len(batch))
    if batch:
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, torch.split(total, sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    optimizer.zero_grad()
    return found


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


_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters, lr: Sgd(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}
