"""SmolLM2-135M's linear layers, forward and backward, in bitsandbytes' NF4 and dense: python run_nf4.py REPEATS TOKENS.

Prints JSON. For the environment "torch": of fedmini it needs what measures alone.
"""

import json
import sys
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import linear_measures


def in_nf4(dense: nn.Linear) -> nn.Module:
    """The same layer, packed as transformers has bitsandbytes pack it for QLoRA."""
    packed = Linear4bit(dense.in_features, dense.out_features, False, torch.bfloat16, quant_type="nf4")
    packed.load_state_dict(dense.state_dict())
    return packed.to("cpu")  # packs it


def main(repeats: int, num_tokens: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = [
        {
            name: nn.Linear(num_inputs, num_outputs, bias=False, dtype=torch.bfloat16).requires_grad_(False)
            for name, (num_outputs, num_inputs) in linear_measures.SHAPES.items()
        }
        for _ in range(linear_measures.NUM_LAYERS)
    ]
    packed = [{name: in_nf4(linear) for name, linear in layer.items()} for layer in dense]
    x = torch.randn(num_tokens, linear_measures.HIDDEN).bfloat16()
    work = {"nf4": lambda: linear_measures.step(packed, x), "dense": lambda: linear_measures.step(dense, x)}
    cpu, wall = linear_measures.measure(work, repeats)
    print(json.dumps({"cpu_s": cpu, "wall_s": wall}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
