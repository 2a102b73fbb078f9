"""What simulations/bench_linear.py measures: the linear layers of SmolLM2-135M, packed against dense bfloat16."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from fedmini.model import native
from fedmini.model.packed_layers import PackedLinear
from fedmini.model.packing import QUANTIZATIONS, PackedMatrix

HIDDEN, KEYS, INNER, NUM_LAYERS = 576, 192, 1536, 30
SHAPES = {  # outputs, inputs
    "q": (HIDDEN, HIDDEN),
    "k": (KEYS, HIDDEN),
    "v": (KEYS, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
Layers = Sequence[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]]
Row = tuple[str, ...]


def rows(
    quantization: str, num_tokens: int, repeats: int, kernel: native.Kernel | None, dtype: torch.dtype
) -> list[Row]:
    """A table's rows for one format: a step in the compiled kernel and in plain torch against the dense one, in turn."""
    generator = torch.Generator().manual_seed(0)
    packed = packed_layers(quantization, generator)
    dense = dense_layers(packed, dtype)
    x = torch.randn((num_tokens, HIDDEN), generator=generator).to(dtype)
    work: dict[str, Callable[[], None]] = {"dense": lambda: step(dense, x)}
    for name, used in (("C++", kernel), ("torch", None)):
        if used is not None or name == "torch":
            work[name] = with_kernel(used, lambda: step(packed, x))
            work[f"{name}, dequantising"] = with_kernel(used, lambda: _dequantise(packed, dtype))
    cpu, wall = measure(work, repeats)
    return [
        (
            quantization,
            name,
            _ratio(cpu[name], cpu["dense"]),
            _ratio(wall[name], wall["dense"]),
            f"{1e3 * statistics.median(cpu[name]):.0f} / {1e3 * statistics.median(cpu['dense']):.0f} ms",
            f"{1e3 * statistics.median(cpu[f'{name}, dequantising']):.0f} ms",
            {"C++": "1.03", "torch": "1.12"}[name],
        )
        for name in ("C++", "torch")
        if name in work
    ]


def packed_layers(quantization: str, generator: torch.Generator) -> list[dict[str, PackedLinear]]:
    """Every linear layer of the model, with weights of about the size of real ones."""
    return [
        {name: PackedLinear(_random_matrix(quantization, shape, generator)) for name, shape in SHAPES.items()}
        for _ in range(NUM_LAYERS)
    ]


def _random_matrix(quantization: str, shape: tuple[int, int], generator: torch.Generator) -> PackedMatrix:
    num_outputs, num_inputs = shape
    kind = QUANTIZATIONS[quantization]
    num_blocks = num_inputs // kind.block
    values = torch.randint(0, 256, (num_blocks, kind.stored, num_outputs), dtype=torch.uint8, generator=generator)
    largest = 127 if kind.levels is None else max(kind.levels)
    scales = torch.rand((num_blocks, num_outputs), generator=generator).mul_(0.1 / largest)
    minimums = scales.mul(-largest / 2).half() if quantization == "Q4_1" else None
    return PackedMatrix(
        quantization,
        values.view(torch.int8) if kind.levels is None else values,
        scales if quantization == "NF4" else scales.half(),
        minimums,
    )


def dense_layers(packed: Sequence[Mapping[str, PackedLinear]], dtype: torch.dtype) -> list[dict[str, nn.Linear]]:
    """The same weights, held as transformers holds them."""
    dense: list[dict[str, nn.Linear]] = []
    for layer in packed:
        dense.append({})
        for name, linear in layer.items():
            dense[-1][name] = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            weight = linear.weight.to(dtype).contiguous()
            dense[-1][name].weight = nn.Parameter(weight, requires_grad=False)
    return dense


def step(layers: Layers, x: torch.Tensor) -> None:
    """Forward and backward, (tokens, hidden), through every layer as a Llama lays them out, without attention and norms."""
    first = hidden = x.detach().requires_grad_()  # as where an adapter sits below: every layer passes a gradient on
    for layer in layers:
        key, value = layer["k"](hidden), layer["v"](hidden)
        hidden = hidden + layer["o"](layer["q"](hidden) + torch.cat((key, value, key), dim=-1))
        hidden = hidden + layer["down"](layer["gate"](hidden) * layer["up"](hidden))
        hidden = hidden * 0.5  # keeps random layers from growing
    hidden.sum().backward()
    assert first.grad is not None


def _dequantise(layers: Sequence[Mapping[str, PackedLinear]], dtype: torch.dtype) -> None:
    for layer in layers:
        for linear in layer.values():
            linear.packed.transposed(dtype)


def with_kernel(kernel: native.Kernel | None, work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with native.using(kernel):
            work()

    return run


def measure(
    work: Mapping[str, Callable[[], None]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU and wall seconds of each, in turn in every round, after one that warms up."""
    cpu: dict[str, list[float]] = {name: [] for name in work}
    wall: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, run in work.items():
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            run()
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    return {name: times[1:] for name, times in cpu.items()}, {name: times[1:] for name, times in wall.items()}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the rounds' ratios, and where their middle half lies."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
