"""Whether compiled layers compute what torch computes: asked of every library that is loaded, in some milliseconds."""

import torch
from torch.nn import functional

from fedmini.model.layer_kernels import LayerKernels, LoraWeight


def agrees_with_plain_torch(kernels: LayerKernels) -> bool:
    """Whether what kernels compute of a few numbers is what torch computes, to float rounding."""
    x, other = (torch.linspace(-2, end, 2 * 5 * 20).view(2, 5, 20).sin() for end in (40.0, 70.0))
    down, up = (torch.linspace(-1, end, 3 * 20).cos() for end in (9.0, 5.0))
    a = LoraWeight(down, None, 3, 20, is_upright=False)
    b = LoraWeight(up, None, 3, 20, is_upright=True)
    hidden = kernels.lora_down(x, a)
    raised, flat = x.clone(), torch.zeros(2, 60)
    kernels.lora_up(raised, hidden, b, 0.5)
    kernels.lora_outer(other, hidden, flat, None, 0, True, 2.0)
    normed, scales = kernels.norm(x, down[:20].contiguous(), 1e-5)
    logits, targets = x.flatten(0, 1).clone(), torch.arange(10)
    causal = torch.ones(5, 20, dtype=torch.bool).tril(15)
    softened, rotated = kernels.softmax(x, 5, 0.7), kernels.by_head(x, 10, None, 0)
    slopes, raw = other.clone(), x.detach().clone().requires_grad_()
    kernels.softmax_backward(x, slopes, 5, 0.7)
    _slope((raw * 0.7).masked_fill(~causal, -torch.inf).softmax(-1), other)
    gates = x.detach().clone().requires_grad_()
    _slope(functional.silu(gates) * other, x)
    pairs = [
        (hidden, x @ down.view(3, 20).t()),
        (raised, x + 0.5 * hidden @ up.view(20, 3).t()),
        (flat.view(2, 20, 3), 2 * other.transpose(1, 2) @ hidden),
        (normed, functional.rms_norm(x, (20,), down[:20], 1e-5)),
        (kernels.norm_backward(other, x, down[:20].contiguous(), scales, x), x + _norm_slope(x, other * down[:20])),
        (softened, (x * 0.7).masked_fill(~causal, -torch.inf).softmax(-1)),
        (slopes, _present(raw.grad)),
        (kernels.gate(x, other), functional.silu(x) * other),
        (kernels.gate_backward(x, x, other)[0], _present(gates.grad)),
        (kernels.loss(logits, targets), functional.cross_entropy(x.flatten(0, 1), targets, reduction="none")),
        (logits, x.flatten(0, 1).softmax(1) - functional.one_hot(targets, 20)),
        (rotated, x.view(2, 5, 2, 10).transpose(1, 2)),
        (kernels.by_token(rotated, None, 0), x),
    ]
    return all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) for ours, theirs in pairs)


def _norm_slope(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    _slope(functional.rms_norm(leaf, x.shape[-1:], eps=1e-5), gradient)
    return _present(leaf.grad)


def _slope(answer: torch.Tensor, gradient: torch.Tensor) -> None:
    (answer * gradient).sum().backward()  # type: ignore[no-untyped-call]


def _present(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient
