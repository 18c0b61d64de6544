import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.kernels.norm import rms_norm


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 40), st.sampled_from([1e-4, 1.0, 1e3]), st.integers(0, 99))
def test_rms_norm_and_its_gradient_are_the_formula(batch, length, width, scale, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(batch, length, width, generator=g) * scale).requires_grad_()
    weight = torch.randn(width, generator=g).requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    want = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * exact_weight
    assert_close(out.double(), want, atol=1e-5, rtol=1e-4)
    upstream = torch.randn(out.shape, generator=g)
    ours = torch.autograd.grad((out * upstream).sum(), (x, weight))
    theirs = torch.autograd.grad((want * upstream).sum(), (exact_x, exact_weight))
    for mine, exact in zip(ours, theirs, strict=True):
        assert_close(mine.double(), exact, atol=1e-4 * max(1, float(exact.abs().max())), rtol=1e-3)


def test_half_precision_is_pytorchs():
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))
