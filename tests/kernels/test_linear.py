import ctypes
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.kernels import native
from mimoflash.kernels.quantize import dequantise, quantise

KINDS = ["float32", "bfloat16", "int8", "int4"]
SETS = native.instruction_sets()
every_set = pytest.mark.parametrize("isa", SETS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(kind, n, k, seed=0):
    weight = randn(n, k, seed=seed)
    return quantise(weight, kind) if kind.startswith("int") else weight.to(getattr(torch, kind))


def linear(isa, x, weight, threads=1):
    return native.linear(x, [weight], threads=threads, kernels=native.load(isa))[0]


def formula(x, weight):
    """In float64; for quantised weights the activations are rounded as well: 127 steps to the largest of 32."""
    x = x.double()
    if isinstance(weight, torch.Tensor):
        return x @ weight.double().T
    for start in range(0, x.shape[1], 32):
        group = x[:, start : start + 32]
        step = group.abs().amax(1, keepdim=True).clamp(min=1e-300) / 127
        x[:, start : start + 32] = (group / step).round() * step
    return x @ dequantise(weight).double().T


def test_the_kernels_are_compiled_and_chosen():
    assert SETS[0] == "base"
    assert native.available()
    assert native.library() is native.load(SETS[-1])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SETS or ["none"]), st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 200),
    st.integers(1, 20), st.integers(1, 2), st.integers(0, 1000),
)  # fmt: skip
def test_linear_is_the_formula(isa, kind, n, k, rows, threads, seed):
    weight, x = weight_of(kind, n, k, seed), randn(rows, k, seed=seed + 1)
    y, expected = linear(isa, x, weight, threads).double(), formula(x, weight)
    # a value halfway between two steps may be rounded either way; nothing else may differ
    halves = 0 if isinstance(weight, torch.Tensor) else 2 * float(x.abs().max() * dequantise(weight).abs().max()) / 127
    assert (y - expected).abs().max() <= 1e-5 * k**0.5 * float(expected.abs().max() + 1) + halves


@every_set
@every_kind
@pytest.mark.parametrize(("n", "k"), [(100, 256), (49, 1055), (16, 31)])
def test_a_row_is_the_same_alone_and_among_many(isa, kind, n, k):
    weight, x = weight_of(kind, n, k), randn(300, k)
    among = linear(isa, x, weight, threads=2)
    alone = torch.cat([linear(isa, row[None], weight) for row in x[:12]])
    assert torch.equal(among[:12], alone)
    for subset in (slice(1, 3), slice(5, 8), slice(7, 11), slice(2, 7), slice(120, 140), slice(0, 300, 7)):
        assert torch.equal(among[subset], linear(isa, x[subset], weight))
    assert torch.equal(among, linear(isa, x, weight, threads=1))


@every_set
@every_kind
def test_an_output_is_the_same_in_any_matrix(isa, kind):
    x, weight = randn(5, 96), randn(70, 96)
    pack = (lambda w: quantise(w, kind)) if kind.startswith("int") else (lambda w: w.to(getattr(torch, kind)))
    whole = linear(isa, x, pack(weight))
    for first, upto in [(0, 1), (3, 60), (69, 70)]:
        assert torch.equal(whole[:, first:upto], linear(isa, x, pack(weight[first:upto].contiguous())))


@every_set
@every_kind
def test_jobs_take_lists_of_rows_and_add(isa, kind):
    kernels, rng = native.load(isa), np.random.default_rng(0)
    weights = [weight_of(kind, n, 64, seed=n) for n in (40, 56)]
    wide = randn(30, 80)
    x = wide[:, :64]  # a stride of its own
    whole = [linear(isa, x, weight) for weight in weights]
    before, after = randn(33, 100), None
    q, scale, total = torch.empty(30, 64, dtype=torch.int8), torch.empty(30, 2), torch.empty(30, 2, dtype=torch.int32)
    view = native.Activations(x.data_ptr(), 80, 30, 64, q.data_ptr(), scale.data_ptr(), total.data_ptr())
    kernels.mf_quantise(view, 2)
    matrices = [native.matrix(weight) for weight in weights]
    for add in (False, True):
        after = before.clone()
        expected = before.clone()
        jobs, keep = (native.LinearJob * 2)(), []
        for job, matrix, result, first in zip(jobs, matrices, whole, (0, 40), strict=True):
            rows_in = rng.integers(0, 30, 13).astype(np.int32)
            rows_out = rng.permutation(33)[:13].astype(np.int32)
            keep += [rows_in, rows_out]
            job.w, job.x, job.rows, job.add = ctypes.pointer(matrix), ctypes.pointer(view), 13, add
            job.in_rows, job.out_rows = rows_in.ctypes.data, rows_out.ctypes.data
            job.y, job.y_stride = after.data_ptr() + 4 * first, 100
            columns = slice(first, first + matrix.n)
            expected[rows_out, columns] = result[rows_in] + (before[rows_out, columns] if add else 0)
        kernels.mf_linear(jobs, 2, 2)
        assert torch.equal(after, expected)


@every_set
@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(isa, kind, value):
    x = randn(6, 70)
    clean = linear(isa, x, weight_of(kind, 20, 70))
    x[2, 69] = value
    y = linear(isa, x, weight_of(kind, 20, 70))
    assert not y[2].isfinite().any()
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(y[kept], clean[kept])


@every_set
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_values_do_not_overflow(isa, kind):
    # all products of a group at their largest, of one sign: 16 bits must hold what the kernel adds up in them
    weight = torch.full((16, 64), 2.0)
    weight[:, ::32] = -2.0  # int4 counts from here: all others are 15 steps away
    for x in (torch.full((1, 64), 3.0), torch.full((1, 64), -3.0)):
        assert torch.allclose(linear(isa, x, quantise(weight, kind)), x @ weight.T, rtol=0.01)


@every_set
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tiny_and_huge_rows_keep_their_scale(isa, kind):
    weight, x = weight_of(kind, 32, 64), randn(1, 64)
    y = linear(isa, x, weight)
    for scale in (1e-20, 1e20):
        assert torch.allclose(linear(isa, x * scale, weight) / scale, y, rtol=1e-3, atol=1e-3)
    assert torch.equal(linear(isa, x * 0, weight), torch.zeros(1, 32))


def test_a_missing_library_is_warned_of_once(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setattr(native, "library_path", lambda name: tmp_path / name)
    with pytest.warns(UserWarning, match=r"python -m mimoflash\.kernels\.compile"):
        assert not native.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.available()
    native.library.cache_clear()


def test_a_library_of_other_structures_is_not_called(monkeypatch):
    monkeypatch.setattr(native, "fingerprint", lambda: "0" * 16)
    assert native.instruction_sets() == []


def test_a_library_that_computes_wrongly_is_left_out(monkeypatch):
    native.library.cache_clear()
    best = native.load(SETS[-1])
    monkeypatch.setattr(native, "_computes_rightly", lambda kernels: kernels is not best)
    with pytest.warns(UserWarning, match=f"kernels for {SETS[-1]} compute wrongly"):
        chosen = native.library()
    assert chosen is (native.load(SETS[-2]) if len(SETS) > 1 else None)
    native.library.cache_clear()
