import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.kernels.experts import experts, reference_experts


@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.sampled_from([(8, 4), (16, 12), (7, 5)]),
    st.integers(0, 99),
)
def test_grouped_experts_are_the_formula(tokens, count, per_token, widths, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, inner = widths
    per_token = min(per_token, count)
    x = torch.randn(tokens, hidden, generator=g, requires_grad=True)
    gate_up = torch.randn(count, 2 * inner, hidden, generator=g, requires_grad=True)
    down = torch.randn(count, hidden, inner, generator=g, requires_grad=True)
    weights = torch.rand(tokens, per_token, generator=g, requires_grad=True)
    indices = torch.rand(tokens, count, generator=g).topk(per_token).indices
    inputs = (x, gate_up, down, weights)
    out = experts(x, gate_up, down, indices, weights)
    want = reference_experts(*(t.double() for t in (x, gate_up, down)), indices, weights.double())
    assert_close(out.double(), want, atol=1e-4, rtol=1e-4)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    theirs = torch.autograd.grad(want.square().sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, atol=1e-3, rtol=1e-3)
