"""The bare loop that frameworks are measured against: federated averaging with clipping and central noise, in torch alone."""

from collections.abc import Sequence

import torch
from torch import nn
from workloads import WORKLOADS, Examples, loss_of


class PlainLoop:
    """One device after the other on one model; `round` moves it by the noised mean of their clipped changes."""

    def __init__(self, kind: str, model: nn.Module, devices: Sequence[Examples], noise_multiplier: float = 0.5) -> None:
        self.kind, self.model, self.devices, self.noise_multiplier = kind, model, devices, noise_multiplier
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._work = WORKLOADS[kind]

    def train_device(self, index: int) -> None:
        """A device's steps of SGD, from where the model stands."""
        inputs, labels = self.devices[index]
        optimizer = torch.optim.SGD(self.parameters, lr=self._work.learning_rate)
        for start in range(0, len(inputs), self._work.batch_size):
            batch = slice(start, start + self._work.batch_size)
            optimizer.zero_grad(set_to_none=True)
            loss_of(self.kind, self.model, inputs[batch], labels[batch]).backward()
            optimizer.step()

    def round(self, cohort: Sequence[int]) -> None:
        clip_norm = self._work.clip_norm
        start = [parameter.detach().clone() for parameter in self.parameters]
        sums = [torch.zeros_like(parameter) for parameter in self.parameters]
        for index in cohort:
            self._put(start)
            self.train_device(index)
            with torch.no_grad():
                changes = [parameter - before for parameter, before in zip(self.parameters, start, strict=True)]
                norm = torch.sqrt(sum((change * change).sum() for change in changes))
                factor = min(1.0, clip_norm / (norm.item() + 1e-12))
                for total, change in zip(sums, changes, strict=True):
                    total.add_(change, alpha=factor)
        with torch.no_grad():
            for total in sums:
                total.add_(torch.randn_like(total), alpha=self.noise_multiplier * clip_norm)
        self._put([before + total / len(cohort) for before, total in zip(start, sums, strict=True)])

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
