"""fedmini's own Llama against transformers' with PEFT, and its compiled layers against plain torch."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedmini.config import BaseSection
from fedmini.model import fast_layers, native, together
from fedmini.model.attention import KeyValueCache
from fedmini.model.frozen_layers import StatesInMemory
from fedmini.model.gradients import Devices, Recording
from fedmini.model.layer_kernels import LayerKernels, LoraWeight
from fedmini.model.llama import Llama
from fedmini.model.loading import load_base
from fedmini.model.lora import LoraModel
from fedmini.model.packing import PackedMatrix
from fedmini.types import LoraShape
from tests import autograd_reference, tiny_llama

EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = ("compiled", "plain")
TOKENS = torch.tensor([[5, 9, 40, 12, 7, 33], [8, 3, 3, 60, 21, 9]])


@pytest.fixture(autouse=True)
def _kernel(compiled_kernel: native.Kernel | None) -> None:
    """Where there is a compiler, it is used unless a test says otherwise."""


@contextmanager
def computed(way: str, kernel: native.Kernel | None) -> Iterator[None]:
    if way == "compiled" and kernel is None:
        pytest.skip("there is no compiler here")
    with native.using(kernel if way == "compiled" else None):
        yield


def models(shape: LoraShape, **options: Any) -> tuple[LoraModel, LoraModel]:
    """Ours and transformers' with PEFT, with the same numbers in their adapters."""
    both = LoraModel(tiny_llama.our_base(), shape, **options), LoraModel(tiny_llama.base(), shape, **options)
    for model in both:
        tiny_llama.with_random_adapter(model)
    return both


def a_shape(**changes: Any) -> LoraShape:
    settings = {"rank": 3, "targets": EVERYTHING, "trained": "AB"} | changes
    return LoraShape(settings["rank"], 4.0, settings["targets"], settings.get("layers"), settings["trained"], 0)


def assert_same_rows(found: torch.Tensor, expected: torch.Tensor, relative: float = 3e-6) -> None:
    assert found.shape == expected.shape
    for ours, theirs in zip(found.double(), expected.double(), strict=True):
        assert (ours - theirs).norm() <= relative * max(0.1, float(theirs.norm()))


@pytest.mark.parametrize("way", WAYS)
def test_the_answers_are_those_of_transformers_and_an_adapter_fits_both(way, compiled_kernel):
    ours, theirs = models(a_shape())

    assert isinstance(ours.module, Llama) and ours.template == theirs.template
    with computed(way, compiled_kernel):
        torch.testing.assert_close(ours.module(TOKENS).logits, theirs.module(TOKENS).logits, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(ours.module(TOKENS).logits, theirs.module(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25)
@given(
    rank=st.sampled_from([1, 2, 3, 8, 12, 17]),
    targets=st.sets(st.sampled_from(EVERYTHING), min_size=1),
    layers=st.sampled_from([None, (0,), (1,)]),
    trained=st.sampled_from(["B", "AB"]),
    lengths=st.lists(st.integers(3, 40), min_size=0, max_size=4),
    checkpointing=st.booleans(),
)
def test_gradients_of_each_example_are_those_that_autograd_finds_in_transformers_model(
    way, compiled_kernel, rank, targets, layers, trained, lengths, checkpointing
):
    shape = a_shape(rank=rank, targets=tuple(sorted(targets)), layers=layers, trained=trained)
    ours, theirs = models(shape, checkpointing=checkpointing)
    examples = tiny_llama.examples(tuple(lengths), seed=rank)
    expected = torch.zeros(len(examples), ours.num_parameters)
    losses = np.zeros(len(examples))
    for row, example in enumerate(examples):
        losses[row] = autograd_reference.mean_loss_gradient(theirs, [example])[0]
        expected[row] = torch.cat([parameter.grad.flatten() for parameter in theirs.parameters()])

    with computed(way, compiled_kernel):
        found = ours.example_gradients(examples)
        mean, of_mean = ours.mean_gradient(examples)

    assert_same_rows(found.gradients, expected)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(of_mean, losses, rtol=1e-5)
    if examples:
        assert_same_rows(mean[None], expected.mean(0, keepdim=True), relative=1e-5)
    else:
        assert not mean.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", ["B", "AB"])
@pytest.mark.parametrize("of_mean", [False, True])
@pytest.mark.parametrize("lengths", [((9, 9), (9, 9), (9, 9)), ((5, 9, 7), (12,), (), (8, 21))])
def test_devices_with_adapters_of_their_own_are_computed_together_as_alone(
    way, compiled_kernel, trained, of_mean, lengths
):
    model = LoraModel(tiny_llama.our_base(), a_shape(trained=trained))
    adapters, requests = [], []
    for seed, of_device in enumerate(lengths):
        tiny_llama.with_random_adapter(model, seed)
        adapters.append(model.copies())
        requests.append(together.GradientRequest(tiny_llama.examples(of_device, seed), adapters[-1], of_mean))

    with computed(way, compiled_kernel):
        found = together.answer_together(model, requests, tokens_at_once=60)
        for parameters, request, answer in zip(adapters, requests, found, strict=True):
            with torch.no_grad():
                for own, value in zip(model.parameters(), parameters, strict=True):
                    own.copy_(value)
            expected = together.answer_alone(model, request)
            assert_same_rows(answer.rows, expected.rows, relative=5e-6)
            np.testing.assert_allclose(answer.losses, expected.losses, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_detached_prefix_is_read_once_and_changes_only_where_gradients_stop(way, compiled_kernel):
    shape = a_shape(trained="B")
    (example,) = tiny_llama.examples((20,))
    example.is_target[:8] = False
    prefix = tuple(int(token) for token in example.tokens[:6])
    ours, theirs = models(shape, detached_prefix=prefix)
    expected = theirs.example_gradients([example, example])

    with computed(way, compiled_kernel):
        found = ours.example_gradients([example, example])
        assert ours.mean_losses([example], 1) == pytest.approx(theirs.mean_losses([example], 1), rel=1e-5)

    assert_same_rows(found.gradients, expected.gradients)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_lower_layers_are_kept(way, compiled_kernel):
    model, examples = LoraModel(tiny_llama.our_base(), a_shape(layers=(1,))), tiny_llama.examples((7, 12))

    with computed(way, compiled_kernel):
        expected = model.example_gradients(examples).gradients.clone()
        assert model.keep_states(StatesInMemory(10**6)).num_layers == 1
        for _ in range(2):  # computed and kept, then read
            assert_same_rows(model.example_gradients(examples).gradients, expected)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_visible_in_the_gradient(way, compiled_kernel):
    model, examples = LoraModel(tiny_llama.our_base(), a_shape()), tiny_llama.examples((7, 12))
    with torch.no_grad():
        model.parameters()[0][0, 0] = torch.nan

    with computed(way, compiled_kernel):
        found = model.example_gradients(examples)

    assert not torch.isfinite(found.gradients).all(dim=1).any() and not np.isfinite(found.losses).any()


def test_bfloat16_with_compiled_layers_is_as_near_to_float32_as_in_plain_torch(compiled_kernel):
    def gradients(dtype: torch.dtype) -> torch.Tensor:
        model = tiny_llama.with_random_adapter(LoraModel(tiny_llama.our_base(compute_dtype=dtype), a_shape()))
        return model.example_gradients(tiny_llama.examples((30, 40, 17))).gradients

    with computed("plain", compiled_kernel):
        exact, plain = gradients(torch.float32), gradients(torch.bfloat16)
    with computed("compiled", compiled_kernel):
        compiled = gradients(torch.bfloat16)

    error, error_of_plain = ((found - exact).norm() / exact.norm() for found in (compiled, plain))
    assert error < 0.06 and error < 1.3 * error_of_plain


@given(
    num_examples=st.integers(1, 4),
    length=st.integers(1, 70),
    size=st.integers(1, 70),
    rank=st.integers(1, 17),
    is_upright=st.booleans(),
    num_owners=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60)
def test_lora_kernels_of_any_shape(compiled_kernel, num_examples, length, size, rank, is_upright, num_owners, dtype):
    kernels = the_layers(compiled_kernel)
    draw = torch.Generator().manual_seed(size)
    x = torch.randn(num_examples, length, size, generator=draw).to(dtype)
    values = torch.randn(max(1, num_owners), 5 + rank * size, generator=draw)
    owners = torch.randint(num_owners, (num_examples,), generator=draw) if num_owners else None
    shape = (size, rank) if is_upright else (rank, size)
    weight = LoraWeight(
        values if num_owners else values[0, 5:].clone(), owners, rank, size, is_upright, 5 * bool(num_owners)
    )
    own = values[owners if num_owners else torch.zeros(num_examples, dtype=torch.int64), 5:].view(num_examples, *shape)
    own = own.transpose(1, 2) if is_upright else own  # (examples, rank, size)
    wide, loose = x.float(), (1e-2 if dtype == torch.bfloat16 else 1e-5)

    hidden = kernels.lora_down(x, weight)
    raised = x.clone()
    kernels.lora_up(raised, hidden, weight, 0.3)
    flat = torch.ones(3, 7 + rank * size)
    rows = torch.randint(3, (num_examples,), generator=draw)
    kernels.lora_outer(x, hidden, flat, rows, 7, is_upright, 0.3)

    torch.testing.assert_close(hidden, wide @ own.transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raised.float(), wide + 0.3 * hidden @ own, rtol=loose, atol=1e-4)
    products = (0.3 * hidden.transpose(1, 2) @ wide).view(num_examples, rank, size)
    expected = torch.ones_like(flat)
    expected[:, 7:].index_add_(0, rows, (products.transpose(1, 2) if is_upright else products).flatten(1))
    torch.testing.assert_close(flat, expected, rtol=1e-4, atol=1e-3)


@given(size=st.integers(1, 70), length=st.integers(1, 20), prefix=st.integers(0, 20), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_other_kernels_of_any_shape(compiled_kernel, size, length, prefix, seed):
    kernels = the_layers(compiled_kernel)
    draw = torch.Generator().manual_seed(seed)
    x, other, past = (torch.randn(2, length, size, generator=draw) * 3 for _ in range(3))
    weight = torch.randn(size, generator=draw)
    leaf = x.clone().requires_grad_()
    normed = functional.rms_norm(leaf, (size,), weight, 1e-5)
    normed.backward(other)

    ours, scales = kernels.norm(x, weight, 1e-5)
    to_x = kernels.norm_backward(other, x, weight, scales, past)
    torch.testing.assert_close(ours, normed.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_x, leaf.grad + past, rtol=1e-3, atol=1e-4)

    scores, gradient = (torch.randn(3 * length, prefix + length, generator=draw) * 4 for _ in range(2))
    hidden = torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix).repeat(3, 1).logical_not()
    leaf = scores.clone().requires_grad_()
    expected = (leaf * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
    expected.backward(gradient)
    torch.testing.assert_close(kernels.softmax(scores, length, 0.3), expected.detach(), rtol=1e-4, atol=1e-6)
    again = kernels.softmax_backward(scores, gradient, length, 0.3)
    torch.testing.assert_close(again, expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-3, atol=1e-5)

    gate, up = x.clone().requires_grad_(), other.clone().requires_grad_()
    (functional.silu(gate) * up).backward(past)
    to_gate, to_up = kernels.gate_backward(past, x, other)
    torch.testing.assert_close(kernels.gate(x, other), functional.silu(x) * other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_gate, gate.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(to_up, up.grad, rtol=1e-3, atol=1e-4)

    targets = torch.randint(size, (length,), generator=draw)
    logits = x[0].clone()
    losses = kernels.loss(logits, targets)
    torch.testing.assert_close(losses, functional.cross_entropy(x[0], targets, reduction="none"), rtol=1e-4, atol=1e-5)
    expected = x[0].softmax(-1) - functional.one_hot(targets, size)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 300.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_treat_the_ends_of_the_numbers_as_torch_does(compiled_kernel, number, dtype):
    kernels = the_layers(compiled_kernel)
    x, other = torch.linspace(-2, 2, 40).view(1, 2, 20).to(dtype), torch.ones(1, 2, 20, dtype=dtype)
    x[0, 0, 3] = number

    gated, expected = kernels.gate(x, other), functional.silu(x)
    assert torch.equal(gated.isfinite(), expected.isfinite())
    torch.testing.assert_close(gated[expected.isfinite()], expected[expected.isfinite()], rtol=2e-2, atol=1e-6)
    logits = x[0].clone()
    losses = kernels.loss(logits, torch.tensor([1, 1]))
    expected = functional.cross_entropy(x[0].float(), torch.tensor([1, 1]), reduction="none")
    torch.testing.assert_close(losses, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_kernels_refuse_what_they_would_read_beside(compiled_kernel):
    kernels = the_layers(compiled_kernel)
    x = torch.ones(2, 3, 20)

    with pytest.raises(ValueError, match="in one piece"):
        kernels.gate(x.transpose(0, 1), x.transpose(0, 1))
    with pytest.raises(IndexError, match="beyond the 20 words"):
        kernels.loss(torch.zeros(1, 20), torch.tensor([20]))
    with pytest.raises(ValueError, match="no room"):
        kernels.lora_outer(x, torch.ones(2, 3, 4), torch.zeros(2, 79), None, 0, True, 1.0)
    with pytest.raises(ValueError, match="don't fit"):
        kernels.by_head(x, 10, torch.ones(2, 2, 5), 0)
    short, hidden = torch.ones(2, 3, 19), torch.ones(2, 3, 4)
    weight = LoraWeight(torch.ones(80), None, 4, 20, False)
    wrong = (
        lambda: kernels.gate(x, short),
        lambda: kernels.gate_backward(short, x, x),
        lambda: kernels.norm(x, torch.ones(19), 1e-5),
        lambda: kernels.norm_backward(x, x, torch.ones(20), torch.ones(5), None),
        lambda: kernels.norm_backward(x, x, torch.ones(20), torch.ones(6), short),
        lambda: kernels.softmax(x, 21, 1.0),
        lambda: kernels.softmax_backward(x, short, 3, 1.0),
        lambda: kernels.by_head(x, 12, None, 0),
        lambda: kernels.lora_down(short, weight),
        lambda: kernels.lora_down(x, replace(weight, values=torch.ones(79))),
        lambda: kernels.lora_down(
            x, replace(weight, values=torch.ones(2, 80), owners=torch.zeros(1, dtype=torch.int64))
        ),
        lambda: kernels.lora_up(x, hidden.bfloat16(), weight, 1.0),
        lambda: kernels.lora_up(x, hidden[:1], weight, 1.0),
        lambda: kernels.lora_outer(x, hidden, torch.zeros(2, 80), None, -1, True, 1.0),
        lambda: kernels.lora_outer(x, hidden, torch.zeros(2, 80), torch.zeros(1, dtype=torch.int64), 0, True, 1.0),
    )
    for index, call in enumerate(wrong):
        with pytest.raises(ValueError):
            call()
            pytest.fail(f"number {index} was taken")
    beside = torch.tensor([0, 2])
    with pytest.raises(IndexError, match="rows from 0 to 1"):
        Devices(torch.zeros(2, 80), beside, None)
    with pytest.raises(IndexError, match="rows from 0 to 1"):
        Recording(torch.zeros(2, 80), rows=beside)


def test_a_device_computes_without_transformers_and_peft(tmp_path):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    script = (
        "import sys; from pathlib import Path; from fedmini.config import BaseSection; from fedmini.model import loading\n"
        "from fedmini.model.lora import LoraModel; from fedmini.types import LoraShape, EncodedExample; import numpy as np\n"
        "def step():\n"
        f"    base = loading.load_base(BaseSection(path=Path({str(path)!r})), Path({str(tmp_path)!r}), print)\n"
        "    model = LoraModel(base, LoraShape(2, 4.0, ('v_proj',), None, 'B', 0)); model.fingerprint\n"
        "    model.example_gradients([EncodedExample(np.arange(3, 9, dtype=np.int32), np.arange(6) > 1)])\n"
        f"    model.save_peft(Path({str(tmp_path / 'adapter')!r}), 'tiny')\n"
        "    ' '.join(model.reply([{'role': 'user', 'content': 'abc'}]))\n"
        "    return [name for name in ('transformers', 'peft') if name in sys.modules]\n"
        "print(step()); [sys.modules.pop(name) for name in [*sys.modules] if name.startswith(('transformers', 'peft'))]\n"
        "print(step())"  # the first one converts the tokenizer
    )

    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()

    assert said[-1] == "[]"


def test_a_cache_grows_only_where_no_gradient_is_taken_and_layer_by_layer():
    cache, heads = KeyValueCache(), torch.ones(1, 2, 3, 4)

    with pytest.raises(IndexError, match="those below it come first"):
        cache.extended(1, heads, heads)
    cache.extended(0, heads, heads)
    assert cache.length == 0
    with torch.no_grad():
        cache.extended(0, heads, heads)
        assert cache.length == 3
    assert cache.extended(0, heads, heads)[0].shape[2] == 6 and cache.length == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_is_used_before_the_next_one_is_asked_for(way, compiled_kernel, tmp_path, monkeypatch):
    """Dequantised weights share their memory: here the last one is spoilt as soon as another is asked for."""
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    base = load_base(BaseSection(path=path, compute_dtype="float32"), tmp_path / "cache", lambda note: None)
    model = tiny_llama.with_random_adapter(LoraModel(base, a_shape(), checkpointing=True))
    examples, held = tiny_llama.examples((9, 14)), []

    def spoiling(packed: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
        for weight in held:
            weight.fill_(torch.nan)
        held[:] = [dequantise(packed, dtype).clone()]
        return held[0]

    with computed(way, compiled_kernel):
        expected = model.example_gradients(examples).gradients.clone()
        dequantise = PackedMatrix.transposed
        monkeypatch.setattr(PackedMatrix, "transposed", spoiling)
        assert torch.equal(model.example_gradients(examples).gradients, expected)


def test_layers_need_a_kernel_and_its_numbers(compiled_kernel):
    with native.using(None):
        assert not fast_layers.can_do(torch.ones(1, 2, 3))
    if compiled_kernel is not None:
        with native.using(compiled_kernel):
            assert fast_layers.can_do(torch.ones(1)) and not fast_layers.can_do(torch.ones(1, dtype=torch.float64))


def test_an_example_is_computed_alike_whoever_is_beside_it(compiled_kernel):
    """Of one length: the very bits, so that one example more changes the sum by its own row alone."""
    model = tiny_llama.with_random_adapter(LoraModel(tiny_llama.our_base(), a_shape()))
    examples = tiny_llama.examples((12, 12, 12, 12))
    recording = Recording(
        torch.zeros(4, model.num_parameters), Devices(model_row(model), torch.zeros(4, dtype=torch.int64), None)
    )

    with computed("compiled", compiled_kernel):
        model.record(examples, 0, recording)
        whole = model.example_gradients(examples).gradients.clone()
        part = model.example_gradients(examples[:3]).gradients

    assert_same_rows(part, whole[:3], relative=1e-6)
    assert_same_rows(recording.flat, whole, relative=1e-6)


def model_row(model: LoraModel) -> torch.Tensor:
    return torch.from_numpy(model.flat())[None]


def the_layers(kernel: native.Kernel | None) -> LayerKernels:
    if kernel is None:
        pytest.skip("there is no compiler here")
    return kernel.layers
