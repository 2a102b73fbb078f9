"""Gradient descent without torch's own optimizers, the first of which imports torch's compiler: 1 s and 68 MB."""

from collections.abc import Sequence
from typing import Any

import torch


class Sgd:
    """Gradient descent that steps as `torch.optim.SGD(parameters, lr)` does, to the bit; Opacus can wrap it."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": lr}]
        self.defaults: dict[str, Any] = {"lr": lr}
        self.state: dict[torch.nn.Parameter, Any] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move each parameter that has a gradient against it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


Optimizer = torch.optim.Optimizer | Sgd
