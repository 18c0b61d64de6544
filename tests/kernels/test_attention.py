import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mimoflash.kernels import attention as kernel
from mimoflash.kernels.attention import attention, reference_attention


@st.composite
def cases(draw):
    kv_heads = draw(st.integers(1, 3))
    length = draw(st.integers(1, 150))
    documents = draw(st.none() | st.lists(st.integers(1, 60), min_size=1, max_size=8))
    return {
        "batch": draw(st.integers(1, 3)),
        "length": length,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, 3)),
        "widths": draw(st.sampled_from([(8, 8), (12, 4), (4, 8)])),
        "window": draw(st.none() | st.integers(1, 70)),
        "sink": draw(st.booleans()),
        "documents": documents,
        "seed": draw(st.integers(0, 1000)),
    }


def tensors(case, dtype=torch.float64):
    g = torch.Generator().manual_seed(case["seed"])
    shape = (case["batch"], case["length"])
    d, dv = case["widths"]

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    q, k = normal(*shape, case["heads"], d), normal(*shape, case["kv_heads"], d)
    v, sink = normal(*shape, case["kv_heads"], dv), normal(case["heads"]) if case["sink"] else None
    ids = None
    if case["documents"]:
        row = torch.cat([torch.full((n,), i) for i, n in enumerate(case["documents"])])
        row = torch.cat([row, torch.full((max(case["length"] - len(row), 0),), -1)])[: case["length"]]
        ids = row.expand(shape).contiguous()
    return q, k, v, sink, ids


def full_mask(length, window, ids, batch):
    i, j = torch.arange(length)[:, None], torch.arange(length)
    mask = (j <= i) & (j > i - (window or length + 1))
    mask = mask.expand(batch, -1, -1)
    return mask if ids is None else mask & (ids[:, :, None] == ids[:, None, :])


@given(cases())
def test_attention_and_its_gradients_are_the_formula(case):
    q, k, v, sink, ids = tensors(case)
    inputs = [x for x in (q, k, v, sink) if x is not None]
    out = attention(q, k, v, window=case["window"], sink=sink, document_ids=ids)
    want = reference_attention(q, k, v, sink, full_mask(case["length"], case["window"], ids, case["batch"]))
    assert_close(out, want)
    weight = torch.randn_like(want)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((want * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@settings(max_examples=8)
@given(cases())
def test_flex_is_the_formula(case):
    q, k, v, sink, ids = (x if x is None else x.detach() for x in tensors(case, torch.float32))
    out = kernel.flex(q, k, v, case["window"], sink, kernel._visible(case["window"], ids, None, None))
    want = reference_attention(q, k, v, sink, full_mask(case["length"], case["window"], ids, case["batch"]))
    assert_close(out, want, atol=1e-5, rtol=1e-4)


@given(cases(), st.integers(0, 20))
def test_cached_keys_in_any_order_with_empty_places(case, empty):
    q, k, v, sink, _ = tensors(case)
    length, batch = case["length"], case["batch"]
    new = max(1, length // 3)  # queries are the last of the positions
    order = torch.randperm(length + empty)
    pad = torch.zeros(batch, empty, *k.shape[2:], dtype=k.dtype)
    positions = torch.cat([torch.arange(length), torch.full((empty,), -1)])[order].expand(batch, -1)
    keys = torch.cat([k, pad], 1)[:, order]
    values = torch.cat([v, torch.full((batch, empty, *v.shape[2:]), 1e9, dtype=v.dtype)], 1)[:, order]
    out = attention(
        q[:, -new:], keys, values, window=case["window"], sink=sink,
        query_positions=torch.arange(length - new, length).expand(batch, -1), key_positions=positions,
    )
    want = reference_attention(q, k, v, sink, full_mask(length, case["window"], None, batch))[:, -new:]
    assert_close(out, want)


def test_long_global_attention_recomputes_its_scores_in_the_backward_pass(monkeypatch):
    case = {"batch": 1, "length": 100, "kv_heads": 1, "heads": 2, "widths": (8, 8), "sink": True, "documents": None,
            "seed": 0}
    q, k, v, sink, _ = tensors(case)
    kept = torch.autograd.grad(attention(q, k, v, sink=sink).square().sum(), (q, k, v, sink))
    monkeypatch.setattr(kernel, "KEEP_SCORES", 0)
    recomputed = torch.autograd.grad(attention(q, k, v, sink=sink).square().sum(), (q, k, v, sink))
    for a, b in zip(kept, recomputed, strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1024, 4096])
def test_window_work_grows_with_length_times_window(length):
    q = torch.randn(1, length, 2, 16)
    with FlopCounterMode(display=False) as counter:
        attention(q, q, q, window=129, sink=torch.zeros(2))
    pairs = counter.get_total_flops() / (2 * 2 * (16 + 16))
    assert pairs <= length * 1.5 * 129
