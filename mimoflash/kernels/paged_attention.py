"""Decoding's attention: one to a few new tokens a sequence over the engine's cache, and the writing of their keys.

The cache of a layer is k (units, Hkv, places, D), v (units, Hkv, places, Dv). A global layer's units are pages:
position p of sequence s is at place p % places of unit units[s, p // places]. A window layer's are rings: position p is
at place p % places of unit units[s]. On CUDA (and in Triton's interpreter) Triton kernels run, elsewhere the reference
beside them. The kernels take all sizes from shapes and wait for nothing, so that a CUDA graph can hold them.
"""

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

SPLIT = 256  # positions that a worker takes in one go: a few dozen microseconds of memory reads
WORKERS = 32  # of a sequence's KV head; with 4 of them, one sequence fills the 100 to 140 processors of a card


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of the device ("meta": to be compiled only, benchmarks/cuda_compile.py)."""
    return _is_installed() and (device.type in ("cuda", "meta") or is_interpreted())


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, units: Tensor, starts: Tensor, counts: Tensor, *, window: int | None = None,
    sink: Tensor | None = None, firsts: Tensor | None = None,
) -> Tensor:
    """Causal attention of new tokens whose keys and values are in the cache already, scaled by 1 / sqrt(D).

    q (S, L, H, D), k, v the layer's cache; token l of sequence s is at position starts[s] + l, for l < counts[s]; what
    the others give has no meaning. `window` None: `units` (S, pages) page table; else (S,) slots, and a ring holds the
    window and what may be run again: places >= window + max(counts) - 1. `sink` (H,): a logit in the denominator only.
    `firsts` (S,): positions before are absent (rings). Integers of one type -> (S, L, H, Dv).
    """
    assert (window is None) == (units.dim() == 2), "a page table for global layers, slots for window layers"
    run = _triton_attention if has_triton(q.device) else reference_paged_attention
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return run(q, k, v, units, starts, counts, window, sink, firsts)


def rotate_and_store(
    q: Tensor | None, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, cached_k: Tensor,
    cached_v: Tensor, units: Tensor, value_scale: float,
) -> None:
    """Rotates q (S, L, H, D), if given, in place, and puts rotated k (S, L, Hkv, D) and scaled v (S, L, Hkv, Dv) into
    the layer's cache at positions (S, L), -1: nowhere. `rope`: cos and sin (S, L, 1, half) of rotate-half over the
    first 2 x half of D. All contiguous."""
    run = _triton_store if has_triton(k.device) else _reference_store
    with torch.cuda.device_of(k):
        run(q, k, v, rope, positions, cached_k, cached_v, units, value_scale)


# -- the formula ------------------------------------------------------------------------------------------------------


def reference_paged_attention(
    q: Tensor, k: Tensor, v: Tensor, units: Tensor, starts: Tensor, counts: Tensor, window: int | None,
    sink: Tensor | None, firsts: Tensor | None,
) -> Tensor:
    """See `paged_attention`."""
    (sequences, length), places = q.shape[:2], k.shape[2]
    ends = starts + counts
    if window is None:
        held = torch.arange(units.shape[1] * places, device=q.device).expand(sequences, -1)
        k_SKD, v_SKD = (x[units.long()].transpose(2, 3).flatten(1, 2) for x in (k, v))  # (S, K, Hkv, D)
    else:
        last = ends[:, None] - 1
        held = last - (last - torch.arange(places, device=q.device)) % places
        k_SKD, v_SKD = (x[units.long()].transpose(1, 2) for x in (k, v))
    lowest = torch.zeros_like(starts) if firsts is None else firsts
    there = (held >= lowest[:, None]) & (held < ends[:, None])
    queries = starts[:, None] + torch.arange(length, device=q.device)
    seen = there[:, None] & (held[:, None] <= queries[:, :, None])  # (S, L, K)
    if window is not None:
        seen = seen & (held[:, None] > queries[:, :, None] - window)
    # zeros where there is nothing: memory that was never written may hold NaN, which no mask hides
    k_SKD, v_SKD = (x.masked_fill(~there[:, :, None, None], 0).to(q.dtype) for x in (k_SKD, v_SKD))

    group = q.shape[2] // k.shape[1]
    scores = torch.einsum("slhd,skhd->shlk", q, k_SKD.repeat_interleave(group, 2)).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.float()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k_SKD.shape[1]].nan_to_num(0)  # rows that see nothing
    return torch.einsum("shlk,skhd->slhd", weights.to(q.dtype), v_SKD.repeat_interleave(group, 2))


def _reference_store(
    q: Tensor | None, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, cached_k: Tensor,
    cached_v: Tensor, units: Tensor, value_scale: float,
) -> None:
    if q is not None:
        q.copy_(_rotate(q, rope))
    row, column = (positions >= 0).nonzero(as_tuple=True)
    kept, places = positions[row, column], cached_k.shape[2]
    unit = units[row, kept // places] if units.dim() == 2 else units[row]
    cached_k[unit.long(), :, kept % places] = _rotate(k, rope)[row, column].to(cached_k.dtype)
    cached_v[unit.long(), :, kept % places] = (v * value_scale)[row, column].to(cached_v.dtype)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


# -- Triton -----------------------------------------------------------------------------------------------------------


def _triton_attention(
    q: Tensor, k: Tensor, v: Tensor, units: Tensor, starts: Tensor, counts: Tensor, window: int | None,
    sink: Tensor | None, firsts: Tensor | None,
) -> Tensor:
    from mimoflash.kernels.cuda import attention as kernels

    (sequences, length, heads, width), (_, kv_heads, places, value_width) = q.shape, v.shape
    out = q.new_empty(sequences, length, heads, value_width)
    workers = WORKERS if window is None else 1
    shape = (sequences, kv_heads, workers, length * heads // kv_heads) if workers > 1 else (0,)
    tops, sums = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    parts = torch.empty(*shape, value_width, dtype=torch.float32, device=q.device)
    sizes = attention_sizes(length * heads // kv_heads, width, value_width, places, q.dtype, window)
    units_p = units.stride(1) if window is None else 0
    grid = (sequences, kv_heads * sizes["ROW_BLOCKS"], workers)
    kernels.attend[grid](
        q.contiguous(), k, v, units, starts, counts, starts if firsts is None else firsts, q if sink is None else sink,
        out, parts, tops, sums, units.stride(0), units_p, width**-0.5, HEADS=heads, KV_HEADS=kv_heads, L=length,
        D=width, DV=value_width, PLACES=places, WINDOW=window or 0, HAS_FIRSTS=firsts is not None,
        HAS_SINKS=sink is not None, WORKERS=workers, SPLIT=SPLIT, OPERAND=operand_type(q.dtype), **sizes,
    )
    if workers > 1:
        kernels.merge[sequences, length * heads](
            parts, tops, sums, starts, counts, q if sink is None else sink, out, HEADS=heads, KV_HEADS=kv_heads,
            L=length, DV=value_width, HAS_SINKS=sink is not None, WORKERS=workers, SPLIT=SPLIT, BDV=sizes["BDV"],
            num_warps=4,
        )
    return out


def attention_sizes(
    rows: int, width: int, value_width: int, places: int, dtype: torch.dtype, window: int | None
) -> dict[str, int]:
    """Block sizes: powers of two, of 16 at least (products of tiles), within 99 KiB of shared memory (the smallest that
    a card from sm_80 on has)."""
    bm, bd, bdv = min(64, _power(rows)), _power(width), _power(value_width)
    bn = 64 if bd * dtype.itemsize <= 256 else 32
    if dtype.itemsize == 4 and bd > 128:
        bm, bn = min(bm, 32), 16
    if window is None:
        assert places % bn == 0, "a block of keys lies in one page"
    return {
        "BM": bm, "BN": bn, "BD": bd, "BDV": bdv, "ROW_BLOCKS": -(-rows // bm), "num_warps": 4,
        "num_stages": 2,
    }


def operand_type(dtype: torch.dtype) -> Any:
    """What tl.dot is given: the interpreter multiplies the bits of bfloat16 as if they were integers."""
    import triton.language as tl

    return tl.bfloat16 if dtype == torch.bfloat16 and not is_interpreted() else tl.float32


def _power(size: int) -> int:
    """The next power of two from 16 on."""
    return max(16, 1 << (size - 1).bit_length())


def _triton_store(
    q: Tensor | None, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, cached_k: Tensor,
    cached_v: Tensor, units: Tensor, value_scale: float,
) -> None:
    from mimoflash.kernels.cuda import attention as kernels

    (sequences, length, kv_heads, width), half = k.shape, rope[0].shape[-1]
    heads = 0 if q is None else q.shape[2]
    assert all(x.is_contiguous() for x in (k, v, positions, *rope)), "heads lie one after the other"
    assert q is None or q.is_contiguous(), "q is changed in place"
    kernels.rotate_and_store[sequences * length, heads + kv_heads](
        k if q is None else q, k, v, *rope, positions, units, cached_k, cached_v, units.stride(0),
        units.stride(1) if units.dim() == 2 else 0, value_scale, HEADS=heads, KV_HEADS=kv_heads, L=length, HALF=half,
        D=width, DV=v.shape[3], PLACES=cached_k.shape[2], PAGED=units.dim() == 2, BHALF=_power(half),
        BREST=_power(max(width - 2 * half, 1)), BDV=_power(v.shape[3]), num_warps=1,
    )
