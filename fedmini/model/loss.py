"""Cross-entropy on the target positions only, over a frozen head, without ever holding all logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from fedmini.model import native
from fedmini.model.layer_kernels import DTYPES
from fedmini.model.packed_layers import PackedHead
from fedmini.model.runtime import PIECE_WORDS
from fedmini.model.scratch import scratch
from fedmini.types import EncodedExample


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Examples side by side, padded on the right. No mask: in a causal model nothing looks at what follows it."""

    tokens: torch.Tensor  # (num_examples, length), int64: each up to its last target, exclusive
    rows: torch.Tensor  # (num_targets,): the example of each target
    columns: torch.Tensor  # (num_targets,): the position that predicts it
    targets: torch.Tensor  # (num_targets,): the token to predict
    num_targets: torch.Tensor  # (num_examples,), int64

    def mean_of_each(self, losses: torch.Tensor) -> torch.Tensor:
        """Each example's mean over its own targets: (num_targets,) -> (num_examples,)."""
        total = torch.zeros(len(self.tokens), dtype=losses.dtype, device=losses.device)
        return total.index_add(0, self.rows, losses) / self.num_targets.to(losses.dtype)


def batch_of(examples: Sequence[EncodedExample], accelerator: torch.device) -> TokenBatch:
    """At least one example, each with at least one target. What follows an example's last target is left out."""
    wanted = [np.flatnonzero(example.is_target) for example in examples]
    length = max(int(positions[-1]) for positions in wanted)
    tokens = np.zeros((len(examples), length), dtype=np.int64)
    for row, (example, positions) in enumerate(zip(examples, wanted, strict=True)):
        tokens[row, : positions[-1]] = example.tokens[: positions[-1]]
    counts = np.array([len(positions) for positions in wanted])
    targets = np.concatenate([e.tokens[p] for e, p in zip(examples, wanted, strict=True)]).astype(np.int64)

    def moved(values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(accelerator)

    return TokenBatch(
        tokens=moved(tokens),
        rows=moved(np.repeat(np.arange(len(examples)), counts)),
        columns=moved(np.concatenate(wanted) - 1),
        targets=moved(targets),
        num_targets=moved(counts),
    )


def target_losses(hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, chunk_tokens: int) -> torch.Tensor:
    """-log p(target) in nats, float32 (num_targets,), from hidden states (num_targets, hidden_size).

    Logits of at most `chunk_tokens` positions exist at once. The softmax is in float32. A packed head is dequantised in
    pieces, for the logits and again for the gradient; it is never there as a whole where there is a compiled kernel.
    """
    losses: torch.Tensor = _TargetLosses.apply(hidden, targets, head, chunk_tokens)  # type: ignore[no-untyped-call]
    return losses


def _pieces(head: nn.Module, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of the head and their weights; each valid until the next is asked for."""
    if not isinstance(head, PackedHead):
        yield slice(None), cast(torch.Tensor, head.weight).to(dtype)
        return
    packed = head.packed
    num_words, hidden_size = packed.shape
    # Plain torch dequantises so slowly that once has to do for both passes.
    num_rows = PIECE_WORDS if native.current() is not None else num_words
    for start in range(0, num_words, num_rows):
        rows = slice(start, min(start + num_rows, num_words))
        place = scratch("head", (rows.stop - start, hidden_size), dtype, packed.values.device)
        yield rows, packed.part(rows).dense(dtype, place)


class _TargetLosses(torch.autograd.Function):
    """Forms the gradient for the hidden states in forward, while the logits exist; the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, chunk_tokens: int
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            index = targets[chunk].unsqueeze(1)
            if (kernel := native.current()) is not None and hidden.is_cpu and hidden.dtype in DTYPES:
                logits = _logits(hidden[chunk], head, hidden.dtype)
                losses[chunk] = kernel.layers.loss(logits, targets[chunk])  # the logits are now their own gradient
            else:
                logits = _logits(hidden[chunk], head, torch.float32)
                logits -= logits.amax(dim=1, keepdim=True)
                chosen = logits.gather(1, index)
                total = logits.exp_().sum(dim=1, keepdim=True)
                losses[chunk] = (total.log() - chosen).squeeze(1)
                logits.div_(total).scatter_add_(1, index, torch.full_like(chosen, -1.0))
            if to_hidden is not None:
                to_hidden[chunk] = _times_head(logits, head, hidden.dtype)
        ctx.save_for_backward(to_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (to_hidden,) = ctx.saved_tensors
        return to_hidden * gradients[0].to(to_hidden.dtype).unsqueeze(1), None, None, None


def _logits(hidden: torch.Tensor, head: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """(chunk_tokens, vocabulary), rounded to the type of `hidden` and held in `dtype`, in this thread's scratch memory."""
    num_words = head.out_features if isinstance(head, PackedHead) else len(cast(torch.Tensor, head.weight))
    logits = scratch("logits", (len(hidden), num_words), dtype, hidden.device)
    for rows, weight in _pieces(head, hidden.dtype):
        logits[:, rows] = hidden @ weight.t()
    return logits


def _times_head(values: torch.Tensor, head: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """float32, (chunk_tokens, hidden_size), from (chunk_tokens, vocabulary)."""
    total: torch.Tensor | None = None
    for rows, weight in _pieces(head, dtype):
        part = (values[:, rows].to(dtype) @ weight).float()
        total = part if total is None else total.add_(part)
    assert total is not None, "a head without words"
    return total
