import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.kernels.cross_entropy import cross_entropy, reference_cross_entropy


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([0.1, 1.0, 50.0]), st.integers(0, 99))
def test_cross_entropy_and_its_gradient_are_the_formula(rows, vocabulary, scale, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=g) * scale).requires_grad_()
    targets, weight = torch.randint(0, vocabulary, (rows,), generator=g), torch.rand(rows, generator=g)
    ours, theirs = cross_entropy(logits, targets), reference_cross_entropy(logits.double(), targets)
    assert_close(ours, theirs.float())
    (mine,) = torch.autograd.grad((ours * weight).sum(), logits)
    (want,) = torch.autograd.grad((theirs * weight).sum(), logits)
    assert_close(mine, want, atol=1e-5, rtol=1e-4)


def test_bf16_logits_get_bf16_gradients():
    logits = torch.randn(4, 30, dtype=torch.bfloat16, requires_grad=True)
    cross_entropy(logits, torch.tensor([1, 2, 3, 4])).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert_close(logits.grad.float().sum(-1), torch.zeros(4), atol=0.03, rtol=0)


def test_a_second_backward_is_refused():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 1])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
