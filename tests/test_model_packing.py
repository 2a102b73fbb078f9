import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.model.packed_layers import PackedEmbedding, PackedHead, PackedLinear
from fedmini.model.packing import pack_matrix, pack_rows

FORMATS = ("Q4_0", "Q4_1", "Q8_0")


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
    return values.contiguous().view(torch.int32)


sizes = {"num_rows": st.integers(1, 40), "num_blocks": st.integers(1, 5), "seed": st.integers(0, 2**32 - 1)}


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
    assert torch.equal(bits(embedding.dense(torch.float32, chunk_rows=7)), bits(expected))
    assert torch.equal(bits(embedding.rows(chosen)), bits(expected[chosen]))


@pytest.mark.parametrize("quantization", FORMATS)
@settings(max_examples=10, deadline=None)
@given(**sizes)
def test_bfloat16_values_are_the_float32_ones_rounded_once(quantization, num_rows, num_blocks, seed):
    rows = raw_rows(quantization, num_rows, num_blocks, seed)
    expected = gguf_values(quantization, rows).bfloat16()

    assert torch.equal(pack_matrix(quantization, rows).transposed(torch.bfloat16).t(), expected)
    assert torch.equal(pack_rows(quantization, rows).dense(torch.bfloat16), expected)


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_packed_linear_computes_and_differentiates_as_the_dense_one(quantization):
    values = np.random.default_rng(0).normal(0, 0.1, (48, 64)).astype(np.float32)
    rows = gguf.quants.quantize(values, gguf.GGMLQuantizationType[quantization])
    weight = gguf_values(quantization, rows)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    packed_x, dense_x = x.clone().requires_grad_(), x.clone().requires_grad_()

    packed = PackedLinear(pack_matrix(quantization, rows))(packed_x)
    dense = dense_x @ weight.t()
    packed.square().sum().backward()
    dense.square().sum().backward()

    torch.testing.assert_close(packed, dense, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed_x.grad, dense_x.grad, rtol=1e-6, atol=1e-5)


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


def test_an_embedding_and_a_head_share_one_copy_of_the_packed_rows():
    embedding = PackedEmbedding(pack_rows("Q8_0", raw_rows("Q8_0", 48, 2, 0)), torch.float32)

    head = PackedHead(embedding.packed)

    assert head.values.data_ptr() == embedding.values.data_ptr()
    assert torch.equal(embedding(torch.arange(48)), head.packed.dense(torch.float32))
