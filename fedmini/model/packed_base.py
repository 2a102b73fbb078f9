"""A GGUF as a Llama whose weights stay packed: repacked into the cache once, memory-mapped afterwards."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedmini.errors import ConfigError
from fedmini.model import cache, digests, tokenizer
from fedmini.model.gguf_file import GgufFile
from fedmini.model.llama import Llama
from fedmini.model.llama_parts import LlamaConfig
from fedmini.model.packed_layers import PackedEmbedding, PackedHead, PackedLinear
from fedmini.model.packing import PackedMatrix, PackedRows, pack_matrix, pack_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_TENSORS, _TOKENIZER = "tensors.safetensors", "tokenizer"
_PARTS = ("values", "scales", "minimums")

Weight = PackedMatrix | PackedRows | torch.Tensor


def repack(path: Path, folder: Path) -> Mapping[str, Any]:
    """Write a GGUF's tensors, packed, and its tokenizer to `folder`; return what the model is built from.

    Takes seconds: the tokenizer goes through transformers' own conversion.
    """
    gguf = GgufFile(path)
    weights: dict[str, Weight] = {}
    quantizations: dict[str, str] = {}
    for tensor in gguf.tensors():
        quantizations[tensor.name] = tensor.quantization
        if tensor.quantization in ("F16", "F32"):
            weights[tensor.name] = torch.from_numpy(tensor.data.copy())
        elif tensor.data.ndim != 2:
            raise ConfigError(
                f"{path}: {tensor.name} is a norm in {tensor.quantization}; only F32 and F16 norms are read"
            )
        elif tensor.name in (EMBEDDING, HEAD):
            weights[tensor.name] = pack_rows(tensor.quantization, tensor.data)
        else:
            weights[tensor.name] = pack_matrix(tensor.quantization, tensor.data)
    _write(folder, weights, _convert_tokenizer(path))
    digest = digests.weights_digest({name: partial(dequantized, weight) for name, weight in weights.items()})
    return {"config": gguf.config, "quantizations": quantizations, "weights_digest": digest}


def _write(folder: Path, weights: Mapping[str, Weight], converted: "PreTrainedTokenizerBase") -> None:
    try:
        save_file(_flatten(weights), folder / _TENSORS)
        converted.save_pretrained(folder / _TOKENIZER)
    except OSError:
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own for a disk that is full
        raise OSError(str(error)) from error


def _convert_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # only where a GGUF is new

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers raises whatever its conversion stumbles on
        raise ConfigError(f"transformers can't convert the tokenizer in {path} ({type(error).__name__})") from error
    return tokenizer


def dequantized(weight: Weight) -> torch.Tensor:
    """A weight in float32 and transformers' shape. Of a matrix: valid until the next one is dequantised."""
    match weight:
        case PackedMatrix():
            return weight.transposed(torch.float32).t()
        case PackedRows():
            return weight.dense(torch.float32)
        case _:
            return weight.float()


def load_module(cached: cache.CachedFolder, compute_dtype: torch.dtype, accelerator: torch.device) -> Llama:
    """The frozen Llama over the cached tensors, which stay mapped from the file where they live on the CPU."""
    weights = _unflatten(load_file(cached.folder / _TENSORS, device=str(accelerator)), cached.facts["quantizations"])
    return build_module(cached.facts["config"], weights, compute_dtype, accelerator)


def load_tokenizer(cached: cache.CachedFolder) -> tokenizer.Tokenizer:
    """The tokenizer as it was converted from the GGUF, chat template included."""
    return tokenizer.load(cached.folder / _TOKENIZER)


def build_module(
    config: Mapping[str, Any], weights: Mapping[str, Weight], compute_dtype: torch.dtype, accelerator: torch.device
) -> Llama:
    """A Llama that holds exactly `weights`: packed ones packed, the others rounded to `compute_dtype`.

    Raises ConfigError where a tensor is missing, left over or of another shape than the config says.
    """
    with torch.device("meta"):  # no memory, no random numbers: every weight is replaced below
        module = Llama(LlamaConfig(**config), compute_dtype)
    expected = {name: tuple(value.shape) for name, value in module.named_parameters()}
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    if given != expected:
        wrong = sorted(set(given.items()) ^ set(expected.items()))[0]
        raise ConfigError(f"the GGUF's tensors don't fit its own description, first at {wrong[0]} {wrong[1]}")
    for name, weight in weights.items():
        _put(module, name.removesuffix(".weight"), weight, compute_dtype)
    if module.config.tie_word_embeddings:
        embedding = module.model.embed_tokens
        if isinstance(embedding, PackedEmbedding):
            module.lm_head = PackedHead(embedding.packed)
        else:
            module.lm_head.weight = embedding.weight
    module.requires_grad_(False)
    module.eval()
    return module


def _put(module: nn.Module, name: str, weight: Weight, compute_dtype: torch.dtype) -> None:
    match weight:
        case PackedMatrix():
            module.set_submodule(name, PackedLinear(weight))
        case PackedRows() if f"{name}.weight" == EMBEDDING:
            module.set_submodule(name, PackedEmbedding(weight, compute_dtype))
        case PackedRows():
            module.set_submodule(name, PackedHead(weight))
        case _:
            module.get_submodule(name).weight = nn.Parameter(weight.to(compute_dtype), requires_grad=False)


def _flatten(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    flat = {}
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor):
            flat[name] = weight
            continue
        for part in _PARTS:
            if (tensor := getattr(weight, part)) is not None:
                flat[f"{name}.{part}"] = tensor
    return flat


def _unflatten(flat: Mapping[str, torch.Tensor], quantizations: Mapping[str, str]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for name, quantization in quantizations.items():
        if name in flat:
            weights[name] = flat[name]
            continue
        kind: Callable[..., Weight] = PackedRows if name in (EMBEDDING, HEAD) else PackedMatrix
        weights[name] = kind(quantization, *(flat.get(f"{name}.{part}") for part in _PARTS))
    return weights
