"""A base from the configuration: packaged, a GGUF file, a transformers folder or a hub id."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fedmini.config import BaseSection
from fedmini.errors import ConfigError
from fedmini.model import cache, compute, native, packaged, packed_base
from fedmini.model.adaptation import Causal
from fedmini.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen causal language model, ready to carry LoRA, and what identifies it."""

    module: Causal  # eval mode, no parameter requires a gradient
    tokenizer: Tokenizer
    weights_digest: str  # SHA-256 over the published weights in float32, however they are held
    compute_dtype: torch.dtype
    accelerator: torch.device
    weights: Literal["packed", "nf4", "int8", "dense"]

    @property
    def size_bytes(self) -> int:
        """Memory of the weights as they are held; what is shared counts once."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def load_base(source: BaseSection, cache_dir: Path, note: Callable[[str], None]) -> Base:
    """Load a base; the first time a GGUF is repacked into `cache_dir`, which takes seconds.

    `note` hears what a user should know: a rebuilt cache, a dense base. Raises ConfigError, in one line.
    """
    accelerator = compute.choose_accelerator(source.accelerator)
    compute_dtype = compute.choose_compute_dtype(source.compute_dtype, accelerator)
    gguf = _gguf_of(source, cache_dir)
    if gguf is None:
        with _quiet_transformers():
            return _load_folder(source, (compute_dtype, accelerator), cache_dir, note)
    if source.weights not in ("auto", "packed"):
        raise ConfigError(f'a GGUF stays packed: base.weights must be "auto" or "packed", got "{source.weights}"')
    path, digest = gguf
    if accelerator.type == "cpu":
        native.prepare(cache_dir, note)
    cached = cache.open_or_build(cache_dir, digest, partial(_repack, path), note)
    return Base(
        module=packed_base.load_module(cached, compute_dtype, accelerator),
        tokenizer=packed_base.load_tokenizer(cached),
        weights_digest=str(cached.facts["weights_digest"]),
        compute_dtype=compute_dtype,
        accelerator=accelerator,
        weights="packed",
    )


def _repack(path: Path, folder: Path) -> Mapping[str, Any]:
    with _quiet_transformers():
        return packed_base.repack(path, folder)


def _gguf_of(source: BaseSection, cache_dir: Path) -> tuple[Path, str] | None:
    """The GGUF file that `source` means, and its SHA-256; None where it means a folder or a hub id."""
    if source.name is not None:
        base, path = packaged.find(source.name)
        digest = cache.source_digest(path, cache_dir)
        packaged.check_digest(base, path, digest)
        return path, digest
    if source.path is None or source.path.is_dir():
        return None
    if not source.path.exists():
        raise ConfigError(f"base.path: there is nothing at {source.path}")
    if source.path.suffix.lower() != ".gguf":
        raise ConfigError(f"base.path: {source.path} is neither a .gguf file nor a transformers folder")
    return source.path, cache.source_digest(source.path, cache_dir)


def _load_folder(
    source: BaseSection, where: tuple[torch.dtype, torch.device], cache_dir: Path, note: Callable[[str], None]
) -> Base:
    from fedmini.model import pretrained  # transformers takes seconds to import

    compute_dtype, accelerator = where
    folder = source.path if source.path is not None else pretrained.download(str(source.hub_id))
    files = pretrained.check_folder(folder)
    weights = pretrained.choose_weights(source.weights, folder, accelerator, note)
    if weights == "nf4" and accelerator.type == "cpu":
        native.prepare(cache_dir, note)
    return Base(
        module=pretrained.load_module(folder, weights, compute_dtype, accelerator),
        tokenizer=pretrained.load_tokenizer(folder),
        weights_digest=pretrained.weights_digest(files, cache_dir),
        compute_dtype=compute_dtype,
        accelerator=accelerator,
        weights=weights,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    import transformers

    verbosity = transformers.logging.get_verbosity()
    had_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if had_bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
