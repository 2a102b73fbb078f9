"""The layers below the lowest adapted one: what they say of an example never changes, so it is computed once and kept."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fedmini.model import llama, native
from fedmini.model.adaptation import Causal
from fedmini.model.gradients import LoraLayer
from fedmini.model.loading import Base
from fedmini.model.loss import TokenBatch
from fedmini.types import EncodedExample

CLOSE = 0.02  # of the largest number: what bfloat16 may round away


class KeptStates(Protocol):
    """Where hidden states are kept, each by the name of what it is about."""

    def read(self, name: bytes) -> bytes | None:
        """What was kept under this name; None where nothing is, or what is there was altered."""

    def keep(self, name: bytes, content: bytes) -> None:
        """Keep it, if there is room."""

    def keep_only(self, names: set[bytes]) -> None:
        """Let go of all others."""


class StatesInMemory:
    """Up to so many bytes in this process. What came first stays: of a set drawn at random, no part is better to keep."""

    def __init__(self, max_bytes: int) -> None:
        self._left, self._held = max_bytes, dict[bytes, bytes]()

    def read(self, name: bytes) -> bytes | None:
        return self._held.get(name)

    def keep(self, name: bytes, content: bytes) -> None:
        if name not in self._held and len(content) <= self._left:
            self._held[name] = content
            self._left -= len(content)

    def keep_only(self, names: set[bytes]) -> None:
        for name in set(self._held) - names:
            self._left += len(self._held.pop(name))


class FrozenLayers:
    """A model's layers below the lowest that carries LoRA. Where there is none, or the model is not built so, it does nothing.

    Guarantee: what an example's kept state is, is decided by that example's own tokens and the frozen base alone. It is
    computed from the example by itself, so it differs from that of a batch by float rounding, and in float32 mostly by none.
    """

    def __init__(self, causal: Causal, base: Base, kept: KeptStates) -> None:
        self._model: Any = causal.base_model
        self._kept = kept
        self._layers, self._num_lower = _decoder_layers(causal)
        self._dtype, self._accelerator = base.compute_dtype, base.accelerator
        about = f"{base.weights_digest} {base.weights} {type(causal).__name__} {self._dtype} {self._num_lower}"
        self._context = hashlib.sha256(f"{about} {_programs(causal)}".encode()).digest()
        if self._num_lower and not self._agrees():
            self._num_lower = 0

    @property
    def num_layers(self) -> int:
        """How many layers are not computed again; 0: none."""
        return self._num_lower

    def keep_only(self, examples: Sequence[EncodedExample]) -> None:
        """Let go of what is kept of any other example."""
        cut = (example.tokens[: int(np.flatnonzero(example.is_target)[-1])] for example in examples)
        self._kept.keep_only({self._name(tokens) for tokens in cut})

    @contextmanager
    def answering(self, batch: TokenBatch, first: int) -> Iterator[None]:
        """Inside, the model answers `batch` from position `first` on without computing these layers again."""
        if not self._num_lower:
            yield
            return
        with self._saying(self._states(batch)[:, first:]):
            yield

    def _states(self, batch: TokenBatch) -> torch.Tensor:
        """What the layers say of each example, (num_examples, length, hidden size); zeros behind its end."""
        rows, columns, tokens = batch.rows.tolist(), batch.columns.tolist(), batch.tokens
        lengths = [0] * len(tokens)
        for row, column in zip(rows, columns, strict=True):
            lengths[row] = max(lengths[row], column + 1)
        found = [self._state(tokens[row, :length]) for row, length in enumerate(lengths)]
        return nn.utils.rnn.pad_sequence([*found], batch_first=True)

    def _state(self, tokens: torch.Tensor) -> torch.Tensor:
        """(length,) -> (length, hidden size), read or computed."""
        name = self._name(tokens.cpu().numpy())
        content = self._kept.read(name)
        if content is not None:
            return self._from_bytes(content, len(tokens))
        state = self._computed(tokens)
        self._kept.keep(name, _to_bytes(state))
        return state

    def _name(self, tokens: np.ndarray[Any, Any]) -> bytes:
        return hashlib.sha256(self._context + np.ascontiguousarray(tokens, np.int32).tobytes()).digest()

    def _from_bytes(self, content: bytes, length: int) -> torch.Tensor:
        flat = torch.frombuffer(bytearray(content), dtype=self._dtype)
        return flat.view(length, -1).to(self._accelerator)

    @torch.no_grad()
    def _computed(self, tokens: torch.Tensor) -> torch.Tensor:
        """By the layers themselves, from this example alone; those above are passed by."""
        heard: list[torch.Tensor] = []
        last = self._layers[self._num_lower - 1]
        listening = last.register_forward_hook(lambda layer, inputs, output: heard.append(output))
        try:
            with _each_answers(self._layers[self._num_lower :], _what_it_is_given):
                self._model(input_ids=tokens[None], use_cache=False)
        finally:
            listening.remove()
        return heard[0][0].detach()

    @contextmanager
    def _saying(self, states: torch.Tensor) -> Iterator[None]:
        *lower, last = self._layers[: self._num_lower]
        with _each_answers(lower, _what_it_is_given), _each_answers([last], lambda *inputs, **named: states):
            yield

    def _agrees(self) -> bool:
        """Whether the model answers the same with these layers passed by: some could look at more than the layer below."""
        tokens = torch.arange(1, 6, device=self._accelerator)
        try:
            with torch.no_grad():
                plain = self._model(input_ids=tokens[None], use_cache=False).last_hidden_state
                state = self._computed(tokens)
                if state.shape[:1] != tokens.shape or state.dtype != self._dtype:
                    return False
                with self._saying(state[None]):
                    again = self._model(input_ids=tokens[None], use_cache=False).last_hidden_state
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError):  # layers that answer in another form
            return False
        return torch.allclose(plain, again, rtol=CLOSE, atol=CLOSE * float(plain.abs().max()))


def _programs(causal: Causal) -> str:
    """Whose versions decide what layers say, digit by digit."""
    if isinstance(causal, llama.Llama):
        kernel = native.current()
        return f"torch {torch.__version__} llama {llama.REVISION} {kernel and kernel.revision}"
    import transformers

    return f"torch {torch.__version__} transformers {transformers.__version__}"


def _decoder_layers(causal: Causal) -> tuple[list[nn.Module], int]:
    """The model's numbered layers, and how many of them lie below the lowest adapted one."""
    places = [name.split(".") for name, part in causal.named_modules() if isinstance(part, LoraLayer)]
    numbered = [next(at for at, piece in enumerate(place) if piece.isdecimal()) for place in places]
    stacks = {tuple(place[:at]) for place, at in zip(places, numbered, strict=True)}
    if len(stacks) != 1:
        return [], 0
    stack = causal.get_submodule(".".join(stacks.pop()))
    if not isinstance(stack, nn.ModuleList):
        return [], 0
    return list(stack), min(int(place[at]) for place, at in zip(places, numbered, strict=True))


@contextmanager
def _each_answers(layers: Sequence[nn.Module], answer: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, the layers answer so, and compute nothing. Not for a layer that is recomputed in backward."""
    with ExitStack() as stack:
        for layer in layers:
            layer.forward = answer
            stack.callback(delattr, layer, "forward")
        yield


def _what_it_is_given(*inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    return inputs[0] if inputs else named["hidden_states"]


def _to_bytes(state: torch.Tensor) -> bytes:
    return state.contiguous().cpu().view(torch.uint8).numpy().tobytes()
