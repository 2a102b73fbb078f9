"""What a training step costs on SmolLM2-135M in bfloat16: private and not, on the packed base and on a dense one."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cohort_measures import dense_copy
from linear_measures import with_kernel
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import LlamaForCausalLM

from fedmini import local
from fedmini.config import BaseSection
from fedmini.model import packed_base
from fedmini.model.loading import Base, load_base
from fedmini.model.lora import LoraModel
from fedmini.privacy.noise import RandomStream
from fedmini.types import EncodedExample, LocalPlan, LoraShape, UnitPlan

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = LoraShape(8, 16.0, TARGETS, None, "B", 0)
CLIP_NORM = 1.0
UNIT = UnitPlan("example", "local", CLIP_NORM, 1.0, 2.0**13, 2**26, num_shares=1, z_eff=1.0, target_delta=1e-5)
Work = Callable[[], object]


def steps(cache_dir: Path, batch_size: int, num_tokens: int) -> dict[str, Work]:
    """One step of each: "private", "shared", "plain" and "opacus" on the packed base; the others stand on a dense one.

    "dense" is "plain" on dense weights; "plain, torch" and "dense, torch" are the same without compiled kernels.

    "private" is all that a device does in a local step, with integer rounding and exact noise; "shared" the same where the
    noise is drawn once a round, apart; "opacus" is Opacus's own optimizer, in floats, over fedmini's gradients.
    "default" is PEFT with A and B trained and transformers' own loss; "hooks" and "ghost" are Opacus over that.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = load_base(BaseSection(name="smollm2-135m-q4", compute_dtype="bfloat16"), cache_dir, print)
    tokens = torch.randint(0, 49_000, (batch_size, num_tokens), generator=torch.Generator().manual_seed(0))
    packed, dense = LoraModel(base, SHAPE), LoraModel(_dense(base), SHAPE)
    return {
        "private": _device(packed, tokens, lambda model, run: local.train_adapter(model.parameters(), run, UNIT)),
        "shared": _device(packed, tokens, lambda model, run: local.sum_gradients(model.parameters(), run, UNIT, 0)),
        "plain": _device(packed, tokens, _plain),
        "dense": _device(dense, tokens, _plain),
        "plain, torch": with_kernel(None, _device(packed, tokens, _plain)),
        "dense, torch": with_kernel(None, _device(dense, tokens, _plain)),
        "opacus": _opacus(packed, tokens),
        "default": _default(_peft(dense_copy(base)), tokens),
        "hooks": _hooks(_peft(dense_copy(base)), tokens),
        "ghost": _ghost(_peft(dense_copy(base)), tokens),
    }


def _examples(tokens: torch.Tensor) -> list[EncodedExample]:
    is_target = (torch.arange(tokens.shape[1]) > 0).numpy()
    return [EncodedExample(row.int().numpy(), is_target) for row in tokens]


def _device(
    model: LoraModel, tokens: torch.Tensor, steps_of: Callable[[LoraModel, local.LocalRun], local.Steps[Any]]
) -> Work:
    """What a device runs, whose every example is drawn."""
    size, length = tokens.shape
    plan = LocalPlan(1, 1.0, float(size), 1e-4, "sgd", length, detach_prefix=False)
    run = local.LocalRun(_examples(tokens), plan, size, partial(RandomStream.seeded, 1))
    return lambda: local.run_alone(model, steps_of(model, run))


def _plain(model: LoraModel, run: local.LocalRun) -> local.Steps[Any]:
    return local.train_adapter(model.parameters(), run, None)


def _dense(base: Base) -> Base:
    """The same model over dense weights in the type that it computes in."""
    weights = {
        f"{name}.weight": packed_base.dequantized(part.packed).to(base.compute_dtype).clone()
        for name, part in base.module.named_modules()
        if hasattr(part, "packed") and name != "lm_head"  # which shares the embedding's
    }
    weights |= {name: parameter.detach() for name, parameter in base.module.named_parameters()}
    config = base.module.config.to_dict()
    return replace(base, module=packed_base.build_module(config, weights, base.compute_dtype, base.accelerator))


def _opacus(model: LoraModel, tokens: torch.Tensor) -> Work:
    optimizer, examples = _private_sgd(model.parameters(), len(tokens)), _examples(tokens)

    def step() -> None:
        model.example_gradients(examples)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _default(model: torch.nn.Module, tokens: torch.Tensor) -> Work:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _hooks(model: torch.nn.Module, tokens: torch.Tensor) -> Work:
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    optimizer = _private_sgd([one for one in model.parameters() if one.requires_grad], len(tokens))

    def step() -> None:
        _losses(hooked, tokens).mean(1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ghost(model: torch.nn.Module, tokens: torch.Tensor) -> Work:
    hooked = GradSampleModuleFastGradientClipping(
        model,
        batch_first=True,
        loss_reduction="mean",
        strict=False,
        max_grad_norm=CLIP_NORM,
        use_ghost_clipping=True,
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-4),
        noise_multiplier=1.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=len(tokens),
        loss_reduction="mean",
    )
    criterion = DPLossFastGradientClipping(hooked, optimizer, torch.nn.CrossEntropyLoss(), "mean")

    def step() -> None:
        logits = hooked(**_inputs(tokens)).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        criterion(flat, tokens[:, 1:].reshape(-1), shape=logits.shape).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(**_inputs(tokens)).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def _inputs(tokens: torch.Tensor) -> dict[str, object]:
    """Opacus wants the batch first in every input: the positions are given once for each example."""
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return {"input_ids": tokens, "position_ids": positions, "use_cache": False}


def _private_sgd(parameters: list[torch.nn.Parameter], batch_size: int) -> DPOptimizer:
    return DPOptimizer(
        torch.optim.SGD(parameters, lr=1e-4),
        noise_multiplier=1.0,
        max_grad_norm=CLIP_NORM,
        expected_batch_size=batch_size,
    )


def _peft(dense: LlamaForCausalLM) -> torch.nn.Module:
    """As PEFT's own examples have it: A and B trained, in training mode."""
    lora = LoraConfig(
        r=SHAPE.lora_rank, lora_alpha=int(SHAPE.lora_alpha), target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    return get_peft_model(dense, lora).train()
