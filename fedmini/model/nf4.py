"""Dense weights as NF4: 64 numbers share a scale, the largest of their absolute values (arXiv:2305.14314)."""

import torch
from torch import nn

from fedmini.errors import ConfigError
from fedmini.model.packed_layers import PackedLinear
from fedmini.model.packing import QUANTIZATIONS, PackedMatrix

_BLOCK, _LEVELS = QUANTIZATIONS["NF4"].block, torch.tensor(QUANTIZATIONS["NF4"].levels)
_HEAD = "lm_head"


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer of a frozen model by a packed one, in place, one after the other.

    Left dense: the head, and layers whose inputs are no multiple of 64. Raises ConfigError for a weight that is not finite.
    """
    for name, layer in tuple(module.named_modules()):
        if type(layer) is not nn.Linear or name.split(".")[-1] == _HEAD or layer.in_features % _BLOCK:
            continue
        try:
            module.set_submodule(name, PackedLinear(pack(layer.weight), layer.bias))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def pack(weight: torch.Tensor) -> PackedMatrix:
    """The nearest levels to a weight, (num_outputs, num_inputs) with a multiple of 64 inputs.

    Each number is off by at most 0.16 times the largest of its 64. Raises ConfigError for one that is not finite.
    """
    num_outputs, num_inputs = weight.shape
    numbers = weight.detach().float().view(num_outputs, num_inputs // _BLOCK, _BLOCK)
    scales = numbers.abs().amax(dim=-1)  # (outputs, blocks)
    if not scales.isfinite().all():
        raise ConfigError("the weight holds a number that is not finite: is the download complete?")
    between = ((_LEVELS[1:] + _LEVELS[:-1]) / 2).to(weight.device)
    nonzero = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    index = torch.bucketize(numbers / nonzero, between, out_int32=True).to(torch.uint8)  # (outputs, blocks, 64)
    low, high = index.split(_BLOCK // 2, dim=-1)  # type: ignore[no-untyped-call]
    values = (low | high << 4).permute(1, 2, 0).contiguous()  # (blocks, 32, outputs)
    return PackedMatrix("NF4", values, scales.t().contiguous(), None)
