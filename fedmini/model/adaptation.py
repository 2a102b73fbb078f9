"""LoRA put on a base, and refused by name where its gradients would be silently wrong."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Union, cast

import torch
from torch import nn

from fedmini.errors import ConfigError
from fedmini.model.gradients import LoraLayer, LoraLinear
from fedmini.model.llama import Llama
from fedmini.types import LoraShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Causal = Union[Llama, "PreTrainedModel"]  # what answers with logits: our own for a packed base, else transformers'
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapted:
    """A base that carries LoRA."""

    module: nn.Module  # answers as the base does, with LoRA
    causal: Causal  # the same, as the base's own class
    tensors: Mapping[str, nn.Parameter]  # LoRA's, by their names in adapter_model.safetensors, sorted

    @property
    def layers(self) -> Iterable[LoraLayer]:
        """The adapted layers, in the order of the model."""
        return [part for part in self.module.modules() if isinstance(part, LoraLayer)]


def adapt(module: Causal, shape: LoraShape) -> Adapted:
    """LoRA on `module`, which stays as it was: the tree is copied, its tensors are shared.

    LoRA tensors are float32 on the device of the layer they adapt. Raises ConfigError for a target that is unknown,
    an embedding, the head or shared, for layers out of range, and where nothing would be adapted.
    """
    targets = check_shape(module, shape)
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    with torch.random.fork_rng(devices=[]):
        if isinstance(module, Llama):
            adapted = _adapt_ours(module, shape, targets, shared)
        else:
            adapted = _adapt_through_peft(module, shape, shared)
    for layer in adapted.layers:
        accelerator = next(chain(layer.frozen.parameters(), layer.frozen.buffers())).device
        layer.lora_A.to(accelerator, torch.float32)
        layer.lora_B.to(accelerator, torch.float32)
        layer.lora_A.requires_grad_(shape.trained == "AB")
        layer.lora_B.requires_grad_(True)
    adapted.module.eval()
    return adapted


def _adapt_ours(llama: Llama, shape: LoraShape, targets: Iterable[str], shared: dict[int, torch.Tensor]) -> Adapted:
    copied = copy.deepcopy(llama, shared)
    for name in targets:
        linear = copied.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        copied.set_submodule(name, LoraLinear(linear, shape.lora_rank, shape.lora_alpha / shape.lora_rank))
    tensors = {_PEFT_PREFIX + name: tensor for name, tensor in copied.named_parameters() if ".lora_" in name}
    return Adapted(copied, copied, dict(sorted(tensors.items())))


def _adapt_through_peft(module: "PreTrainedModel", shape: LoraShape, shared: dict[int, torch.Tensor]) -> Adapted:
    from fedmini.model import peft_layers  # PEFT and transformers take seconds to import

    model = peft_layers.adapt(module, shape, shared)
    named = {peft_layers.name_in_file(name): tensor for name, tensor in model.named_parameters()}
    tensors = {name: named[name] for name in sorted(named) if ".lora_" in name}
    return Adapted(model, cast("PreTrainedModel", model.get_base_model()), tensors)


def check_shape(module: Causal, shape: LoraShape) -> list[str]:
    """The layers that a shape adapts, by name.

    Raises ConfigError, naming what is wrong, unless every target is a plain linear layer of a decoder layer.
    """
    if any(isinstance(layer, LoraLayer) for layer in module.modules()):
        raise ConfigError("this base already carries LoRA: give the bare base")
    linears = _linears_in_layers(module)
    known = sorted({name.rsplit(".", 1)[1] for _, name in linears})
    outside = {name.rsplit(".", 1)[-1] for name, part in module.named_modules() if _is_embedding_or_head(module, part)}
    for target in shape.target_modules:
        if target in outside:
            raise ConfigError(
                f"lora.target_modules: {target} is an embedding or the head, for which per-example gradients would be "
                f"silently wrong; choose from {', '.join(known)}"
            )
        if target not in known:
            raise ConfigError(f"lora.target_modules: unknown module {target!r}; this base has {', '.join(known)}")
    num_layers = 1 + max(layer for layer, _ in linears)
    for layer_index in shape.layers or ():
        if not 0 <= layer_index < num_layers:
            raise ConfigError(f"lora.layers: {layer_index} is out of range; this base has layers 0 to {num_layers - 1}")
    layers = range(num_layers) if shape.layers is None else shape.layers
    chosen = [name for layer, name in linears if layer in layers and name.rsplit(".", 1)[1] in shape.target_modules]
    if not chosen:
        raise ConfigError("lora: no layer would be adapted; name at least one layer and one target module")
    _refuse_shared(module, chosen)
    return chosen


def _linears_in_layers(module: Causal) -> list[tuple[int, str]]:
    """(layer index, full name) of each linear module inside a numbered decoder layer."""
    found = []
    for name, part in module.named_modules(remove_duplicate=False):
        numbers = [int(piece) for piece in name.split(".") if piece.isdecimal()]
        if isinstance(part, nn.Linear) and numbers:
            found.append((numbers[0], name))
    if not found:
        raise ConfigError(f"{type(module).__name__} has no linear modules in numbered layers: LoRA can't be put on it")
    return found


def _is_embedding_or_head(module: Causal, part: nn.Module) -> bool:
    return isinstance(part, nn.Embedding) or part is module.get_output_embeddings()


def _refuse_shared(module: Causal, chosen: list[str]) -> None:
    owners: dict[int, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if not isinstance(part, nn.Linear | nn.Embedding):
            continue
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            first = owners.setdefault(id(tensor), name)
            if first != name and (name in chosen or first in chosen):
                raise ConfigError(
                    f"lora.target_modules: {name} shares its weight with {first}; tied modules are refused"
                )
