"""The devices of a simulation and the model that they share, as this process or a worker loads them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fedmini import data, planning
from fedmini.config import RunConfig
from fedmini.contributor import Contributor
from fedmini.model import loading
from fedmini.model.frozen_layers import StatesInMemory
from fedmini.model.lora import LoraModel
from fedmini.privacy.noise import RandomStream, Streams
from fedmini.types import DeviceId, EncodedExample, Manifest


def load_model(config: RunConfig, cache_dir: Path, note: Callable[[str], None]) -> tuple[LoraModel, data.Encoder]:
    """The base with the run's LoRA tensors on it, and what turns text into its tokens. Raises ConfigError."""
    base = loading.load_base(config.base, cache_dir, note)
    encoder = data.Encoder(base.tokenizer, config.data.template, config.local.max_length)
    model = LoraModel(
        base,
        planning.lora_shape(config),
        checkpointing=config.local.checkpointing,
        loss_chunk_tokens=config.local.loss_chunk_tokens,
        detached_prefix=encoder.prefix if config.local.detach_prefix else (),
    )
    if config.simulation.max_hidden_bytes:
        model.keep_states(StatesInMemory(config.simulation.max_hidden_bytes))
    return model, encoder


def contributors(
    examples: Mapping[DeviceId, Sequence[EncodedExample]],
    model: LoraModel,
    manifest: Manifest | None,
    streams: Streams,
    config: RunConfig,
) -> dict[DeviceId, Contributor]:
    """Each device, going by the run's manifest or that of its evaluations; none where there is no manifest."""
    if manifest is None:
        return {}
    size = config.local.physical_batch_size
    return {name: Contributor(name, found, model, manifest, streams, size) for name, found in examples.items()}


def streams_of(seed: int | None) -> Streams:
    """A fresh stream from the operating system for every purpose; with a seed, the same one for the same purpose."""
    return (lambda *purpose: RandomStream.from_os()) if seed is None else partial(RandomStream.seeded, seed)
