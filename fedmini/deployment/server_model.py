"""The base model on the server, loaded when it is first needed: to evaluate on a public file, and to write the adapter."""

from functools import cached_property
from pathlib import Path

import numpy as np

from fedmini import data
from fedmini.config import RunConfig
from fedmini.errors import ConfigError, ModelMismatchError
from fedmini.events import Emit
from fedmini.model import frozen_draw, loading, runtime
from fedmini.model.lora import LoraModel
from fedmini.types import Adapter, EncodedExample, Manifest

HELD_OUT = "held_out"  # of a simulation: on a server there is nobody to hold out


def initial_adapter(manifest: Manifest) -> Adapter:
    """Where training starts: B is zero; a trained A is drawn from the shape's seed. Needs no base."""
    return {
        name: np.zeros(shape, np.float32)
        if name.endswith(".lora_B.weight")
        else frozen_draw.kaiming_uniform(manifest.lora.seed, name, (shape[0], shape[1]))
        for name, shape in manifest.template
    }


class ServerModel:
    """What a server does with the base. Raises ModelMismatchError where the base here is not the run's."""

    def __init__(self, config: RunConfig, manifest: Manifest, emit: Emit) -> None:
        self._config, self._manifest, self._emit = config, manifest, emit

    @property
    def evaluates(self) -> bool:
        """Whether there is a public file to evaluate on."""
        return self._config.evaluation.source != HELD_OUT

    def loss(self, adapter: Adapter) -> float:
        """Nats a token on the public file."""
        self._model.set_adapter(adapter)
        nats, targets = self._model.evaluate(self._examples, self._config.local.physical_batch_size)
        return nats / targets

    def write(self, folder: Path, adapter: Adapter) -> None:
        """Write the adapter as plain PEFT."""
        self._model.set_adapter(adapter)
        base = self._config.base
        self._model.save_peft(folder, base.hub_id or base.name or str(base.path))

    @cached_property
    def _model(self) -> LoraModel:
        runtime.limit_threads(self._config.simulation.num_threads)
        note = self._emit
        base = loading.load_base(
            self._config.base, runtime.default_cache_dir(), lambda text: note("base.note", note=text)
        )
        model = LoraModel(base, self._manifest.lora)
        if model.fingerprint != self._manifest.base_fingerprint:
            raise ModelMismatchError(
                f"this server's base is {model.fingerprint[:12]}, the run's is {self._manifest.base_fingerprint[:12]}: "
                "install the base that the run was planned with"
            )
        return model

    @cached_property
    def _examples(self) -> tuple[EncodedExample, ...]:
        config = self._config
        encoder = data.Encoder(self._model.base.tokenizer, config.data.template, config.local.max_length)
        examples = data.load_evaluation(config.evaluation.source)[: config.evaluation.max_examples]
        encoded = encoder.encode_all(examples)
        if not encoded:
            raise ConfigError(
                f"there is no example to evaluate on in {config.evaluation.source}: in none of them a target fits "
                "local.max_length"
            )
        return encoded
