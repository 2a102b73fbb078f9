"""Opacus's optimizer over integers: DP-SGD whose noise is exact, and drawn from the injected generator.

Opacus is the engine: `IntegerDPOptimizer` is its `DPOptimizer` with the sum of clipped per-example gradients taken
over integers, as docs/accounting.md argues. Import this module only where an example is protected.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedmini import metrics, vectors
from fedmini.descent import Optimizer
from fedmini.model.together import Gradients
from fedmini.opacus_optimizer import DPOptimizer
from fedmini.privacy import clipping, encoding, noise
from fedmini.privacy.noise import Streams
from fedmini.types import IntVector, LocalPlan, UnitPlan


class IntegerDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer, summing per-example gradients as integers.

    Each example's gradient (its metric coordinates behind it, where there are any) is clipped, scaled and rounded
    on its own before the sum: rounding the sum instead would let neighbouring data sets differ by more than the
    bound that the noise is sized for.
    """

    def __init__(
        self,
        optimizer: Optimizer,
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
        self._sizes = [parameter.numel() for parameter in self.params]
        num_coordinates = sum(self._sizes) + num_metrics
        norm_bound = encoding.sensitivity(unit.clip_norm, unit.scale, num_coordinates)
        self._sum = encoding.IntegerSum(num_coordinates, unit.scale, norm_bound, streams("rounding"))
        self._found: Gradients | None = None
        self._num_noise_draws = 0

    @property
    def integer_sum(self) -> IntVector:
        """The sum since the last step, shape (num_coordinates,), int64."""
        return self._sum.integers

    def observe(self, found: Gradients) -> None:
        """Take the next per-example gradients, and what their examples lost: their metric coordinates."""
        self._found = found
        for parameter, part in zip(self.params, torch.split(found.rows, self._sizes, dim=1), strict=True):
            parameter.grad_sample = part.view(len(part), *parameter.shape)  # Opacus looks for them before a step

    def clip_and_accumulate(self) -> None:
        """Add the observed per-example gradients, each clipped and rounded, to the sum."""
        assert self._found is not None
        rows = self._found.rows.cpu().numpy()  # (batch, num_parameters)
        room = self.unit.clip_norm if self.num_metrics == 0 else metrics.room_for_vector(self.unit.clip_norm)
        factors = [clipping.factor(vectors.norm(row), room) for row in rows]
        for row, factor, behind in zip(rows, factors, self._metrics(self._found, factors), strict=True):
            self._sum.add((row, factor), (behind, 1.0))
        self._found = None
        for parameter in self.params:
            parameter.grad_sample = None

    def add_noise(self) -> None:
        """Give the parameters the decoded sum, with one full discrete Gaussian added over the integers."""
        stream = self.streams("noise", self._num_noise_draws)
        self._num_noise_draws += 1
        noised = self.integer_sum
        noised += noise.discrete_gaussian(self.unit.noise_variance, len(noised), stream)
        self._sum.clear()
        decoded = torch.from_numpy((noised / self.unit.scale).astype(np.float32))
        for parameter, part in zip(self.params, torch.split(decoded[: sum(self._sizes)], self._sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device)

    def scale_grad(self) -> None:
        """Divide by the manifest's expected batch size, which a device's own data can't move."""
        for parameter in self.params:
            parameter.grad /= self.plan.expected_batch_size

    def _metrics(self, found: Gradients, factors: Sequence[float]) -> NDArray[np.float64]:
        """What stands behind each gradient, (batch, num_metrics)."""
        if self.num_metrics == 0:
            return np.zeros((len(factors), 0))
        was_clipped = np.array(factors) < 1
        return metrics.coordinates(
            found.losses, found.num_targets, was_clipped, self.unit.clip_norm, self.plan.max_length
        )
