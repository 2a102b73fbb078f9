import importlib.util

import pytest
import tiny_llama
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedmini.errors import ConfigError
from fedmini.model import nf4
from fedmini.model.packed_layers import PackedLinear
from fedmini.model.packing import QUANTIZATIONS, PackedMatrix

LEVELS = torch.tensor(QUANTIZATIONS["NF4"].levels)


def weights(num_outputs, num_blocks, seed, dtype=torch.float32):
    return torch.randn((num_outputs, 64 * num_blocks), generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    num_outputs=st.integers(1, 20),
    num_blocks=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_number_becomes_the_nearest_level_of_its_block(num_outputs, num_blocks, seed, dtype):
    weight = weights(num_outputs, num_blocks, seed, dtype)
    largest = weight.float().view(num_outputs, num_blocks, 64).abs().amax(dim=-1, keepdim=True)  # (outputs, blocks, 1)

    packed = nf4.pack(weight)

    assert packed.shape == weight.shape
    found = packed.transposed(torch.float32).t().reshape(num_outputs, num_blocks, 64)
    off = (found - weight.float().view(found.shape)).abs()
    nearest = (weight.float().view(*found.shape, 1) - LEVELS * largest.unsqueeze(-1)).abs().amin(dim=-1)
    assert (off <= nearest + 1e-6 * largest).all()
    assert (off <= 0.152 * largest).all()


def test_a_block_is_scaled_by_the_largest_of_its_own_numbers_which_stays_exact():
    weight = torch.zeros(2, 128)
    weight[0, 5], weight[0, 100], weight[1, 127] = -3.0, 0.5, 7.0

    packed = nf4.pack(weight)

    assert packed.scales.tolist() == [[3.0, 0.0], [0.5, 7.0]]  # (blocks, outputs)
    assert torch.equal(packed.transposed(torch.float32).t(), weight)


def test_sixty_four_numbers_take_thirty_six_bytes():
    packed = nf4.pack(weights(48, 2, 0))

    assert packed.values.nbytes + packed.scales.nbytes == 48 * 2 * 36


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_the_layers_name(wrong):
    module = tiny_model()
    module.block[0].weight.data[3, 7] = wrong

    with pytest.raises(ConfigError, match=r"block\.0: the weight holds a number that is not finite"):
        nf4.pack_linears(module)


def tiny_model():
    module = nn.Module()
    module.block = nn.Sequential(nn.Linear(128, 48), nn.Linear(48, 64, bias=False), nn.Linear(64, 16, bias=False))
    module.lm_head = nn.Linear(64, 8)
    return module.requires_grad_(False)


def test_the_linear_layers_are_packed_in_place_but_for_the_head_and_what_does_not_divide():
    module, before = tiny_model(), tiny_model()
    before.load_state_dict(module.state_dict())
    x = torch.randn((3, 128), generator=torch.Generator().manual_seed(0))

    nf4.pack_linears(module)

    assert [type(layer) for layer in module.block] == [PackedLinear, nn.Linear, PackedLinear]
    assert type(module.lm_head) is nn.Linear
    assert module.block[0].bias is not None
    expected = nn.functional.linear(x, module.block[0].weight, before.block[0].bias)
    torch.testing.assert_close(module.block[0](x), expected)
    assert (module.block[0].weight - before.block[0].weight).abs().max() < 0.152 * before.block[0].weight.abs().max()


def test_a_whole_model_still_answers_and_passes_gradients_on():
    module = tiny_llama.llama()
    tokens = torch.tensor([[5, 9, 40, 12]])
    before = module(tokens).logits

    nf4.pack_linears(module)
    embedded = module.get_input_embeddings()(tokens).requires_grad_()
    after = module(inputs_embeds=embedded).logits
    after.sum().backward()

    assert isinstance(module.model.layers[0].mlp.down_proj, PackedLinear)  # 64 inputs; the others have 32
    assert nn.functional.cosine_similarity(after.flatten(), before.flatten(), dim=0) > 0.95
    assert embedded.grad.isfinite().all() and embedded.grad.abs().sum() > 0


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_packs_and_dequantises_to_the_same_bits(dtype):
    from bitsandbytes import functional

    weight = weights(35, 3, 0, dtype)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    index = torch.stack((theirs.view(-1) >> 4, theirs.view(-1) & 15), dim=-1).view(35, 3, 64)
    low, high = index.split(32, dim=-1)
    repacked = PackedMatrix(
        "NF4", (low | high << 4).permute(1, 2, 0).contiguous(), state.absmax.view(35, 3).t().contiguous(), None
    )

    packed = nf4.pack(weight)

    assert torch.equal(packed.values, repacked.values)
    assert torch.equal(packed.scales, repacked.scales)
    assert torch.equal(packed.transposed(dtype).t(), functional.dequantize_4bit(theirs, state))
