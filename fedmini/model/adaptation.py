"""LoRA put on a base through PEFT, and refused by name where its gradients would be silently wrong."""

import copy
import warnings
from collections.abc import Iterable
from itertools import chain

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fedmini.errors import ConfigError
from fedmini.model import packed_layers
from fedmini.model.gradients import RecordingLinear
from fedmini.types import LoraShape

_ADAPTER = "default"


def adapt(module: PreTrainedModel, shape: LoraShape) -> PeftModel:
    """A PEFT model over `module`, which stays as it was: the tree is copied, its tensors are shared.

    LoRA tensors are float32 on the device of the layer they adapt. Raises ConfigError for a target that is unknown,
    an embedding, the head or shared, for layers out of range, and where nothing would be adapted.
    """
    check_shape(module, shape)
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    config = lora_config(shape)
    config._register_custom_module({nn.Linear: RecordingLinear})
    with torch.random.fork_rng(devices=[]), packed_layers.only_described(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(module, shared), config, adapter_name=_ADAPTER)
    for layer in lora_layers(adapted):
        accelerator = next(chain(layer.base_layer.parameters(), layer.base_layer.buffers())).device
        layer.lora_A.to(accelerator, torch.float32)
        layer.lora_B.to(accelerator, torch.float32)
        layer.lora_A.requires_grad_(shape.trained == "AB")
        layer.lora_B.requires_grad_(True)
    return adapted.eval()


def lora_config(shape: LoraShape) -> LoraConfig:
    """PEFT's description of a shape."""
    return LoraConfig(
        r=shape.lora_rank,
        lora_alpha=shape.lora_alpha,  # type: ignore[arg-type]
        target_modules=sorted(shape.target_modules),
        layers_to_transform=None if shape.layers is None else sorted(shape.layers),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def lora_layers(adapted: PeftModel) -> Iterable[RecordingLinear]:
    """The adapted layers, in the order of the model."""
    return [module for module in adapted.modules() if isinstance(module, RecordingLinear)]


def peft_name(parameter_name: str) -> str:
    """A LoRA parameter's name as it stands in adapter_model.safetensors."""
    return parameter_name.replace(f".{_ADAPTER}.", ".")


def check_shape(module: PreTrainedModel, shape: LoraShape) -> None:
    """Raise ConfigError, naming what is wrong, unless every target is a plain linear layer of a decoder layer."""
    if any(isinstance(layer, RecordingLinear) for layer in module.modules()):
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


def _linears_in_layers(module: PreTrainedModel) -> list[tuple[int, str]]:
    """(layer index, full name) of each linear module inside a numbered decoder layer."""
    found = []
    for name, part in module.named_modules(remove_duplicate=False):
        numbers = [int(piece) for piece in name.split(".") if piece.isdecimal()]
        if isinstance(part, nn.Linear) and numbers:
            found.append((numbers[0], name))
    if not found:
        raise ConfigError(f"{type(module).__name__} has no linear modules in numbered layers: LoRA can't be put on it")
    return found


def _is_embedding_or_head(module: PreTrainedModel, part: nn.Module) -> bool:
    return isinstance(part, nn.Embedding) or part is module.get_output_embeddings()  # type: ignore[no-untyped-call]


def _refuse_shared(module: PreTrainedModel, chosen: list[str]) -> None:
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
