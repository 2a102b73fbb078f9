"""A base from a transformers folder or from the hub: safetensors only, quantised on loading where that works."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedmini.errors import ConfigError
from fedmini.model import cache, digests, nf4

Weights = Literal["nf4", "int8", "dense"]
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


def download(hub_id: str) -> Path:
    """The local snapshot of a hub model, without its pickled files. Raises ConfigError without a network or a model."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # whatever the network, the hub or its client raises
        raise ConfigError(
            f"can't get {hub_id!r} from the hub ({type(error).__name__}): is there a network, is the name right, "
            "is access granted? Else download it elsewhere and give base.path"
        ) from error


def check_folder(folder: Path) -> tuple[Path, ...]:
    """The folder's weight files. Raises ConfigError for what is no transformers folder, or holds pickles only."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is neither a .gguf file nor a transformers folder (it has no config.json)")
    if files := tuple(sorted(folder.glob("*.safetensors"))):
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ConfigError(f"{folder} holds pickled weights only, which can run code: convert them to safetensors")
    raise ConfigError(f"{folder} holds no .safetensors file: is the download complete?")


def choose_weights(wanted: str, folder: Path, accelerator: torch.device, note: Callable[[str], None]) -> Weights:
    """How to hold the weights in memory. `note` hears what a dense base costs."""
    if wanted == "packed":
        raise ConfigError('base.weights = "packed" is for GGUF files; here: nf4, int8, dense or auto')
    if wanted == "nf4" and accelerator.type == "cpu":
        return "nf4"
    if wanted in ("nf4", "int8"):
        if not _bitsandbytes_works():
            raise ConfigError(f'base.weights = "{wanted}" needs bitsandbytes, working: pip install bitsandbytes')
        return "nf4" if wanted == "nf4" else "int8"
    if wanted == "auto" and _bitsandbytes_works():
        return "nf4"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    note(
        f"WARNING: the base in {folder} is held dense: about {size:,.0f} MB as stored, where 4 bits would take a "
        'quarter or less. A GGUF (Q4_1, Q4_0, Q8_0), or on a CPU base.weights = "nf4", keeps it small'
    )
    return "dense"


def load_module(
    folder: Path, weights: Weights, compute_dtype: torch.dtype, accelerator: torch.device
) -> PreTrainedModel:
    """The frozen model. No code of the folder is run. Raises ConfigError where transformers can't load it."""
    quantization: dict[str, Any] = {}
    packs_itself = weights == "nf4" and accelerator.type == "cpu"  # to the bits that bitsandbytes gives, and faster
    if weights == "nf4" and not packs_itself:
        quantization["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    elif weights == "int8":
        # A threshold above 0 looks for outliers over the whole batch: one example would change another's gradient.
        quantization["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # type: ignore[no-untyped-call]
    try:
        module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute_dtype,
            device_map={"": accelerator},
            use_safetensors=True,
            trust_remote_code=False,
            **quantization,
        )
    except Exception as error:  # transformers raises whatever its loaders stumble on
        raise ConfigError(f"transformers can't load {folder} as a causal language model: {_one_line(error)}") from error
    for part in module.modules():
        # On some processors bitsandbytes would repack a layer at its first answer, for good, into a form through which
        # no gradient flows: what lies below it would be trained wrongly, without an error.
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    module.config.use_cache = False
    module.requires_grad_(False)
    if packs_itself:
        nf4.pack_linears(module)
    module.eval()  # type: ignore[no-untyped-call]
    return module


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises ConfigError where there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise ConfigError(f"transformers can't load a tokenizer from {folder}: {_one_line(error)}") from error
    return tokenizer


def weights_digest(files: tuple[Path, ...], cache_dir: Path) -> str:
    """`digests.weights_digest` of the tensors as they are stored; remembered by the files' own digests."""
    stored = json.dumps([cache.source_digest(file, cache_dir) for file in files])
    tensors: dict[str, Callable[[], torch.Tensor]] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: partial(_read, file, name) for name in opened.keys()}  # noqa: SIM118
        return cache.remembered(cache_dir, f"weights {stored}", lambda: digests.weights_digest(tensors))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"can't read the weights beside {files[0]}: {_one_line(error)}") from error


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def _bitsandbytes_works() -> bool:
    try:
        import bitsandbytes

        bitsandbytes.functional.quantize_4bit(torch.zeros(64, 64), quant_type="nf4")
    except Exception:  # not installed, or installed without a library for this machine
        return False
    return True


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
