"""The base model in memory, once for as long as the device runs: for training, and for talking."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedmini.config import BaseSection, TrainingSection
from fedmini.data import Encoder
from fedmini.model import generation, loading, runtime
from fedmini.model.lora import LoraModel
from fedmini.types import Adapter, Manifest

TOP_P = 0.9


class LoadedBase:
    """A base, loaded when it is first needed. Safe from several threads; a model that it gives is for one."""

    def __init__(self, source: BaseSection, training: TrainingSection, note: Callable[[str], None]) -> None:
        self._source, self._training, self._note = source, training, note
        self.physical_batch_size = training.physical_batch_size
        self._base: loading.Base | None = None
        self._talker: tuple[str, LoraModel] | None = None
        self._loading = threading.Lock()
        self._talking = threading.Lock()

    def model(self, manifest: Manifest) -> LoraModel:
        """A model of a run's shape on the base. Raises ConfigError where there is no such base here."""
        base = self._loaded()
        detached = self.encoder(manifest.local.max_length).prefix if manifest.local.detach_prefix else ()
        return LoraModel(base, manifest.lora, detached_prefix=detached)

    def encoder(self, max_length: int) -> Encoder:
        """What turns this device's examples into tokens: by the base's chat template, where it has one."""
        tokenizer = self._loaded().tokenizer
        return Encoder(tokenizer, "chat" if tokenizer.chat_template else "text", max_length)

    def reply(
        self, manifest: Manifest | None, adapter: Adapter | None, messages: Sequence[Mapping[str, str]], most: int
    ) -> Iterator[str]:
        """The reply to a conversation, in pieces: with an adapter of a run's, or by the base alone. One at a time."""
        with self._talking:
            base = self._loaded()
            if manifest is None or adapter is None:
                yield from generation.reply(base.module, base.tokenizer, messages, _sampling(most))
                return
            if self._talker is None or self._talker[0] != manifest.hash:
                self._talker = (manifest.hash, LoraModel(base, manifest.lora))
            model = self._talker[1]
            model.set_adapter(adapter)
            yield from model.reply(messages, _sampling(most))

    def forget(self) -> None:
        """Let go of what was made of an adapter."""
        with self._talking:
            self._talker = None

    def _loaded(self) -> loading.Base:
        with self._loading:
            if self._base is None:
                runtime.limit_threads(self._training.num_threads)
                self._base = loading.load_base(self._source, runtime.default_cache_dir(), self._note)
            return self._base


def _sampling(max_new_tokens: int) -> generation.Sampling:
    return generation.Sampling(max_new_tokens, temperature=0.7, top_p=TOP_P, hold_dense=True)
