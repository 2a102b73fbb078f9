"""What a Llama's layers are made of, in plain torch: fast_layers.py computes the same through compiled kernels."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedmini.model import attention
from fedmini.model.attention import KeyValueCache


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What a Llama's shape follows from: transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own configuration is made from."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Linear(nn.Linear):
    """A linear layer whose numbers are put in later: none are drawn."""

    def reset_parameters(self) -> None:
        """Nothing: on the meta device, drawing none would import much of torch."""


class Embedding(nn.Embedding):
    """An embedding whose numbers are put in later."""

    def reset_parameters(self) -> None:
        """As above."""


class RmsNorm(nn.Module):
    """arXiv:1910.07467, in float32."""

    def __init__(self, size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = x.float()
        scale = torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + self.epsilon)
        normed: torch.Tensor = self.weight * (numbers * scale).to(x.dtype)
        return normed


class Attention(nn.Module):
    """Queries over keys and values, some heads to each key, turned by their places (arXiv:2104.09864)."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.scaling = config.head_dim**-0.5
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, queries, bias=False, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, keys, bias=False, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, keys, bias=False, dtype=dtype)
        self.o_proj = Linear(queries, config.hidden_size, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor, places: attention.Places, cache: KeyValueCache | None) -> torch.Tensor:
        query, key, value = (
            part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = places.turn(query), places.turn(key)
        if cache is not None:
            key, value = cache.extended(self.index, key, value)
        answer: torch.Tensor = self.o_proj(attention.attend(query, key, value, self.scaling).transpose(1, 2).flatten(2))
        return answer


class GatedNetwork(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return answer
