"""Gradients and losses as devices ask for them: of one alone, or of many in one forward and backward over their shared base.

Together, every example is computed as alone: at its own device's adapter, beside others that it can't see. Only the
shapes of the matrix products differ, so that a library may add up in another order: rows differ by float rounding. That
is for simulations, where nobody is protected from whoever runs them: a device of a deployment is always alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fedmini.model.gradients import Devices, Recording
from fedmini.model.lora import LoraModel
from fedmini.types import EncodedExample


@dataclass(frozen=True, slots=True)
class GradientRequest:
    """What a device asks the base for: gradients at its adapter, of the examples of one physical batch."""

    examples: Sequence[EncodedExample]
    parameters: Sequence[torch.nn.Parameter]  # the adapter, as LoraModel.parameters has it: that very one, or a copy
    of_mean: bool  # the gradient of the examples' mean loss is wanted; false: that of each example's own


@dataclass(frozen=True, slots=True)
class LossRequest:
    """What a device that only measures asks the base for: the loss of each example, at the adapter that the model holds."""

    examples: Sequence[EncodedExample]
    batch_size: int  # examples in memory at once, where it is answered alone


Request: TypeAlias = GradientRequest | LossRequest


@dataclass(frozen=True, slots=True)
class Gradients:
    """The answer: row i is about example i alone; of a mean there is one row. Without examples it is zero, or no row.

    Where losses alone were asked for there is no row.
    """

    rows: torch.Tensor  # (num_examples or 1, num_parameters), float32
    losses: NDArray[np.float64]  # (num_examples,), nats a token, the mean over the example's targets
    num_targets: NDArray[np.int64]  # (num_examples,)


def answer_alone(model: LoraModel, request: Request) -> Gradients:
    """What one device asks for, at the adapter that the model holds."""
    examples = request.examples
    if isinstance(request, LossRequest):
        return _without_rows(model, examples, model.mean_losses(examples, request.batch_size))
    if not request.of_mean:
        found = model.example_gradients(examples)
        return Gradients(found.gradients, found.losses, found.num_targets)
    gradient, losses = model.mean_gradient(examples)
    return Gradients(gradient[None], losses, _num_targets(examples))


def answer_together(model: LoraModel, requests: Sequence[Request], tokens_at_once: int) -> list[Gradients]:
    """What several devices ask for, all of the same kind; examples of like length go together, whosever they are.

    At most `tokens_at_once` tokens are in memory at once, padding included, or one example. Within float rounding what
    `answer_alone` gives each: about 1e-6 of a gradient's norm in float32.
    """
    of_gradients = [request for request in requests if isinstance(request, GradientRequest)]
    if not of_gradients:
        return list(_losses(model, requests, tokens_at_once))
    return _gradients(model, of_gradients, tokens_at_once)


def _losses(model: LoraModel, requests: Sequence[Request], tokens_at_once: int) -> Iterator[Gradients]:
    examples = [example for request in requests for example in request.examples]
    losses = np.zeros(len(examples))
    for members, prefix_length in model.by_prefix(examples):
        for chosen in _batches(examples, members, prefix_length, tokens_at_once):
            losses[chosen] = model.mean_losses([examples[index] for index in chosen], len(chosen))
    ends = np.cumsum([len(request.examples) for request in requests])
    for request, own in zip(requests, np.split(losses, ends[:-1]), strict=True):
        yield _without_rows(model, request.examples, own)


def _without_rows(model: LoraModel, examples: Sequence[EncodedExample], losses: NDArray[np.float64]) -> Gradients:
    return Gradients(torch.zeros(0, model.num_parameters), losses, _num_targets(examples))


def _num_targets(examples: Sequence[EncodedExample]) -> NDArray[np.int64]:
    return np.array([example.is_target.sum() for example in examples], np.int64)


def _gradients(model: LoraModel, requests: Sequence[GradientRequest], tokens_at_once: int) -> list[Gradients]:
    is_shared = requests[0].parameters[0] is model.parameters()[0]
    wave = _Wave(
        requests=requests,
        examples=[example for request in requests for example in request.examples],
        owners=np.repeat(np.arange(len(requests)), [len(request.examples) for request in requests]),
        adapters=None if is_shared else torch.stack([_flat(request.parameters) for request in requests]),
    )
    num_rows = len(requests) if requests[0].of_mean else len(wave.examples)
    rows = torch.zeros(num_rows, model.num_parameters, device=model.base.accelerator)
    losses, num_targets = np.zeros(len(wave.examples)), np.zeros(len(wave.examples), np.int64)
    for members, prefix_length in model.by_prefix(wave.examples):
        for chosen in _batches(wave.examples, members, prefix_length, tokens_at_once):
            losses[chosen], num_targets[chosen] = _record(model, wave, chosen, prefix_length, rows)
    return list(_split(wave, rows, losses, num_targets))


@dataclass(frozen=True, slots=True)
class _Wave:
    """One request of each of several devices, and their examples behind each other."""

    requests: Sequence[GradientRequest]
    examples: Sequence[EncodedExample]
    owners: NDArray[np.int64]  # (num_examples,)
    adapters: torch.Tensor | None  # (num_devices, num_parameters); None where all compute at the model's own


def _batches(
    examples: Sequence[EncodedExample], members: Sequence[int], prefix_length: int, tokens_at_once: int
) -> Iterator[NDArray[np.int64]]:
    """Examples of like length, as many as there is room for; those of a device stand together."""
    lengths = {index: int(np.flatnonzero(examples[index].is_target)[-1]) - prefix_length for index in members}
    batch: list[int] = []
    for index in sorted(members, key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > tokens_at_once:
            yield np.sort(batch)
            batch = []
        batch.append(index)
    yield np.sort(batch)


def _record(
    model: LoraModel, wave: _Wave, chosen: NDArray[np.int64], prefix_length: int, rows: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Add the chosen examples' gradients to their rows; give their losses and numbers of targets."""
    examples = [wave.examples[index] for index in chosen]
    here, owners, counts = np.unique(wave.owners[chosen], return_inverse=True, return_counts=True)
    sums = wave.requests[0].of_mean
    goal = torch.from_numpy(here if sums else chosen).to(rows.device)
    flat = torch.zeros(len(goal), rows.shape[1], device=rows.device)
    owner_of_each = torch.from_numpy(owners).to(rows.device)
    devices = None
    if wave.adapters is not None:
        num_each = int(counts[0]) if (counts == counts[0]).all() else None
        adapters = wave.adapters[torch.from_numpy(here).to(rows.device)]
        devices = Devices(adapters, owner_of_each, num_each)
    found = model.record(examples, prefix_length, Recording(flat, devices, owner_of_each if sums else None))
    rows.index_add_(0, goal, flat)
    return found


def _split(
    wave: _Wave, rows: torch.Tensor, losses: NDArray[np.float64], num_targets: NDArray[np.int64]
) -> Iterator[Gradients]:
    start = 0
    for index, request in enumerate(wave.requests):
        part = slice(start, start + len(request.examples))
        own = rows[index : index + 1] / max(1, len(request.examples)) if request.of_mean else rows[part]
        yield Gradients(own, losses[part], num_targets[part])
        start = part.stop


def _flat(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
