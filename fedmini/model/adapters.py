"""An adapter's folder, as plain PEFT reads it: adapter_config.json and adapter_model.safetensors. No pickle."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedmini import files
from fedmini.errors import ModelMismatchError, StateError
from fedmini.model import frozen_draw
from fedmini.types import Adapter, LoraShape

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_TENSOR_NAME = re.compile(r"base_model\.model(?:\.[A-Za-z_][A-Za-z0-9_]*|\.\d{1,4})+\.lora_([AB])\.weight")
_MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER = "fedmini"
_READ = ("r", "lora_alpha", "target_modules", "layers_to_transform")
_HARMLESS = (  # change nothing about what the adapter computes
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version"),
    *("revision", "task_type"),
)


def write_adapter(folder: Path, shape: LoraShape, tensors: Adapter, base_name: str) -> None:
    """Write all LoRA tensors, the frozen ones too. What shape.trained and shape.seed say goes into the file's header.

    Each file appears whole or not at all. Raises StateError where the folder can't be written.
    """
    # One entry: safetensors writes several in any order, and the same adapter must give the same bytes.
    header = {_HEADER: json.dumps({"trained": shape.trained, "seed": shape.seed})}
    ordered = {name: np.ascontiguousarray(tensors[name], dtype=np.float32) for name in sorted(tensors)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.replace_synced(folder / TENSORS_FILE, save(ordered, metadata=header))
        about = {"peft_type": "LORA", "base_model_name_or_path": base_name, "inference_mode": True}
        described = json.dumps(about | peft_settings(shape), indent=2, sort_keys=True)
        files.replace_synced(folder / CONFIG_FILE, described.encode())
    except OSError as error:
        raise StateError(
            f"can't write the adapter to {folder}: {error.strerror}; make room or mend the folder, then run with --resume"
        ) from error


def peft_settings(shape: LoraShape) -> dict[str, Any]:
    """What PEFT's LoraConfig is made from; it takes its own defaults for the rest."""
    return {
        "task_type": "CAUSAL_LM",
        "r": shape.lora_rank,
        "lora_alpha": shape.lora_alpha,
        "target_modules": sorted(shape.target_modules),
        "layers_to_transform": None if shape.layers is None else sorted(shape.layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def load_peft(folder: Path) -> tuple[LoraShape, Adapter]:
    """The shape and the trained tensors of an adapter's folder; no path named inside it is ever followed.

    An adapter of another program is taken as trained = "AB". Raises StateError for what is missing, damaged, pickled
    or not finite, ModelMismatchError for another method than plain LoRA or tensors that don't fit the description.
    """
    header, tensors = _read_tensors(folder / TENSORS_FILE)
    shape = replace(_read_shape(folder), **_read_header(header))
    for name, values in tensors.items():
        if values.dtype != np.float32:
            raise ModelMismatchError(f"{folder}: {name} is {values.dtype}, expected float32")
        if not np.isfinite(values).all():
            raise StateError(f"{folder}: {name} holds numbers that are not finite; take another copy of the adapter")
    _check_tensors(folder, shape, tensors)
    if shape.trained == "AB":
        return shape, dict(sorted(tensors.items()))
    return shape, {name: tensors[name] for name in sorted(tensors) if name.endswith(".lora_B.weight")}


def _read_header(header: Mapping[str, str]) -> dict[str, Any]:
    """`trained` and `seed`, as write_adapter noted them; "AB" for what it did not write."""
    try:
        noted = json.loads(header.get(_HEADER, "{}"))
    except ValueError:
        noted = {}
    if isinstance(noted, dict) and noted.get("trained") in ("B", "AB") and _is_count(noted.get("seed"), limit=2**63):
        return {"trained": noted["trained"], "seed": noted["seed"]}
    return {"trained": "AB", "seed": 0}


def _read_shape(folder: Path) -> LoraShape:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StateError(f"{folder} holds no adapter: {CONFIG_FILE} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelMismatchError(f"{path} does not describe a LoRA adapter")
    others = {key: value for key, value in config.items() if key not in (*_READ, *_HARMLESS) and value}
    others = {key: value for key, value in others.items() if (key, value) != ("bias", "none")}  # its default
    defaults = _defaults_of_peft() if others else {}
    for key, value in others.items():
        if value != defaults.get(key):
            raise ModelMismatchError(f"{path}: {key} is set; only plain LoRA is supported")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not (_is_count(rank) and rank >= 1 and type(alpha) in (int, float) and np.isfinite(alpha) and alpha > 0):
        raise ModelMismatchError(f"{path}: r must be a positive integer and lora_alpha a positive number")
    if not isinstance(targets, list) or not targets or not all(_is_module_name(target) for target in targets):
        raise ModelMismatchError(f"{path}: target_modules must be a list of plain module names, such as v_proj")
    if layers is not None and not (isinstance(layers, list) and layers and all(_is_count(layer) for layer in layers)):
        raise ModelMismatchError(f"{path}: layers_to_transform must be a list of layer numbers")
    return LoraShape(rank, float(alpha), tuple(targets), None if layers is None else tuple(layers), "AB", 0)


def _defaults_of_peft() -> dict[str, Any]:
    from peft import LoraConfig  # takes a second: only for an adapter that PEFT itself wrote

    defaults: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    return defaults


def _is_count(value: Any, limit: int = 10_000) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def _is_module_name(value: Any) -> bool:
    return isinstance(value, str) and _MODULE_NAME.fullmatch(value) is not None


def _read_tensors(path: Path) -> tuple[Mapping[str, str], dict[str, NDArray[np.float32]]]:
    if not path.is_file():
        if path.with_suffix(".bin").exists():
            raise StateError(f"{path.parent} holds a pickled adapter, which can run code: save it as safetensors")
        raise StateError(f"{path.parent} holds no adapter: {TENSORS_FILE} is missing")
    try:
        with safe_open(path, framework="numpy") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise StateError(f"{path} is damaged: it is no safetensors file of plain tensors") from error


def _check_tensors(folder: Path, shape: LoraShape, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    if not tensors:
        raise ModelMismatchError(f"{folder}: there is no tensor in {TENSORS_FILE}")
    for name, values in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or name.split(".")[-3] not in shape.target_modules:
            raise ModelMismatchError(f"{folder}: {name[:120]!r} is no LoRA tensor of the described modules")
        if shape.layers is not None and not {int(part) for part in name.split(".") if part.isdecimal()} & {
            *shape.layers
        }:
            raise ModelMismatchError(f"{folder}: {name} is outside layers_to_transform")
        other = name.replace(f".lora_{match[1]}.", f".lora_{'B' if match[1] == 'A' else 'A'}.")
        if other not in tensors:
            raise ModelMismatchError(f"{folder}: {name} stands alone; {other} is missing")
        if values.ndim != 2 or values.shape[0 if match[1] == "A" else 1] != shape.lora_rank:
            raise ModelMismatchError(
                f"{folder}: {name} has shape {values.shape}, which is not of rank {shape.lora_rank}"
            )
        if shape.trained == "B" and match[1] == "A":
            drawn = frozen_draw.kaiming_uniform(shape.seed, name, (values.shape[0], values.shape[1]))
            if not np.array_equal(values, drawn):
                raise ModelMismatchError(f"{folder}: {name} is not what the seed {shape.seed} in the header gives")
