"""Random causal models of other families than Llama, as small as tests/tiny_llama.py, with the same words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedmini.model.loading import Base
from tests import tiny_llama

GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.3,
}
NEOX = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "attention_dropout": 0.3,
    "hidden_dropout": 0.3,
}
OPT = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.3,
    "attention_dropout": 0.3,
    "pad_token_id": 1,
}
IN_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IN_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
IN_OPT = ("q_proj", "k_proj", "v_proj", "out_proj")  # its MLP works on tokens of all examples as one


@dataclass(frozen=True)
class Family:
    """How transformers builds one, and the names of its linear layers. Each is configured with dropout."""

    model: Callable[[Any], PreTrainedModel]
    config: Callable[..., Any]
    settings: dict[str, Any]
    targets: tuple[str, ...]


FAMILIES = {
    "llama": Family(LlamaForCausalLM, LlamaConfig, GROUPED, IN_LLAMA),
    "qwen2": Family(Qwen2ForCausalLM, Qwen2Config, GROUPED, IN_LLAMA),  # biased queries, keys and values
    "qwen3": Family(Qwen3ForCausalLM, Qwen3Config, {**GROUPED, "head_dim": 16}, IN_LLAMA),  # normed queries and keys
    "gpt-neox": Family(GPTNeoXForCausalLM, GPTNeoXConfig, NEOX, IN_NEOX),  # biased, fused, attention beside the MLP
    "opt": Family(
        OPTForCausalLM, OPTConfig, OPT, IN_OPT
    ),  # positions are learned, dropout is called in the layer itself
}


def module(family: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights and biases, frozen, in eval mode; the same at every call."""
    kind = FAMILIES[family]
    config = kind.config(vocab_size=len(tiny_llama.VOCABULARY), bos_token_id=1, eos_token_id=2, **kind.settings)
    with torch.random.fork_rng():
        made = kind.model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    made.config.use_cache = False
    return made.requires_grad_(False).eval()


def base(family: str, seed: int = 0) -> Base:
    return Base(module(family, seed), tiny_llama.tokenizer(), "0" * 64, torch.float32, torch.device("cpu"), "dense")
