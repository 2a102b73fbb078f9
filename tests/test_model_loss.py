import pytest
import tiny_llama
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmini.config import BaseSection
from fedmini.model import loading, loss
from fedmini.model.packed_layers import PackedHead


@settings(max_examples=25, deadline=None)
@given(num_targets=st.integers(1, 40), chunk_tokens=st.integers(1, 50), seed=st.integers(0, 1000))
def test_losses_and_gradients_are_those_of_plain_cross_entropy_however_it_is_chunked(num_targets, chunk_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    targets = torch.randint(0, 50, (num_targets,), generator=generator)
    weights = torch.rand(num_targets, generator=generator)
    hidden = torch.randn(num_targets, 16, generator=generator) * 4
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()

    got = loss.target_losses(ours, targets, head, chunk_tokens)
    expected = torch.nn.functional.cross_entropy(head(plain), targets, reduction="none")
    (got * weights).sum().backward()
    (expected * weights).sum().backward()

    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("piece_words", [3, 64, 4096])
def test_a_packed_head_in_pieces_gives_what_the_dense_one_gives(tmp_path, monkeypatch, piece_words):
    path = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    source = BaseSection(path=path, compute_dtype="float32")
    head = loading.load_base(source, tmp_path / "cache", lambda note: None).module.lm_head
    assert isinstance(head, PackedHead)
    dense = torch.nn.Linear(*reversed(head.packed.shape), bias=False).requires_grad_(False)
    dense.weight.copy_(head.packed.dense(torch.float32))
    targets = torch.arange(20) * 3 % head.packed.shape[0]
    hidden = torch.randn(20, head.packed.shape[1], generator=torch.Generator().manual_seed(1)) * 4
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    monkeypatch.setattr(loss, "PIECE_WORDS", piece_words)

    got = loss.target_losses(ours, targets, head, chunk_tokens=7)
    expected = torch.nn.functional.cross_entropy(dense(plain), targets, reduction="none")
    got.sum().backward()
    expected.sum().backward()

    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_a_batch_predicts_each_target_from_the_position_before_it():
    examples = tiny_llama.examples((5, 9))

    batch = loss.batch_of(examples, torch.device("cpu"))

    assert batch.tokens.shape == (2, 8)  # the last target is never an input
    for row, column, target in zip(batch.rows, batch.columns, batch.targets, strict=True):
        assert examples[row].is_target[column + 1]
        assert examples[row].tokens[column + 1] == target
    assert batch.num_targets.tolist() == [int(example.is_target.sum()) for example in examples]


def test_each_example_is_averaged_over_its_own_targets():
    batch = loss.batch_of(tiny_llama.examples((4, 12, 30)), torch.device("cpu"))

    means = batch.mean_of_each(batch.rows.double() + 1)

    assert means.tolist() == pytest.approx([1, 2, 3])
