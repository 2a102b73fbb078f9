import copy
import gc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fedmini.model import native, nf4
from fedmini.model.packed_layers import PackedEmbedding, PackedHead, PackedLinear
from fedmini.model.packing import QUANTIZATIONS, PackedMatrix, pack_matrix, pack_rows

FORMATS = ("Q4_0", "Q4_1", "Q8_0")


@pytest.fixture(params=["compiled", "plain torch"], scope="module", autouse=True)
def dequantised_by(request, compiled_kernel):
    """Every test here is about both."""
    if request.param == "compiled" and compiled_kernel is None:
        pytest.skip("there is no compiler here")
    with native.using(compiled_kernel if request.param == "compiled" else None):
        yield


def raw_rows(quantization, num_rows, num_blocks, seed):
    """Arbitrary blocks, with any finite float16 as scale and minimum: also those no quantiser would write."""
    random = np.random.default_rng(seed)
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[quantization]
    rows = random.integers(0, 256, (num_rows, num_blocks, size)).astype(np.uint8)
    num_heads = 2 if quantization == "Q4_1" else 1
    heads = random.integers(0, 0x7C00, (num_rows, num_blocks, num_heads)).astype(np.uint16)
    heads |= random.integers(0, 2, heads.shape).astype(np.uint16) << 15
    rows[:, :, : 2 * num_heads] = heads.view(np.uint8)
    return rows.reshape(num_rows, -1)


def gguf_values(quantization, rows):
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[quantization]))


def bits(values):
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def raw_nf4(num_outputs, num_blocks, seed):
    """Arbitrary nibbles, and any finite float32 as scale, with what they mean as numpy says it: (num_outputs, num_inputs)."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (num_blocks, 32, num_outputs)).astype(np.uint8)
    scales = random.integers(0, 0x7F800000, (num_blocks, num_outputs)).astype(np.uint32).view(np.float32)
    index = np.concatenate((values & 15, values >> 4), axis=1)  # (blocks, 64, outputs)
    numbers = np.array(QUANTIZATIONS["NF4"].levels, np.float32)[index] * scales[:, None, :]
    packed = PackedMatrix("NF4", torch.from_numpy(values), torch.from_numpy(scales), None)
    return packed, torch.from_numpy(numbers.reshape(-1, num_outputs).T.copy())


sizes = {"num_rows": st.integers(1, 80), "num_blocks": st.integers(1, 5), "seed": st.integers(0, 2**32 - 1)}


@pytest.mark.parametrize("quantization", FORMATS)
@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_dequantised_values_are_the_ggufs_own_bit_for_bit(quantization, num_rows, num_blocks, seed):
    rows = raw_rows(quantization, num_rows, num_blocks, seed)
    expected = gguf_values(quantization, rows)

    matrix = pack_matrix(quantization, rows)
    embedding = pack_rows(quantization, rows)

    assert matrix.shape == embedding.shape == expected.shape
    chosen = torch.tensor([[0, num_rows - 1]])
    assert torch.equal(bits(matrix.transposed(torch.float32).t()), bits(expected))
    assert torch.equal(bits(embedding.dense(torch.float32)), bits(expected))
    assert torch.equal(bits(embedding.rows(chosen)), bits(expected[chosen]))


@pytest.mark.parametrize("quantization", FORMATS)
@settings(max_examples=10, deadline=None)
@given(**sizes)
def test_bfloat16_values_are_the_float32_ones_rounded_once(quantization, num_rows, num_blocks, seed):
    rows = raw_rows(quantization, num_rows, num_blocks, seed)
    expected = gguf_values(quantization, rows).bfloat16()

    assert torch.equal(bits(pack_matrix(quantization, rows).transposed(torch.bfloat16).t()), bits(expected))
    assert torch.equal(bits(pack_rows(quantization, rows).dense(torch.bfloat16)), bits(expected))


@settings(max_examples=40, deadline=None)
@given(num_outputs=st.integers(1, 80), num_blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_nf4_values_are_levels_times_scales_bit_for_bit(num_outputs, num_blocks, seed):
    packed, expected = raw_nf4(num_outputs, num_blocks, seed)

    assert packed.shape == expected.shape
    assert torch.equal(bits(packed.transposed(torch.float32).t()), bits(expected))
    assert torch.equal(bits(packed.transposed(torch.bfloat16).t()), bits(expected.bfloat16()))


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize(("num_rows", "num_blocks"), [(1037, 2), (3, 1030)])
def test_sizes_beyond_what_is_done_at_once_change_nothing(quantization, num_rows, num_blocks):
    rows = raw_rows(quantization, num_rows, num_blocks, 0)
    expected = gguf_values(quantization, rows)

    assert torch.equal(bits(pack_matrix(quantization, rows).transposed(torch.float32).t()), bits(expected))
    assert torch.equal(bits(pack_rows(quantization, rows).dense(torch.float32)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype):
    rows = raw_rows("Q4_1", 600, 32, 0)
    matrix, embedding = pack_matrix("Q4_1", rows), pack_rows("Q4_1", rows)
    alone = matrix.transposed(dtype).clone(), embedding.dense(dtype)

    torch.set_num_threads(2)

    assert torch.equal(bits(matrix.transposed(dtype)), bits(alone[0]))
    assert torch.equal(bits(embedding.dense(dtype)), bits(alone[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_no_number_makes_none_of_its_block(dtype):
    """All ones: rounded to bfloat16 as if it were a number, it would be a zero."""
    rows = raw_rows("Q8_0", 40, 2, 0)
    rows[3, :2] = np.array([0x7FFF], np.uint16).view(np.uint8)

    matrix, embedding = pack_matrix("Q8_0", rows).transposed(dtype).t(), pack_rows("Q8_0", rows).dense(dtype)

    for weight in (matrix, embedding):
        assert weight[3, :32].isnan().all()
        assert weight.isnan().sum() == 32


def twins(weight, bias):
    """Dense layers that hold a weight as transformers does, and transposed."""
    layers = [torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype) for _ in range(2)]
    layers[0].weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    layers[1].weight = torch.nn.Parameter(weight.t().contiguous().t(), requires_grad=False)
    layers[0].bias = layers[1].bias = bias
    return layers


def answer_and_gradient(layer, x):
    x = x.clone().requires_grad_()
    answer = layer(x)
    answer.square().sum().backward()
    return answer.detach(), x.grad


@pytest.mark.parametrize("quantization", (*FORMATS, "NF4"))
@settings(max_examples=15, deadline=None)
@given(
    num_outputs=st.integers(1, 80),
    num_blocks=st.integers(1, 4),
    shape=st.sampled_from([(), (1,), (7,), (0,), (3, 5), (2, 1, 3)]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_packed_linear_computes_and_differentiates_as_the_dense_one(
    quantization, num_outputs, num_blocks, shape, has_bias, seed
):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((num_outputs, 64 * num_blocks), generator=generator)
    if quantization == "NF4":
        packed = nf4.pack(values)
    else:
        rows = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[quantization])
        packed = pack_matrix(quantization, rows)
    bias = torch.nn.Parameter(torch.randn(num_outputs, generator=generator), requires_grad=False) if has_bias else None
    layer = PackedLinear(packed, bias)
    dense, transposed = twins(layer.weight, bias)
    x = torch.randn((*shape, 64 * num_blocks), generator=generator)

    answer, gradient = answer_and_gradient(layer, x)

    # The same product of the same bits in the same order: nothing may differ. In the other order a matrix library may add
    # up in another one.
    for ours, theirs in zip((answer, gradient), answer_and_gradient(transposed, x), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip((answer, gradient), answer_and_gradient(dense, x), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_a_packed_linear_differentiates_in_bfloat16_as_the_dense_one():
    layer = PackedLinear(pack_matrix("Q4_1", raw_rows_of_weights("Q4_1", 48, 64)))
    _, transposed = twins(layer.weight.bfloat16(), None)
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(0)).bfloat16()

    for ours, theirs in zip(answer_and_gradient(layer, x), answer_and_gradient(transposed, x), strict=True):
        assert torch.equal(ours, theirs)


def raw_rows_of_weights(quantization, num_outputs, num_inputs):
    values = np.random.default_rng(0).normal(0, 0.1, (num_outputs, num_inputs)).astype(np.float32)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[quantization])


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
def test_layers_that_share_memory_differentiate_as_dense_ones_do(checkpointing):
    """They all dequantise into the same place: each must fill it anew before it is read."""
    first = PackedLinear(pack_matrix("Q4_1", raw_rows_of_weights("Q4_1", 64, 64)))
    second = PackedLinear(pack_matrix("Q4_0", raw_rows_of_weights("Q4_0", 64, 64)))
    _, first_dense = twins(first.weight, None)
    _, second_dense = twins(second.weight, None)
    x = torch.randn((5, 64), generator=torch.Generator().manual_seed(0))

    def packed(x):
        return second(first(x).relu())

    def run(x):
        return checkpoint(packed, x, use_reentrant=checkpointing == "reentrant") if checkpointing else packed(x)

    found = answer_and_gradient(run, x)
    expected = answer_and_gradient(lambda x: second_dense(first_dense(x).relu()), x)

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_autograd_keeps_no_dense_weight_not_even_for_an_input_in_several_pieces():
    layer = PackedLinear(pack_matrix("Q8_0", raw_rows("Q8_0", 48, 2, 0)))
    x = torch.randn(5, 3, 64).transpose(0, 1).requires_grad_()
    layer(x)  # the memory that all layers share is there from now on
    before = large_tensors()

    answer = layer(x)

    assert answer.requires_grad
    assert large_tensors() == before


def large_tensors():
    """How many tensors there are that could hold the weight."""
    gc.collect()
    return sum(type(one) is torch.Tensor and one.numel() >= 48 * 64 for one in gc.get_objects())


def test_a_packed_linear_has_nothing_to_train_and_holds_no_dense_weight():
    layer = PackedLinear(pack_matrix("Q4_1", raw_rows("Q4_1", 32, 2, 0)))

    assert list(layer.parameters()) == []
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 32 * 64 * 5 // 8  # 4 bits and a share of 2 x 16


def test_holding_a_layer_dense_changes_no_bit_of_its_answers():
    layer = PackedLinear(pack_matrix("Q4_1", raw_rows("Q4_1", 32, 2, 0)))
    head = PackedHead(pack_rows("Q8_0", raw_rows("Q8_0", 48, 2, 0)))
    x = torch.randn(2, 64)
    before = layer(x), head(x)

    layer.hold_dense(torch.float32)
    head.hold_dense(torch.float32)
    held = layer(x), head(x)
    layer.hold_dense(None)

    assert torch.equal(held[0], before[0])
    torch.testing.assert_close(held[1], before[1])
    assert layer._held is None


def test_a_copy_of_a_layer_that_was_used_reads_its_own_memory():
    layer = PackedLinear(pack_matrix("Q4_1", raw_rows_of_weights("Q4_1", 32, 64)))
    x = torch.randn(2, 64)
    expected = layer(x)

    copied = copy.deepcopy(layer)
    layer.scales.zero_()

    assert torch.equal(copied(x), expected)
    assert not torch.equal(layer(x), expected)
    assert copied.packed.values is copied.values


def test_an_embedding_and_a_head_share_one_copy_of_the_packed_rows():
    embedding = PackedEmbedding(pack_rows("Q8_0", raw_rows("Q8_0", 48, 2, 0)), torch.float32)

    head = PackedHead(embedding.packed)

    assert head.values.data_ptr() == embedding.values.data_ptr()
    assert torch.equal(embedding(torch.arange(48)), head.packed.dense(torch.float32))
