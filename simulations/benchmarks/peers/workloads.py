"""The work that every peer does: data, models and cohorts, the same at every call. Needs torch; `lora` transformers and peft too.

mlp: 9,610 parameters, 100 devices of 50 points with skewed labels, batches of 10, 5 steps of SGD, cohorts of 20.
lora: rank 8 on the attention of a random Llama of 4 layers of 128, 40 devices of 16 sequences of 64, batches of 4, 4 steps,
cohorts of 10. Every device's update is clipped as a whole, and their mean is noised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

NUM_WORDS, NUM_TOKENS, NUM_CLASSES, NUM_INPUTS = 260, 64, 10, 64


@dataclass(frozen=True)
class Workload:
    """How much of it there is."""

    num_devices: int
    num_examples: int
    batch_size: int
    learning_rate: float
    cohort_size: int
    num_rounds: int
    clip_norm: float


WORKLOADS = {
    "mlp": Workload(100, 50, 10, 0.1, 20, 30, 1.0),
    "lora": Workload(40, 16, 4, 0.1, 10, 5, 0.5),
}
Examples = tuple[torch.Tensor, torch.Tensor]


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(NUM_INPUTS, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES))
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=NUM_WORDS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        use_cache=False,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def loss_of(kind: str, model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch."""
    if kind == "mlp":
        return functional.cross_entropy(model(inputs), labels)
    logits = model(input_ids=inputs).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, NUM_WORDS), inputs[:, 1:].reshape(-1))


def make_data(kind: str) -> tuple[list[Examples], Examples]:
    """Each device's examples, and some to test on."""
    random, work = np.random.default_rng(1), WORKLOADS[kind]
    if kind == "lora":
        chain = random.dirichlet(np.full(NUM_WORDS, 0.02), size=NUM_WORDS).cumsum(1)
        make = _sequences(random, chain)
        return [make(work.num_examples) for _ in range(work.num_devices)], make(64)
    centres = random.normal(size=(NUM_CLASSES, NUM_INPUTS))

    def points(labels: np.ndarray) -> Examples:
        inputs = centres[labels] + 1.5 * random.normal(size=(len(labels), NUM_INPUTS))
        return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels)

    shares = (random.dirichlet(np.full(NUM_CLASSES, 0.5)) for _ in range(work.num_devices))
    devices = [points(random.choice(NUM_CLASSES, work.num_examples, p=share)) for share in shares]
    return devices, points(random.integers(0, NUM_CLASSES, 2000))


def _sequences(random: np.random.Generator, chain: np.ndarray) -> Callable[[int], Examples]:
    def make(count: int) -> Examples:
        words = np.zeros((count, NUM_TOKENS), np.int64)
        words[:, 0] = random.integers(0, NUM_WORDS, count)
        for place in range(1, NUM_TOKENS):
            drawn = random.random(count)[:, None]
            words[:, place] = (chain[words[:, place - 1]] < drawn).sum(1).clip(0, NUM_WORDS - 1)
        return torch.from_numpy(words), torch.zeros(count)

    return make


def cohorts(kind: str, num_rounds: int | None = None) -> list[list[int]]:
    """Whom each round asks."""
    random, work = np.random.default_rng(7), WORKLOADS[kind]
    rounds = work.num_rounds if num_rounds is None else num_rounds
    return [random.choice(work.num_devices, work.cohort_size, replace=False).tolist() for _ in range(rounds)]


@torch.no_grad()
def evaluate(kind: str, model: nn.Module, test: Examples) -> float:
    """The loss on the test examples."""
    return float(loss_of(kind, model, *test))
