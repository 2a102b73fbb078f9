"""Cross-entropy on the target positions only, over a frozen head, without ever holding all logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from fedmini.model import native
from fedmini.model.packed_layers import PackedHead
from fedmini.model.packing import PackedRows
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

    Logits of at most `chunk_tokens` positions exist at once. The softmax is in float32. Where that is enough for all, a
    packed head is dequantised in pieces, for the logits and again for the gradient; where it isn't, or where there is no
    compiled kernel, as a whole and once.
    """
    losses: torch.Tensor = _TargetLosses.apply(hidden, targets, head, chunk_tokens)  # type: ignore[no-untyped-call]
    return losses


class _Head:
    """A head's weights in one type: its rows, as a whole or in pieces."""

    def __init__(self, head: nn.Module, dtype: torch.dtype, is_whole: bool) -> None:
        self._dtype = dtype
        self._packed: PackedRows | None = None
        self._whole: torch.Tensor | None = None
        if isinstance(head, PackedHead):
            self._packed, self.num_words = head.packed, head.out_features
            self._whole = self._dense(self._packed) if is_whole else None
        else:
            self._whole = cast(torch.Tensor, head.weight).to(dtype)
            self.num_words = len(self._whole)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows and their weights; each valid until the next is asked for."""
        if self._whole is not None:
            yield slice(0, self.num_words), self._whole
            return
        assert self._packed is not None
        for start in range(0, self.num_words, PIECE_WORDS):
            rows = slice(start, min(start + PIECE_WORDS, self.num_words))
            yield rows, self._dense(self._packed.part(rows))

    def _dense(self, packed: PackedRows) -> torch.Tensor:
        return packed.dense(self._dtype, scratch("head", packed.shape, self._dtype, packed.values.device))


class _TargetLosses(torch.autograd.Function):
    """Forms the gradient for the hidden states in forward, while the logits exist; the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: nn.Module, chunk_tokens: int
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _Head(head, hidden.dtype, is_whole=len(hidden) > chunk_tokens or native.current() is None)
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            if (kernel := native.kernel_for(hidden)) is not None:
                logits = _logits(hidden[chunk], rows, hidden.dtype)
                losses[chunk] = kernel.layers.loss(logits, targets[chunk])  # the logits are now their own gradient
            else:
                logits = _logits(hidden[chunk], rows, torch.float32)
                logits -= logits.amax(dim=1, keepdim=True)
                index = targets[chunk].unsqueeze(1)
                chosen = logits.gather(1, index)
                total = logits.exp_().sum(dim=1, keepdim=True)
                losses[chunk] = (total.log() - chosen).squeeze(1)
                if to_hidden is not None:
                    logits.div_(total).scatter_add_(1, index, torch.full_like(chosen, -1.0))
            if to_hidden is not None:
                to_hidden[chunk] = _times_head(logits, rows, hidden.dtype)
        ctx.save_for_backward(to_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (to_hidden,) = ctx.saved_tensors
        return to_hidden * gradients[0].to(to_hidden.dtype).unsqueeze(1), None, None, None


def _logits(hidden: torch.Tensor, head: _Head, dtype: torch.dtype) -> torch.Tensor:
    """(chunk_tokens, vocabulary), rounded to the type of `hidden` and held in `dtype`, in this thread's scratch memory."""
    logits = scratch("logits", (len(hidden), head.num_words), dtype, hidden.device)
    for rows, weight in head.pieces():
        if len(weight) == head.num_words and dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            logits[:, rows] = hidden @ weight.t()
    return logits


def _times_head(values: torch.Tensor, head: _Head, dtype: torch.dtype) -> torch.Tensor:
    """float32, (chunk_tokens, hidden_size), from (chunk_tokens, vocabulary)."""
    total: torch.Tensor | None = None
    for rows, weight in head.pieces():
        part = (values[:, rows].to(dtype) @ weight).float()
        total = part if total is None else total.add_(part)
    assert total is not None, "a head without words"
    return total
