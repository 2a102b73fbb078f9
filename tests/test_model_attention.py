import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.model import attention


def attend(query, key, value):
    return attention.attend(query, key, value, scaling=0.3)


def reference(query, key, value):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), key_heads=st.integers(1, 3), shared=st.integers(1, 3), length=st.integers(1, 20))
def test_short_attention_equals_the_fused_one_and_so_does_its_gradient(batch, key_heads, shared, length):
    generator = torch.Generator().manual_seed(length)

    def random(heads):
        # Laid out as a projection leaves it: heads inside positions.
        return torch.randn(batch, length, heads, 8, generator=generator).transpose(1, 2)

    inputs = [random(key_heads * shared), random(key_heads), random(key_heads)]
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.clone().requires_grad_() for tensor in inputs]
    weights = random(key_heads * shared)

    (attend(*ours) * weights).sum().backward()
    (reference(*theirs) * weights).sum().backward()

    torch.testing.assert_close(attend(*ours), reference(*theirs), rtol=1e-5, atol=1e-6)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [5, attention.LONGEST + 1])
def test_long_sequences_and_answers_without_gradients_use_the_fused_kernel_with_the_same_result(length):
    query, key, value = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3))

    with torch.no_grad():
        without = attend(query, key, value)

    torch.testing.assert_close(attend(query, key, value), without, rtol=1e-5, atol=1e-6)
