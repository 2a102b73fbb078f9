"""A random two-layer Llama (hidden size 32, 64 words) as the model tests use it: nothing is downloaded."""

from dataclasses import fields
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmini.model import packed_base
from fedmini.model.llama_parts import LlamaConfig as OurConfig
from fedmini.model.loading import Base
from fedmini.types import EncodedExample, LoraShape

VOCABULARY = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    *"Ġ.,!?Ċ01",
    "ab",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS, KV_HEADS, HIDDEN, INNER, LAYERS = 4, 2, 32, 64, 2
SHAPE = LoraShape(2, 4.0, ("v_proj", "o_proj"), None, "B", 0)


def tokenizer() -> PreTrainedTokenizerFast:
    model = models.BPE(vocab={token: index for index, token in enumerate(VOCABULARY)}, merges=[("a", "b")])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    made.chat_template = TEMPLATE
    return made


def llama(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        module = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    module.config.use_cache = False
    return module.requires_grad_(False).eval()


def base(seed: int = 0) -> Base:
    return Base(llama(seed), tokenizer(), "0" * 64, torch.float32, torch.device("cpu"), "dense")


def our_base(seed: int = 0, compute_dtype: torch.dtype = torch.float32) -> Base:
    """The same model as `base`, as fedmini's own Llama."""
    module = llama(seed)
    settings = module.config.to_dict()
    config = {field.name: settings.get(field.name) for field in fields(OurConfig)}
    config["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    weights = dict(module.named_parameters())
    cpu = torch.device("cpu")
    return Base(
        packed_base.build_module(config, weights, compute_dtype, cpu),
        tokenizer(),
        "0" * 64,
        compute_dtype,
        cpu,
        "packed",
    )


def examples(lengths: tuple[int, ...], seed: int = 0) -> list[EncodedExample]:
    """Random tokens; about half of the positions of each are targets, its last one always."""
    random = np.random.default_rng(seed)
    made = []
    for length in lengths:
        is_target = random.random(length) < 0.5
        is_target[0], is_target[-1] = False, True
        made.append(EncodedExample(random.integers(3, len(VOCABULARY), length).astype(np.int32), is_target))
    return made


def with_random_adapter(model, seed: int = 1):
    """The model, with values in B that are not zero: else A's gradients would vanish."""
    random = np.random.default_rng(seed)
    model.set_flat(random.normal(0, 0.1, model.num_parameters).astype(np.float32))
    return model


def write_gguf(path: Path, quantization: str = "Q4_1", seed: int = 0, tied: bool = True, **overrides) -> Path:
    """The tiny Llama as llama.cpp would store it: q and k interleaved, matrices quantised, norms in float32."""
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, overrides.get("architecture", "llama"))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(VOCABULARY))
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    if "rope_scaling" in overrides:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    for name, values in _llama_cpp_tensors(llama(seed, tied), tied):
        kind = kinds.F32 if values.ndim == 1 else kinds[quantization]
        if kind is not kinds.F32 and name in ("token_embd.weight", "output.weight") and quantization == "Q4_1":
            kind = kinds.Q8_0
        if kind in (kinds.F32, kinds.F16):
            writer.add_tensor(name, values.astype(np.float16 if kind is kinds.F16 else np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _llama_cpp_tensors(module: LlamaForCausalLM, tied: bool):
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    if not tied:
        yield "output.weight", state["lm_head.weight"]
    for layer in range(LAYERS):
        for theirs, ours in names.items():
            values = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                heads = HEADS if ours == "attn_q" else KV_HEADS
                values = values.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(values.shape)
            yield f"blk.{layer}.{ours}.weight", values
