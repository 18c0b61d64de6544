import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from triton_device import DEVICE

from mimoflash.checkpoint import fp8
from mimoflash.kernels import grouped as kernel
from mimoflash.kernels.experts import reference_experts


@st.composite
def cases(draw):
    count = draw(st.integers(1, 9))
    return {
        "tokens": draw(st.integers(1, 40)), "count": count, "per_token": draw(st.integers(1, min(3, count))),
        "widths": draw(st.sampled_from([(16, 8), (136, 40), (200, 130)])), "none": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def tensors(case):
    g = torch.Generator().manual_seed(case["seed"])
    tokens, count, (hidden, inner) = case["tokens"], case["count"], case["widths"]
    x = torch.randn(tokens, hidden, generator=g)
    gate_up = torch.randn(count, 2 * inner, hidden, generator=g)
    down = torch.randn(count, hidden, inner, generator=g)
    weights = torch.rand(tokens, case["per_token"], generator=g)
    indices = torch.rand(tokens, count, generator=g).topk(case["per_token"]).indices
    if case["none"]:
        indices[torch.rand(tokens, generator=g) < 0.3] = count
    return [t.to(DEVICE) for t in (x, gate_up, down, indices, weights)]


@settings(max_examples=10, deadline=None)
@given(cases())
def test_decode_experts_are_the_formula(implementation, case):
    x, gate_up, down, indices, weights = tensors(case)
    out = kernel.decode_experts(x, gate_up, down, indices, weights)
    want = reference_experts(x.double(), gate_up.double(), down.double(), indices, weights.double())
    assert_close(out.double(), want, atol=1e-3, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(cases())
def test_fp8_experts_are_those_of_the_dequantised_weights(implementation, case):
    x, gate_up, down, indices, weights = tensors(case)
    pairs = [[fp8.quantise(w) for w in matrices] for matrices in (gate_up, down)]
    wide = [torch.stack([fp8.dequantise(*pair) for pair in each]).double() for each in pairs]
    (gate_up8, s1), (down8, s2) = [[torch.stack(x) for x in zip(*each, strict=True)] for each in pairs]
    out = kernel.decode_experts(x, gate_up8, down8, indices, weights, (s1, s2))
    want = reference_experts(x.double(), *wide, indices, weights.double())
    assert_close(out.double(), want, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 64, 128), (3, 300, 200), (150, 130, 136)])
def test_fp8_linear_is_that_of_the_dequantised_weight(implementation, shape):
    rows, n, k = shape
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=g).to(DEVICE) for size in ((2, rows, k), (n, k)))
    out = kernel.fp8_linear(x, *fp8.quantise(weight))
    want = x.double() @ fp8.dequantise(*fp8.quantise(weight)).double().T
    assert_close(out.double(), want, atol=1e-3, rtol=1e-4)


def test_every_value_of_e4m3_is_read_right(implementation):
    bits = torch.arange(256, dtype=torch.uint8)
    bits = bits[(bits & 0x7F) != 0x7F]  # the two NaNs
    weight = bits[:, None].expand(-1, 16).contiguous().view(torch.float8_e4m3fn).to(DEVICE)
    x = torch.eye(16, device=DEVICE)[:1]
    out = kernel.fp8_linear(x, weight, torch.ones(2, 1, device=DEVICE))
    assert torch.equal(out[0], weight[:, 0].float())


@given(cases())
def test_every_pair_is_in_a_block_of_its_expert(case):
    _, _, _, indices, _ = tensors(case)
    groups = kernel.group_rows(indices, case["count"])
    flat = indices.flatten().tolist()
    found = {}
    for place, row in enumerate(groups.rows.tolist()):
        if row >= 0:
            found[row] = int(groups.experts[place // groups.block])
    assert found == {row: expert for row, expert in enumerate(flat) if expert < case["count"]}
