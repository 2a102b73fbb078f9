"""A Llama GGUF file as transformers would name its tensors, still in blocks of quantised numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.gguf_reader import ReaderTensor
from numpy.typing import NDArray

from fedmini.errors import ConfigError

READABLE = ("Q4_0", "Q4_1", "Q8_0", "F16", "F32")
_REQUIRED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_A_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `data` is (rows, bytes in a row) uint8 where quantised, else the numbers themselves."""

    name: str  # transformers' name
    quantization: str  # one of READABLE
    data: NDArray[Any]


class _PlainReader(GGUFReader):
    """gguf's reader over a plain array: slicing np.memmap hundreds of thousands of times takes twice as long."""

    @property  # type: ignore[override]
    def data(self) -> NDArray[np.uint8]:
        return self._plain

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._plain = np.asarray(mapped)


class GgufFile:
    """A Llama GGUF, opened: `config` holds LlamaConfig's arguments; tensors are read on demand.

    Raises ConfigError for another architecture, or what would be silently wrong: scaled rope, experts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = _PlainReader(path)
        except FileNotFoundError as error:
            raise ConfigError(f"there is no GGUF file at {path}") from error
        except Exception as error:  # gguf raises whatever its parsing stumbles on
            raise ConfigError(f"{path} is not a readable GGUF file: is it truncated? fetch it again") from error
        self.config = self._llama_config()

    def tensors(self) -> Iterator[GgufTensor]:
        """Every tensor in the file's order, with the rows of q and k in transformers' order."""
        for tensor in self._reader.tensors:
            quantization = GGMLQuantizationType(tensor.tensor_type).name
            if quantization not in READABLE:
                raise ConfigError(
                    f"{self._path}: {tensor.name} is {quantization}; these are readable: {', '.join(READABLE)}: "
                    "choose a file in one of them (Q4_1, Q4_0 or Q8_0)"
                )
            yield GgufTensor(self._transformers_name(tensor), quantization, self._rows_in_order(tensor))

    def _llama_config(self) -> dict[str, Any]:
        values = {key: field.contents() for key, field in self._reader.fields.items() if len(field.data) == 1}
        if (architecture := values.get("general.architecture")) != "llama":
            raise ConfigError(f"{self._path} has the architecture {architecture!r}; only 'llama' is read from a GGUF")
        _refuse_what_would_be_wrong(self._path, values)
        config: dict[str, Any] = {}
        for key, name in _REQUIRED.items():
            if f"llama.{key}" not in values:
                raise ConfigError(f"{self._path} lacks llama.{key}: it is not a whole Llama model")
            config[name] = values[f"llama.{key}"]
        heads = config["num_attention_heads"]
        shapes = {tensor.name: tensor.data.shape for tensor in self._reader.tensors}
        if "token_embd.weight" not in shapes:
            raise ConfigError(f"{self._path} lacks token_embd.weight: it is not a whole Llama model")
        return config | {
            "num_key_value_heads": values.get("llama.attention.head_count_kv", heads),
            "head_dim": values.get("llama.attention.key_length", config["hidden_size"] // heads),
            "vocab_size": int(shapes["token_embd.weight"][0]),
            "max_position_embeddings": values.get("llama.context_length", 2048),
            "rope_theta": values.get("llama.rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in shapes,
            "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
        }

    def _transformers_name(self, tensor: ReaderTensor) -> str:
        if tensor.name in _WHOLE_MODEL:
            return _WHOLE_MODEL[tensor.name]
        match tensor.name.split("."):
            case ["blk", layer, part, "weight"] if part in _IN_A_LAYER:
                return f"model.layers.{int(layer)}.{_IN_A_LAYER[part]}.weight"
        raise ConfigError(f"{self._path} holds {tensor.name}, which a plain Llama has not: choose another file")

    def _rows_in_order(self, tensor: ReaderTensor) -> NDArray[Any]:
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        part = tensor.name.split(".")[-2]
        if part not in heads:
            return tensor.data
        # llama.cpp interleaves the two halves of each head for its rope; transformers keeps them apart.
        num_rows, *rest = tensor.data.shape
        halves = tensor.data.reshape(self.config[heads[part]], -1, 2, *rest)
        return halves.swapaxes(1, 2).reshape(num_rows, *rest)


def _refuse_what_would_be_wrong(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("llama.rope.scaling.type", "none") not in ("none", ""):
        raise ConfigError(f"{path} uses rope scaling, which is not read from a GGUF: load its transformers folder")
    if values.get("llama.expert_count", 0):
        raise ConfigError(f"{path} is a mixture of experts, which is not read from a GGUF: load a dense model")
