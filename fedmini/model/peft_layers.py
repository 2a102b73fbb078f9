"""LoRA through PEFT, for the bases that transformers loads: PEFT's own layer, with a backward that records."""

import copy
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from fedmini.model import adapters, packed_layers
from fedmini.model.gradients import LoraLayer
from fedmini.types import LoraShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"


class RecordingLinear(LoraLayer, Linear):
    """PEFT's LoRA layer, recording."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (recorded := self.recorded(x)) is not None:
            return recorded
        plain: torch.Tensor = super().forward(x, *args, **kwargs)
        return plain

    @property
    def frozen(self) -> nn.Module:
        return self.base_layer

    @property
    def a(self) -> nn.Parameter:
        return cast(nn.Parameter, self.lora_A[self.active_adapters[0]].weight)

    @property
    def b(self) -> nn.Parameter:
        return cast(nn.Parameter, self.lora_B[self.active_adapters[0]].weight)

    @property
    def factor(self) -> float:
        return float(self.scaling[self.active_adapters[0]])


def adapt(module: "PreTrainedModel", shape: LoraShape, shared: dict[int, Any]) -> PeftModel:
    """A PEFT model over a copy of `module`, whose tensors are shared."""
    config = LoraConfig(**adapters.peft_settings(shape))
    config._register_custom_module({nn.Linear: RecordingLinear})
    with packed_layers.only_described(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(module, shared), config, adapter_name=_ADAPTER)


def name_in_file(parameter_name: str) -> str:
    """A LoRA parameter's name as it stands in adapter_model.safetensors."""
    return parameter_name.replace(f".{_ADAPTER}.", ".")
