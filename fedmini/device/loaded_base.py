"""The base model in memory, once for as long as the device runs: for training, and for talking.

Until it is first needed, neither the model nor the libraries that compute with it take memory, or time to import.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedmini.config import BaseSection, TrainingSection
from fedmini.errors import ConfigError, FedMiniError, StateError
from fedmini.model import runtime
from fedmini.types import Adapter, Manifest

if TYPE_CHECKING:
    from fedmini.data import Encoder
    from fedmini.model import loading
    from fedmini.model.lora import LoraModel

TOP_P = 0.9

Messages = Sequence[Mapping[str, str]]


class LoadedBase:
    """A base, loaded when it is first needed. Safe from several threads; a model that it gives is for one."""

    def __init__(self, source: BaseSection, training: TrainingSection, note: Callable[[str], None]) -> None:
        self._source, self._training, self._note = source, training, note
        self.physical_batch_size = training.physical_batch_size
        self._base: loading.Base | None = None
        self._talker: _Talker | None = None
        self._num_forgotten = 0
        self._loading = threading.Lock()
        self._talking = threading.Lock()  # for one piece of a reply at a time: nobody is waited for who stops listening

    def model(self, manifest: Manifest) -> "LoraModel":
        """A model of a run's shape on the base. Raises ConfigError where there is no such base here."""
        from fedmini.model.lora import LoraModel

        base = self._loaded()
        detached = self.encoder(manifest.local.max_length).prefix if manifest.local.detach_prefix else ()
        checkpointing = self._training.checkpointing and not detached
        return LoraModel(base, manifest.lora, checkpointing=checkpointing, detached_prefix=detached)

    def encoder(self, max_length: int) -> "Encoder":
        """What turns this device's examples into tokens: by the base's chat template, where it has one."""
        from fedmini.data import Encoder

        tokenizer = self._loaded().tokenizer
        return Encoder(tokenizer, "chat" if tokenizer.chat_template else "text", max_length)

    def reply(self, spoken: tuple[Manifest, Adapter] | None, messages: Messages, most: int) -> Iterator[str]:
        """The reply to a conversation, in pieces: with a run's adapter, or by the base alone.

        Raises ConfigError where the base can't reply to this, StateError where `forget` was called since this was.
        """
        return self._pieces(spoken, messages, most, self._num_forgotten)

    def _pieces(
        self, spoken: tuple[Manifest, Adapter] | None, messages: Messages, most: int, began: int
    ) -> Iterator[str]:
        pieces: Iterator[str] | None = None
        while True:
            with self._talking:
                self._check_not_forgotten(began)
                talker = self._talker_for(spoken[0] if spoken is not None else None)
                try:
                    talker.use(spoken[1] if spoken is not None else None)
                    pieces = pieces or talker.reply(messages, most)
                    piece = next(pieces, None)
                except FedMiniError:
                    raise
                except Exception as error:  # a chat template is its author's program, and what it says may quote
                    raise ConfigError(f"this base can't reply to that conversation ({type(error).__name__})") from None
                self._check_not_forgotten(began)
            if piece is None:
                return
            yield piece

    def forget(self) -> None:
        """Let go of what was made of an adapter; replies that are being made end. It waits for none of them."""
        self._num_forgotten += 1
        self._talker = None

    def _check_not_forgotten(self, began: int) -> None:
        if self._num_forgotten != began:
            self._talker = None
            raise StateError("this reply has ended: the device was closed, or what it talked with was erased")

    def _talker_for(self, manifest: Manifest | None) -> "_Talker":
        name = manifest.hash if manifest is not None else None
        if self._talker is None or self._talker.name != name:
            self._talker = _Talker(self._loaded(), manifest)
        return self._talker

    def _loaded(self) -> "loading.Base":
        with self._loading:
            if self._base is None:
                runtime.limit_threads(self._training.num_threads)  # before anything else loads torch
                from fedmini.model import loading

                self._base = loading.load_base(self._source, runtime.default_cache_dir(), self._note)
            return self._base


def conversation(prompt: object, max_new_tokens: object) -> Messages:
    """The messages of a prompt or a conversation. Raises ConfigError, which never holds what they say."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ConfigError("max_new_tokens: expected a whole number of at least 1")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not messages or isinstance(messages, bytes):
        raise ConfigError('expected a prompt, or a conversation of {"role": ..., "content": ...}')
    for one in messages:
        if not isinstance(one, Mapping) or not all(isinstance(one.get(key), str) for key in ("role", "content")):
            raise ConfigError('expected a conversation of {"role": ..., "content": ...}, both of them text')
    return list(messages)


class _Talker:
    """What speaks: the base alone, or with LoRA. The modules are its own, as a reply changes them; the weights are shared."""

    def __init__(self, base: "loading.Base", manifest: Manifest | None) -> None:
        from fedmini.model.lora import LoraModel

        self.name = manifest.hash if manifest is not None else None
        self._base = base
        self._adapter: Adapter | None = None
        self._model = LoraModel(base, manifest.lora) if manifest is not None else None
        shared = {id(tensor): tensor for tensor in (*base.module.parameters(), *base.module.buffers())}
        self._bare = copy.deepcopy(base.module, shared) if manifest is None else None

    def use(self, adapter: Adapter | None) -> None:
        """Speak with this adapter from now on."""
        if self._model is not None and adapter is not None and self._adapter is not adapter:
            self._model.set_adapter(adapter)
            self._adapter = adapter

    def reply(self, messages: Messages, most: int) -> Iterator[str]:
        from fedmini.model import generation

        sampling = generation.Sampling(most, temperature=0.7, top_p=TOP_P, hold_dense=True)
        if self._model is not None:
            return self._model.reply(messages, sampling)
        assert self._bare is not None
        return generation.reply(self._bare, self._base.tokenizer, messages, sampling)
