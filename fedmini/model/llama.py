"""A Llama of our own, for bases that stay packed: no transformers and no PEFT to import, less memory, less small work.

Layers are named as transformers names them, so that an adapter fits either. In float32 the answers are those of
transformers' Llama to float rounding. Where there is a compiled kernel, fast_layers.py computes the layers' insides.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedmini.model import attention, fast_layers
from fedmini.model.attention import KeyValueCache, Rotations
from fedmini.model.llama_parts import Attention, Embedding, GatedNetwork, Linear, LlamaConfig, RmsNorm

REVISION = 1  # of what the layers compute, digit by digit: kept states of another are not used


@dataclass(frozen=True, slots=True)
class BodyOutput:
    last_hidden_state: torch.Tensor  # (examples, length, hidden_size)


@dataclass(frozen=True, slots=True)
class CausalOutput:
    logits: torch.Tensor  # (examples, length, vocab_size)


class Llama(nn.Module):
    """A causal language model, whose numbers packed_base puts in."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = LlamaBody(config, dtype)
        head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if config.tie_word_embeddings:
            head.weight = self.model.embed_tokens.weight
        self.lm_head: nn.Module = head

    @property
    def base_model(self) -> "LlamaBody":
        """All but the head."""
        return self.model

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def forward(
        self, input_ids: torch.Tensor, past_key_values: KeyValueCache | None = None, logits_to_keep: int = 0
    ) -> CausalOutput:
        """Logits of the last `logits_to_keep` positions, 0 for all. A cache is read, and grows."""
        hidden = self.model(input_ids, past_key_values).last_hidden_state
        return CausalOutput(self.lm_head(hidden[:, -logits_to_keep:]))


class LlamaBody(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(LlamaLayer(config, dtype, index) for index in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.checkpoints_layers = False  # compute a layer's insides again in backward instead of keeping them
        self._rotations = Rotations(config.head_dim, config.rope_theta)

    def forward(
        self, input_ids: torch.Tensor, past_key_values: KeyValueCache | None = None, use_cache: bool = False
    ) -> BodyOutput:
        """(examples, length) token ids behind what the cache holds, which grows by them where no gradient is taken.

        `use_cache` is transformers', and changes nothing here.
        """
        first = past_key_values.length if past_key_values is not None else 0
        places = self._rotations.of(first, input_ids.shape[1], input_ids.device)
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            if self.checkpoints_layers and torch.is_grad_enabled():
                hidden = checkpoint(
                    layer, hidden, places, past_key_values, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = layer(hidden, places, past_key_values)
        if fast_layers.can_do(hidden):
            return BodyOutput(fast_layers.norm(self.norm, hidden)[1])
        return BodyOutput(self.norm(hidden))


class LlamaLayer(nn.Module):
    """Attention, then a gated network, each behind a norm and added to what came in."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, index: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, dtype, index)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = GatedNetwork(config, dtype)

    def forward(self, hidden: torch.Tensor, places: attention.Places, cache: KeyValueCache | None) -> torch.Tensor:
        """(examples, length, hidden_size) to the same."""
        if fast_layers.can_do(hidden):
            norms, parts = (self.input_layernorm, self.post_attention_layernorm), (self.self_attn, self.mlp)
            return fast_layers.layer(norms, parts, hidden, places, cache)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), places, cache)
        after: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return after
