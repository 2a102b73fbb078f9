"""What simulated devices cost: many together on the packed base, against one after the other in bare torch and PEFT.

Every function gives CPU seconds for each device and round, alternating both sides in one process.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from fedmini import planning
from fedmini.config import RunConfig, parse_run_config
from fedmini.contributor import Contributor, sum_together
from fedmini.model import native, packed_base, runtime
from fedmini.model.llama_parts import LlamaConfig as OurConfig
from fedmini.model.loading import Base, load_base
from fedmini.model.lora import LoraModel
from fedmini.privacy.noise import RandomStream
from fedmini.types import EncodedExample, TrainTask

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Workload:
    """Devices that each take `num_steps` plain steps on batches of `batch_size` examples, clipped as a whole.

    The server adds the noise.
    """

    num_devices: int = 16
    num_steps: int = 1
    batch_size: int = 2
    num_tokens: int = 32
    learning_rate: float = 0.1
    lora_rank: int = 8
    lora_alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    clip_norm: float = 0.5


PEERS_LORA = Workload(num_devices=10, num_steps=4, batch_size=4, num_tokens=64)
"""`lora` of the peers' workloads: four layers of 128, 260 words, a batch of 4 in each of 4 steps, device-level clipping."""
PEERS_MODEL = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def smollm2(cache_dir: Path, workload: Workload, repeats: int, ways: Sequence[str]) -> dict[str, list[float]]:
    """SmolLM2-135M in bfloat16: packed for fedmini, dense for bare torch. CPU seconds a device and round, by way.

    Ways: "bare" (dense, PEFT, one after the other), "alone" (fedmini's devices one after the other), "together".
    """
    config = config_of(workload, {"name": "smollm2-135m-q4", "compute_dtype": "bfloat16"})
    base = load_base(config.base, cache_dir, print)
    return measure(_ways(base, dense_copy(base), config, workload), repeats, ways, workload.num_devices)


def peers_lora(repeats: int, ways: Sequence[str], compute_dtype: torch.dtype) -> dict[str, list[float]]:
    """The peers' small Llama with random weights, in float32 for bare torch as all of them have it.

    `compute_dtype` is fedmini's: what `base.compute_dtype = "auto"` chooses on a machine, or float32.
    """
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**PEERS_MODEL, use_cache=False))
    config = config_of(PEERS_LORA, {"path": "none.gguf", "compute_dtype": "float32"})
    native.prepare(runtime.default_cache_dir(), print)
    work = _ways(peers_base(module, compute_dtype), module, config, PEERS_LORA)
    return measure(work, repeats, ways, PEERS_LORA.num_devices)


def peers_base(module: LlamaForCausalLM, compute_dtype: torch.dtype) -> Base:
    """A copy of the peers' Llama as a base of fedmini's."""
    settings = module.config.to_dict()
    config = {field.name: settings.get(field.name) for field in fields(OurConfig)}
    config["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    weights = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    device = torch.device("cpu")
    return Base(
        module=packed_base.build_module(config, weights, compute_dtype, device),
        tokenizer=ByT5Tokenizer(),  # a base has one; these examples are tokens already
        weights_digest="0" * 64,
        compute_dtype=compute_dtype,
        accelerator=device,
        weights="packed",
    )


def measure(work: Mapping[str, Work], repeats: int, ways: Sequence[str], num_devices: int) -> dict[str, list[float]]:
    """CPU seconds of each way, for each device, in turn in every round, after one that warms up."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way in ways:
            started = time.process_time()
            work[way]()
            found[way].append((time.process_time() - started) / num_devices)
    return {way: seconds[1:] for way, seconds in found.items()}


def config_of(workload: Workload, base: Mapping[str, Any]) -> RunConfig:
    """A run of such devices, all of whom are asked in each round."""
    size = workload.num_steps * workload.batch_size
    protected = {"clip_norm": workload.clip_norm, "noise_multiplier": 0.5, "target_delta": 1e-5, "noise": "server"}
    return parse_run_config(
        {
            "run": {"name": "cohort", "seed": 1},
            "base": dict(base),
            "lora": {
                "lora_rank": workload.lora_rank,
                "lora_alpha": workload.lora_alpha,
                "target_modules": workload.target_modules,
                "trained": "AB",
            },
            "data": {"source": "in memory", "max_examples_per_device": size, "held_out_devices": 1},
            "local": {
                "sampling_rate": 1.0 / workload.num_steps,
                "num_steps": workload.num_steps,
                "learning_rate": workload.learning_rate,
                "max_length": workload.num_tokens,
                "physical_batch_size": 16,
            },
            "rounds": {"num_rounds": 10, "cohort_size": workload.num_devices},
            "privacy": {"device": protected},
        }
    )


def _ways(base: Base, dense: LlamaForCausalLM, config: RunConfig, workload: Workload) -> dict[str, Work]:
    tokens = _tokens(base, workload)
    bare = BareLoop(dense, config, torch.from_numpy(tokens), workload)
    return {"bare": bare.round, **fedminis_ways(base, config, workload)}


def _tokens(base: Base, workload: Workload) -> NDArray[np.int64]:
    """Every device's examples, (num_devices, size, num_tokens)."""
    size = workload.num_steps * workload.batch_size
    shape = (workload.num_devices, size, workload.num_tokens)
    return np.random.default_rng(0).integers(0, base.module.config.vocab_size, shape)


def fedminis_ways(base: Base, config: RunConfig, workload: Workload) -> dict[str, Work]:
    """A round of all devices: "alone", one after the other, and "together"."""
    is_target = np.arange(workload.num_tokens) > 0
    model = LoraModel(base, planning.lora_shape(config))
    manifest = planning.make_manifest(config, "run", planning.Base(model.fingerprint, model.template), None)
    devices = [
        Contributor(
            str(index),
            [EncodedExample(row.astype(np.int32), is_target) for row in own],
            model,
            manifest,
            partial(_InTurn, workload.batch_size),
            config.local.physical_batch_size,
        )
        for index, own in enumerate(_tokens(base, workload))
    ]
    task = TrainTask(manifest.hash, 1, 0, model.initial_adapter())
    return {
        "alone": lambda: [sum_together([device], task) for device in devices],
        "together": partial(sum_together, devices, task),
    }


class _InTurn(RandomStream):
    """A seeded stream, but that a step's batch is the next examples in turn, as the peers' loops take them."""

    def __init__(self, batch_size: int, *purpose: str | int) -> None:
        stream = RandomStream.seeded(1, *purpose)
        self._key_stream, self.is_seeded = stream._key_stream, True
        self._batch_size, self._step = batch_size, purpose[-1]

    def poisson_sample(self, population_size: int, sampling_rate: float) -> Any:
        assert isinstance(self._step, int)
        return np.arange(self._batch_size) + self._batch_size * self._step


class BareLoop:
    """One device after the other: PEFT on a dense base, transformers' own loss, SGD, a clipped change, one sum."""

    def __init__(self, dense: LlamaForCausalLM, config: RunConfig, tokens: torch.Tensor, workload: Workload) -> None:
        torch.manual_seed(0)
        self._model = get_peft_model(
            dense,
            LoraConfig(
                r=workload.lora_rank,
                lora_alpha=workload.lora_alpha,
                target_modules=list(workload.target_modules),
                lora_dropout=0.0,
                task_type="CAUSAL_LM",
            ),
        ).train()
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._tokens, self._workload = tokens, workload

    def round(self) -> list[torch.Tensor]:
        """The clipped changes' sum and noise on it; the adapter is where it was before."""
        workload, parameters = self._workload, self._parameters
        first = [parameter.detach().clone() for parameter in parameters]
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for own in self._tokens:
            self._put(first)
            optimizer = torch.optim.SGD(parameters, lr=workload.learning_rate)
            for batch in own.split(workload.batch_size):
                optimizer.zero_grad(set_to_none=True)
                self._model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
            with torch.no_grad():
                changes = [parameter - before for parameter, before in zip(parameters, first, strict=True)]
                norm = torch.sqrt(sum(change.square().sum() for change in changes))
                factor = min(1.0, workload.clip_norm / (float(norm) + 1e-12))
                for total, change in zip(sums, changes, strict=True):
                    total.add_(change, alpha=factor)
        self._put(first)
        return [total + torch.randn_like(total) * 0.5 * workload.clip_norm for total in sums]

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


def dense_copy(base: Base) -> LlamaForCausalLM:
    """The same weights in the same type, as transformers loads a Llama: its own layers and its default attention."""
    settings = base.module.config.to_dict() | {"use_cache": False, "dtype": base.compute_dtype}
    module = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    weights = {}
    for name, part in base.module.named_modules():
        packed = getattr(part, "packed", None)
        if packed is not None:
            weights[f"{name}.weight"] = packed_base.dequantized(packed).to(base.compute_dtype).clone()
    for name, parameter in base.module.named_parameters():
        weights[name] = parameter.detach()
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return module.to(base.compute_dtype)
