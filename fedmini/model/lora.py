"""LoRA on a base: its trainable tensors as an adapter, and what one device computes with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedmini.errors import ConfigError, ModelMismatchError
from fedmini.model import adaptation, adapters, digests, frozen_draw, generation, loss, prefix
from fedmini.model.checkpointing import Checkpointing
from fedmini.model.frozen_layers import FrozenLayers, KeptStates
from fedmini.model.gradients import GradientRecorder, Recording
from fedmini.model.loading import Base
from fedmini.model.prefix import PrefixReader
from fedmini.model.runtime import LOGITS_TOKENS
from fedmini.types import Adapter, EncodedExample, LoraShape, Template, Vector


@dataclass(frozen=True, slots=True)
class ExampleGradients:
    """What example_gradients gives: row i is about example i alone."""

    gradients: torch.Tensor  # (num_examples, num_parameters), float32
    losses: NDArray[np.float64]  # (num_examples,), nats a token, the mean over the example's targets
    num_targets: NDArray[np.int64]  # (num_examples,)

    @property
    def norms(self) -> NDArray[np.float64]:
        """L2 of each row, (num_examples,), summed in float64."""
        norms: NDArray[np.float64] = torch.linalg.vector_norm(self.gradients, dim=1, dtype=torch.float64).cpu().numpy()
        return norms


class LoraModel:
    """A base with LoRA. Computes in the base's type; LoRA tensors and their gradients are float32.

    Several may stand on one base: they share its weights. Not for two threads at once. Raises ConfigError for a shape
    that doesn't fit the base, or whose gradients would be silently wrong. Of an example that begins with
    the tokens `detached_prefix` (a public constant: the template's) that beginning is read once for all and held
    constant: no gradient goes through it, and little of its cost is paid.
    """

    def __init__(
        self,
        base: Base,
        shape: LoraShape,
        checkpointing: bool = False,
        loss_chunk_tokens: int = LOGITS_TOKENS,
        detached_prefix: Sequence[int] = (),
    ) -> None:
        self.base, self.shape = base, shape
        self._chunk_tokens = loss_chunk_tokens
        self._adapted = adaptation.adapt(base.module, shape)
        self._causal = self._adapted.causal
        self._body: Any = self._causal.base_model
        self._head: torch.nn.Module = self._causal.get_output_embeddings()
        self._recorder = GradientRecorder()
        self._tensors = self._adapted.tensors
        self._draw_frozen()
        self._trained = {name: tensor for name, tensor in self._tensors.items() if tensor.requires_grad}
        self.template: Template = tuple((name, tuple(tensor.shape)) for name, tensor in self._trained.items())
        self.num_parameters = sum(tensor.numel() for tensor in self._trained.values())
        self._attach_layers()
        self._checkpointing = Checkpointing(self._causal if checkpointing else None)
        self._prefix = PrefixReader(self._causal, self.parameters())
        self._frozen: FrozenLayers | None = None
        if detached_prefix and checkpointing:
            raise ConfigError("a prefix can't be detached under checkpointing: a recomputed layer would read it twice")
        self._detached = tuple(detached_prefix)
        if base.weights != "packed":
            self._check_head()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the base's weights, its tokenizer with the template, and the frozen A."""
        frozen = [(name, _to_numpy(tensor)) for name, tensor in self._tensors.items() if not tensor.requires_grad]
        kind = self.base.weights if self.base.weights in ("nf4", "int8") else ""
        tokenizer = digests.tokenizer_digest(self.base.tokenizer)
        return digests.base_fingerprint(self.base.weights_digest, tokenizer, frozen, kind)

    @property
    def module(self) -> torch.nn.Module:
        """The adapted model: for a packed base our own Llama, else PEFT's model over transformers'."""
        return self._adapted.module

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable tensors, in the template's order."""
        return list(self._trained.values())

    def copies(self) -> list[torch.nn.Parameter]:
        """The trainable tensors' values in tensors of their own, in the template's order."""
        return [torch.nn.Parameter(tensor.detach().clone()) for tensor in self._trained.values()]

    def adapter(self) -> Adapter:
        """A copy of the trainable tensors."""
        return {name: _to_numpy(tensor) for name, tensor in self._trained.items()}

    def initial_adapter(self) -> Adapter:
        """Where training starts: B is zero; a trained A is drawn from the shape's seed."""
        return {name: self._first_value(name, shape) for name, shape in self.template}

    def set_adapter(self, adapter: Adapter) -> None:
        """Raises ModelMismatchError unless names and shapes are the template's and every number is finite."""
        if (names := set(adapter)) != set(self._trained):
            wrong = min(names ^ set(self._trained))
            problem = "is missing" if wrong in self._trained else "is not part of this adapter"
            raise ModelMismatchError(f"adapter: {wrong[:120]} {problem}; expected {len(self._trained)} tensors")
        for name, shape in self.template:
            if (got := adapter[name].shape) != shape:
                raise ModelMismatchError(f"adapter: {name} has shape {got}, expected {shape}")
            if not np.isfinite(adapter[name]).all():
                raise ModelMismatchError(f"adapter: {name} holds numbers that are not finite")
        with torch.no_grad():
            for name, tensor in self._trained.items():
                values = torch.from_numpy(np.ascontiguousarray(adapter[name], dtype=np.float32))
                if not torch.equal(tensor.cpu(), values):  # what is read of a shared prefix stays valid
                    tensor.copy_(values)

    def interrupt_by(self, check: Callable[[], None]) -> None:
        """Call `check` at every LoRA layer from now on: what it raises ends the computation that goes on, within it."""
        self._recorder.check = check

    def keep_states(self, kept: KeptStates) -> FrozenLayers:
        """Compute what the layers below the lowest adapted one say of an example once, and keep it there, from now on."""
        self._frozen = FrozenLayers(self._causal, self.base, kept)
        return self._frozen

    def flat(self) -> Vector:
        """The adapter as one vector: the template's order, C order within a tensor."""
        return np.concatenate([_to_numpy(tensor).ravel() for tensor in self._trained.values()])

    def set_flat(self, vector: Vector) -> None:
        """The inverse of `flat`. Raises ModelMismatchError for another length or numbers that are not finite."""
        if vector.shape != (self.num_parameters,):
            raise ModelMismatchError(f"adapter vector: expected shape ({self.num_parameters},), got {vector.shape}")
        ends = np.cumsum([tensor.numel() for tensor in self._trained.values()])[:-1]
        parts = np.split(vector, ends)
        self.set_adapter({name: part.reshape(shape) for (name, shape), part in zip(self.template, parts, strict=True)})

    def example_gradients(self, examples: Sequence[EncodedExample]) -> ExampleGradients:
        """The gradient of each example's own mean loss, all in one forward and backward; no examples are legal.

        Row i does not depend on the other examples, beyond float rounding. Each parameter's `grad_sample` becomes a
        view of the rows, as Opacus's DPOptimizer expects it with grad_sample_mode="no_op"; `.grad` is left alone.
        """
        rows = torch.zeros(len(examples), self.num_parameters, device=self.base.accelerator)
        place = 0
        for tensor in self._trained.values():
            view = rows[:, place : place + tensor.numel()].view(len(examples), *tensor.shape)
            tensor.grad_sample = view  # type: ignore[attr-defined]
            place += tensor.numel()
        if not examples:
            return ExampleGradients(rows, np.zeros(0), np.zeros(0, np.int64))
        losses, num_targets = np.zeros(len(examples)), np.zeros(len(examples), np.int64)
        for members, length in self.by_prefix(examples):
            own = rows if len(members) == len(examples) else torch.zeros_like(rows[: len(members)])
            chosen = [examples[index] for index in members]
            losses[members], num_targets[members] = self.record(chosen, length, Recording(own))
            if own is not rows:
                rows[members] = own
        return ExampleGradients(rows, losses, num_targets)

    def record(
        self, examples: Sequence[EncodedExample], prefix_length: int, recording: Recording
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """One forward and backward: each example's gradient is added where `recording` says.

        All begin with the first `prefix_length` tokens of the detached prefix, as `by_prefix` has them. Gives the mean
        loss of each example, nats a token, and how many targets it has.
        """
        batch = loss.batch_of(examples, self.base.accelerator)
        with self._recorder.to(recording), self._checkpointing.on():
            means = batch.mean_of_each(self._target_losses(batch, prefix_length))
            means.sum().backward()  # type: ignore[no-untyped-call]
        return means.detach().double().cpu().numpy(), batch.num_targets.cpu().numpy()

    def by_prefix(self, examples: Sequence[EncodedExample]) -> list[tuple[list[int], int]]:
        """Who begins with the detached prefix, and who doesn't: (indices, length of the prefix), no empty group.

        What an example's gradient is must be decided by that example alone: a beginning that a *batch* happens to share
        would make it depend on who else was drawn, and one example would move the sum by more than its clip norm.
        """
        begins = [prefix.begins_with(example, self._detached) for example in examples]
        groups = [
            ([index for index, found in enumerate(begins) if found is wanted], wanted) for wanted in (True, False)
        ]
        return [(members, len(self._detached) if wanted else 0) for members, wanted in groups if members]

    def mean_gradient(self, examples: Sequence[EncodedExample]) -> tuple[torch.Tensor, NDArray[np.float64]]:
        """The gradient of the examples' mean loss, float32 (num_parameters,), and each one's loss, nats a token.

        The loss is the mean over examples of each one's own mean; without examples the gradient is zero.
        """
        total = torch.zeros(1, self.num_parameters, device=self.base.accelerator)
        losses = np.zeros(len(examples))
        for members, length in self.by_prefix(examples) if examples else []:
            chosen = [examples[index] for index in members]
            rows = torch.zeros(len(chosen), dtype=torch.int64, device=self.base.accelerator)
            losses[members], _ = self.record(chosen, length, Recording(total, rows=rows))
        return total[0] / max(1, len(examples)), losses

    @torch.no_grad()
    def evaluate(self, examples: Sequence[EncodedExample], batch_size: int) -> tuple[float, int]:
        """The summed loss in nats over all targets, and the number of targets. Examples of like length go together."""
        ordered = sorted(examples, key=lambda example: len(example.tokens))
        total, num_targets = 0.0, 0
        for start in range(0, len(ordered), batch_size):
            batch = loss.batch_of(ordered[start : start + batch_size], self.base.accelerator)
            losses = self._target_losses(batch, prefix.shared_length(batch))
            total += float(losses.double().sum())
            num_targets += len(losses)
        return total, num_targets

    @torch.no_grad()
    def mean_losses(self, examples: Sequence[EncodedExample], batch_size: int) -> NDArray[np.float64]:
        """Each example's own mean loss, nats a token, (num_examples,): as `example_gradients` has them."""
        losses = np.zeros(len(examples))
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for members, length in self.by_prefix([examples[index] for index in chosen]):
                batch = loss.batch_of([examples[chosen[index]] for index in members], self.base.accelerator)
                means = batch.mean_of_each(self._target_losses(batch, length))
                losses[[chosen[index] for index in members]] = means.double().cpu().numpy()
        return losses

    def save_peft(self, folder: Path, base_name: str) -> None:
        """Write the adapter as plain `peft.PeftModel.from_pretrained(base, folder)` reads it."""
        tensors = {name: _to_numpy(tensor) for name, tensor in self._tensors.items()}
        adapters.write_adapter(folder, self.shape, tensors, base_name)

    def reply(
        self, messages: Sequence[Mapping[str, str]], sampling: generation.Sampling = generation.GREEDY
    ) -> Iterator[str]:
        """The reply to a conversation, streamed in pieces of whole characters until the model ends its turn.

        Raises ConfigError where the base has no chat template, or the conversation doesn't fit its context.
        """
        return generation.reply(self._causal, self.base.tokenizer, messages, sampling)

    def _target_losses(self, batch: loss.TokenBatch, length: int) -> torch.Tensor:
        """The loss of each target, in nats; the first `length` tokens, alike in all examples, carry no gradient."""
        past = self._prefix.read(batch.tokens[0, :length], len(batch.tokens), self._recorder) if length else None
        with nullcontext() if self._frozen is None else self._frozen.answering(batch, length):
            hidden = self._body(
                input_ids=batch.tokens[:, length:], past_key_values=past, use_cache=False
            ).last_hidden_state
        chosen = hidden[batch.rows, batch.columns - length]
        return loss.target_losses(chosen, batch.targets, self._head, self._chunk_tokens)

    def _draw_frozen(self) -> None:
        """Give every LoRA tensor its first value."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(torch.from_numpy(self._first_value(name, tuple(tensor.shape))))

    def _first_value(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if name.endswith(".lora_B.weight"):
            return np.zeros(shape, np.float32)
        return frozen_draw.kaiming_uniform(self.shape.seed, name, (shape[0], shape[1]))

    def _attach_layers(self) -> None:
        places, place = {}, 0
        for tensor in self._trained.values():
            places[id(tensor)] = place
            place += tensor.numel()
        for layer in self._adapted.layers:
            layer.attach(self._recorder, places.get(id(layer.a)), places.get(id(layer.b)))

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raise ConfigError where logits are more than the head of the hidden states (capped, scaled, biased)."""
        tokens = torch.tensor([[1, 2, 3]], device=self.base.accelerator)
        hidden = self._body(input_ids=tokens, use_cache=False).last_hidden_state
        weight = cast(torch.Tensor, self._head.weight).to(hidden.dtype)
        ours = (hidden @ weight.t()).float()
        theirs = self._causal(input_ids=tokens, use_cache=False).logits.float()
        if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
            raise ConfigError(
                f"{type(self._causal).__name__} changes its logits after the head (a cap, a scale or a bias): "
                "its loss would be wrong here; choose another base"
            )


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().cpu().numpy().copy()
