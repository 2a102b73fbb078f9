"""SHA-256 digests by which two devices know that they train the same model."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedmini.model.tokenizer import Tokenizer


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(tensors: Mapping[str, Callable[[], torch.Tensor]]) -> str:
    """SHA-256 over (name, shape, dequantised little-endian float32 bytes) of each tensor, sorted by name.

    Each tensor is made when its turn comes, so that only one is dense at a time.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name]().detach().to("cpu", torch.float32).contiguous().numpy()
        _add_tensor(digest, name, values)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 over what decides how text becomes tokens: the tokenizer, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = (
        json.loads(backend.to_str()) if backend is not None else dict(cast(Any, tokenizer).get_vocab())
    )
    for changing in ("padding", "truncation"):  # set by whoever called the tokenizer last
        rules.pop(changing, None)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    return _json_digest({"rules": rules, "ids": ids, "chat_template": tokenizer.chat_template})


def base_fingerprint(
    weights: str, tokenizer: str, frozen: Iterable[tuple[str, NDArray[np.float32]]], quantized_as: str
) -> str:
    """SHA-256 over the digests of weights and tokenizer and over the frozen LoRA tensors, sorted by name.

    `quantized_as` tells bases apart that hold the same published weights but compute with others ("nf4", "int8").
    """
    digest = hashlib.sha256()
    for part in (weights, tokenizer, quantized_as):
        _add_bytes(digest, part.encode())
    for name, values in sorted(frozen, key=lambda item: item[0]):
        _add_tensor(digest, name, values)
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, values: NDArray[np.float32]) -> None:
    _add_bytes(digest, name.encode())
    _add_bytes(digest, json.dumps(values.shape).encode())
    _add_bytes(digest, np.ascontiguousarray(values, dtype="<f4").data.cast("B") if values.size else b"")


def _add_bytes(digest: Any, content: bytes | memoryview) -> None:
    digest.update(len(content).to_bytes(8, "little"))  # so that no two sequences of parts read the same
    digest.update(content)


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
