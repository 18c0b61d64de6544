import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from triton_device import DEVICE

from mimoflash.kernels import paged_attention as kernel
from mimoflash.kernels.attention import reference_attention

PLACES = 64


@st.composite
def cases(draw):
    window = draw(st.none() | st.integers(1, 90))
    most = 1 + draw(st.integers(0, 3))
    kv_heads = draw(st.integers(1, 2))
    sequences = draw(st.integers(1, 3))
    return {
        "window": window,
        "ring": None if window is None else window + most - 1,
        "length": most,
        "ends": draw(st.lists(st.integers(most, 700), min_size=sequences, max_size=sequences)),
        "counts": draw(st.lists(st.integers(0, most), min_size=sequences, max_size=sequences)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 3, 8])),
        "widths": draw(st.sampled_from([(24, 16), (48, 32), (192, 128)])),
        "sink": draw(st.booleans()),
        "firsts": window is not None and draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


def make(case, dtype):
    """Plain sequences, and the same in a cache whose other memory is NaN."""
    g = torch.Generator().manual_seed(case["seed"])
    d, dv = case["widths"]
    ends, counts = torch.tensor(case["ends"]), torch.tensor(case["counts"])
    sequences, kv_heads, longest = len(ends), case["kv_heads"], int(ends.max())
    k, v = (torch.randn(sequences, longest, kv_heads, w, generator=g).to(dtype) for w in (d, dv))
    q = torch.randn(sequences, case["length"], case["heads"], d, generator=g).to(dtype)
    sink = torch.randn(case["heads"], generator=g).to(dtype) if case["sink"] else None
    firsts = (torch.rand(sequences, generator=g) * (ends - counts)).long() if case["firsts"] else torch.zeros_like(ends)
    pages = -(-longest // PLACES)
    size, units = (PLACES, sequences * pages + 1) if case["window"] is None else (case["ring"], sequences + 2)
    order = torch.randperm(units, generator=g)
    table = order[: sequences * pages].view(sequences, pages) if case["window"] is None else order[:sequences]
    cached_k, cached_v = (torch.full((units, kv_heads, size, w), float("nan"), dtype=dtype) for w in (d, dv))
    for s in range(sequences):
        for p in range(max(0, int(ends[s]) - (longest if case["window"] is None else size)), int(ends[s])):
            unit = table[s, p // PLACES] if case["window"] is None else table[s]
            cached_k[unit, :, p % size], cached_v[unit, :, p % size] = k[s, p], v[s, p]
    tensors = q, k, v, sink, firsts, ends - counts, counts, table.int(), cached_k, cached_v
    return [x if x is None else x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12, deadline=None)
@given(case=cases())
def test_new_tokens_attend_to_their_window_of_the_cache(implementation, dtype, case):
    q, k, v, sink, firsts, starts, counts, table, cached_k, cached_v = make(case, dtype)
    out = kernel.paged_attention(
        q, cached_k, cached_v, table, starts, counts, window=case["window"], sink=sink,
        firsts=firsts if case["firsts"] else None,
    )
    for s, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        query = torch.arange(start, start + count, device=DEVICE)[None, :, None]
        key = torch.arange(start + count, device=DEVICE)[None, None]
        seen = (key <= query) & (key > query - (case["window"] or 10**6)) & (key >= firsts[s])
        want = reference_attention(
            *(x[s : s + 1, :n].double() for x, n in ((q, count), (k, start + count), (v, start + count))),
            None if sink is None else sink.double(), seen,
        )
        tolerance = dict(atol=2e-6, rtol=1e-5) if dtype == torch.float32 else dict(atol=2e-2, rtol=2e-2)
        assert_close(out[s, :count].double(), want[0], **tolerance)


@settings(max_examples=5, deadline=None)
@given(case=cases())
def test_a_row_does_not_depend_on_its_neighbours(implementation, case):
    q, _, _, sink, _, starts, counts, table, cached_k, cached_v = make(case, torch.float32)
    alone = dict(window=case["window"], sink=sink)
    together = kernel.paged_attention(q, cached_k, cached_v, table, starts, counts, **alone)
    for s in range(len(starts)):
        one = slice(s, s + 1)
        out = kernel.paged_attention(q[one], cached_k, cached_v, table[one], starts[one], counts[one], **alone)
        n = counts[s]
        if implementation == "triton":
            assert torch.equal(out[0, :n], together[s, :n])
        else:
            assert_close(out[0, :n], together[s, :n], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("with_queries", [True, False])
@settings(max_examples=8, deadline=None)
@given(case=cases())
def test_keys_are_rotated_into_their_places_and_nothing_else_is_touched(implementation, with_queries, case):
    q, k, v, _, _, starts, counts, table, cached_k, cached_v = make(case, torch.float32)
    length, half = case["length"], case["widths"][0] // 6
    positions = starts[:, None] + torch.arange(length, device=DEVICE)
    positions = positions.where(torch.arange(length, device=DEVICE) < counts[:, None], -1)
    angle = positions[..., None] / 100 ** (torch.arange(half, device=DEVICE) / half)
    rope = angle.cos().float()[:, :, None], angle.sin().float()[:, :, None]
    new_k, new_v = k[:, :length].contiguous(), v[:, :length].contiguous()
    want_k, want_v, rotated = cached_k.clone(), cached_v.clone(), q.clone()
    kernel.rotate_and_store(
        rotated if with_queries else None, new_k, new_v, rope, positions, cached_k, cached_v, table, 0.7
    )

    def turned(x):  # the complex number of a pair, times e^(i angle)
        pair = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(*rope)
        return torch.cat([pair.real, pair.imag, x[..., 2 * half :]], -1)

    for s in range(len(starts)):
        for j in range(counts[s]):
            p, size = int(positions[s, j]), want_k.shape[2]
            unit = table[s, p // PLACES] if case["window"] is None else table[s]
            want_k[unit, :, p % size], want_v[unit, :, p % size] = turned(new_k)[s, j], new_v[s, j] * 0.7
    assert_close(cached_k, want_k, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert_close(cached_v, want_v, equal_nan=True)
    assert_close(rotated, turned(q) if with_queries else q, atol=1e-5, rtol=1e-5)


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernel.has_triton(torch.device("cpu"))
    monkeypatch.setattr(kernel, "_is_installed", lambda: False)
    assert not kernel.has_triton(torch.device("cuda"))
    assert os.environ.get("TRITON_INTERPRET") is None
