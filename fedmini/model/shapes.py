"""The LoRA tensors of a run, known from file headers alone: `fedmini plan` answers without loading the model."""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmini.config import BaseSection
from fedmini.errors import ConfigError
from fedmini.model import packaged
from fedmini.types import LoraShape, Template

Shapes = Mapping[str, tuple[int, int]]  # linear layer by transformers' name -> (num_outputs, num_inputs)

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What a packed Llama's memory follows from."""

    hidden_size: int
    inner_size: int
    query_size: int  # of all heads
    key_size: int
    num_layers: int
    num_words: int
    weights_bytes: int  # as they are packed


def dimensions(source: BaseSection) -> Dimensions | None:
    """Of a base that stays packed; None for any other. Raises ConfigError where it can't be found or read."""
    if (found := _packed(source)) is None:
        return None
    config, path = found
    return Dimensions(
        hidden_size=config["hidden_size"],
        inner_size=config["intermediate_size"],
        query_size=config["num_attention_heads"] * config["head_dim"],
        key_size=config["num_key_value_heads"] * config["head_dim"],
        num_layers=config["num_hidden_layers"],
        num_words=config["vocab_size"],
        weights_bytes=path.stat().st_size,
    )


def linear_shapes(source: BaseSection) -> Shapes:
    """The shape of every linear layer inside a base's blocks. Raises ConfigError where the base can't be found or read."""
    if (found := _packed(source)) is not None:
        return _llama_shapes(found[0])
    if source.path is not None:
        return _folder_shapes(source.path)
    from fedmini.model import pretrained  # loads torch: only a hub id needs it

    return _folder_shapes(pretrained.download(str(source.hub_id)))


def template(shapes: Shapes, lora: LoraShape) -> Template:
    """The trainable LoRA tensors of `lora` on these layers, sorted by PEFT's name. Raises ConfigError where there are none."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (num_outputs, num_inputs) in shapes.items():
        layer = _LAYER.search(name)
        is_target = any(name == target or name.endswith(f".{target}") for target in lora.target_modules)
        is_in_layer = lora.layers is None or (layer is not None and int(layer.group(1)) in lora.layers)
        if not (is_target and is_in_layer):
            continue
        tensors[f"base_model.model.{name}.lora_B.weight"] = (num_outputs, lora.lora_rank)
        if lora.trained == "AB":
            tensors[f"base_model.model.{name}.lora_A.weight"] = (lora.lora_rank, num_inputs)
    if not tensors:
        known = sorted({name.rpartition(".")[2] for name in shapes})
        raise ConfigError(
            f"lora.target_modules = {list(lora.target_modules)} on lora.layers = {lora.layers or 'all'} adapts nothing; "
            f"this base has {', '.join(known)}"
        )
    return tuple(sorted(tensors.items()))


def _packed(source: BaseSection) -> tuple[Mapping[str, Any], Path] | None:
    """What a base that stays packed says of itself, and its file; None for any other."""
    if source.name is not None:
        packed, path = packaged.find(source.name)
        return packed.config, path
    if source.path is not None and source.path.is_file():
        from fedmini.model.gguf_file import GgufFile

        return GgufFile(source.path).config, source.path
    return None


def _llama_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    of_layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{layer}.{part}": shape
        for layer in range(config["num_hidden_layers"])
        for part, shape in of_layer.items()
    }


def _folder_shapes(folder: Path) -> Shapes:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no .safetensors file: it is no transformers folder that can be loaded")
    shapes: dict[str, tuple[int, int]] = {}
    for file in files:
        for name, entry in _safetensors_header(file).items():
            if _LAYER.search(name) and name.endswith(".weight") and len(entry.get("shape", ())) == 2:
                shapes[name.removesuffix(".weight")] = (entry["shape"][0], entry["shape"][1])
    return shapes


def _safetensors_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: fetch it again") from error
    return {name: entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)}
