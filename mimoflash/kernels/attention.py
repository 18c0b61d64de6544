"""Attention with a window, a sink, documents and a cache, in one function.

On a CPU the work is cut into blocks of queries whose scores stay in the processor's cache: a window layer multiplies
each block with the keys that its window can reach, a global layer with all keys up to it. On CUDA the same mask goes
to flex_attention. `reference_attention` is the formula itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries a block: scores of a block against 512 keys fill a core's L2 cache, not more (docs/log.md)
SINK_PLACES = 8  # a sink is one more key, of value zero: the first; eight, so that rows stay aligned
KEEP_SCORES = 4096  # keys up to which a block's probabilities are kept for the backward pass; beyond, recomputed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sink: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """Causal attention, scaled by 1 / sqrt(key width).

    q (B, Lq, H, D), k (B, Lk, Hkv, D), v (B, Lk, Hkv, Dv) -> (B, Lq, H, Dv); query head h reads KV head h // (H / Hkv).
    `window`: positions a query attends, its own included. `sink` (H,): a logit in the softmax's denominator only
    (arXiv 2601.02780, section 2.2). Without a cache Lq == Lk, and `document_ids` (B, L) keeps a query in its own
    document. With a cache `query_positions` (B, Lq) and `key_positions` (B, Lk) say who sees whom; a key position of
    -1 is an empty place, and what a query at -1 (padding) gives has no meaning.
    """
    assert (query_positions is None) == (key_positions is None), "positions of queries and keys come together"
    if q.is_cuda:
        return flex(q, k, v, window, sink, _visible(window, document_ids, query_positions, key_positions))
    if key_positions is None and window is not None and q.shape[1] > window:
        return _banded(q, k, v, window, sink, document_ids)
    visible = _visible(window, document_ids, query_positions, key_positions)
    return _blocked(q, k, v, sink, visible, causal=key_positions is None)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, visible: Tensor) -> Tensor:
    """The formula, with a full mask `visible` (B, Lq, Lk); shapes as in `attention`."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    if sink is not None:
        column = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


# -- who sees whom ----------------------------------------------------------------------------------------------------

# (batch, query, key) index tensors that broadcast together -> bool
Visible = Callable[[Tensor, Tensor, Tensor], Tensor]


def _visible(
    window: int | None, document_ids: Tensor | None, query_positions: Tensor | None, key_positions: Tensor | None
) -> Visible:
    def visible(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if query_positions is not None and key_positions is not None:
            i, j = query_positions[b, i], key_positions[b, j]
        seen = (j <= i) & (j >= 0)
        if window is not None:
            seen = seen & (j > i - window)
        if document_ids is not None:
            seen = seen & (document_ids[b, i] == document_ids[b, j])
        return seen

    return visible


# -- CPU --------------------------------------------------------------------------------------------------------------


def _blocked(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, visible: Visible, causal: bool) -> Tensor:
    """Blocks of queries one after the other; `causal`: query i needs keys up to i only."""
    batch, length, kv_heads = *q.shape[:2], k.shape[2]
    places = 0 if sink is None else SINK_PLACES
    q_BKGLD = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    k_BKLD, v_BKLD = (F.pad(x.transpose(1, 2), (0, 0, places, 0)) for x in (k, v))
    rows = torch.arange(batch, device=q.device)[:, None, None]
    blocks = []
    for start in reversed(range(0, length, BLOCK)):  # the largest first: the smaller ones find room in what it frees
        end = min(start + BLOCK, length)
        keys = end if causal else k.shape[1]
        i = torch.arange(start, end, device=q.device)[None, :, None]
        j = torch.arange(keys, device=q.device)[None, None]
        mask = visible(rows, i, j)
        seen = slice(places + keys)
        blocks.append(_attend(q_BKGLD[:, :, :, start:end], k_BKLD[:, :, seen], v_BKLD[:, :, seen], sink, mask))
    return torch.cat(blocks[::-1], dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int, sink: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """All blocks at once, each with its own keys and the window - 1 before them: O(length x window)."""
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    block = min(BLOCK // 2, window)
    blocks, before = -(-length // block), -(-(window - 1) // block) * block  # whole blocks; the mask knows the window
    tail = blocks * block - length
    q_NKGLD = F.pad(q, (0, 0, 0, 0, 0, tail)).view(batch * blocks, block, kv_heads, heads // kv_heads, -1)
    places = 0 if sink is None else SINK_PLACES
    k_NKLD, v_NKLD = (_WithPast.apply(x, block, before, places) for x in (k, v))
    i = torch.arange(block, device=q.device)[:, None] + before
    j = torch.arange(before + block, device=q.device)
    starts = torch.arange(blocks, device=q.device)[:, None, None] * block
    mask = (j <= i) & (j > i - window) & (j + starts >= before)  # (blocks, block, before + block)
    if document_ids is None:
        mask = mask.repeat(batch, 1, 1)
    else:
        ids = F.pad(document_ids, (before, tail), value=-2).unfold(1, before + block, block).flatten(0, 1)
        mask = mask.repeat(batch, 1, 1) & (ids[:, before:, None] == ids[:, None, :])
    out = _attend(q_NKGLD.permute(0, 2, 3, 1, 4), k_NKLD, v_NKLD, sink, mask)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, blocks * block, heads, -1)[:, :length]


class _WithPast(torch.autograd.Function):
    """(B, L, K, D) -> (B * blocks, K, places + before + block, D): each block of positions with those before it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, before: int, places: int) -> Tensor:
        ctx.shape, ctx.block, ctx.before, ctx.places = x.shape, block, before, places
        x = F.pad(x, (0, 0, 0, 0, before, -x.shape[1] % block)).unfold(1, before + block, block)
        batch, blocks, kv_heads, width, keys = x.shape
        out = x.new_empty(batch, blocks, kv_heads, places + keys, width)
        out[..., :places, :] = 0
        out[..., places:, :] = x.transpose(-1, -2)
        return out.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (batch, length, kv_heads, width), block, before = ctx.shape, ctx.block, ctx.before
        grad = grad[:, :, ctx.places :].unflatten(0, (batch, -1)).transpose(2, 3)
        blocks = grad.shape[1]
        total = grad.new_zeros(batch, blocks + before // block, block, kv_heads, width)
        for i in range(before // block + 1):  # a block of keys is seen from itself and from the blocks after it
            total[:, i : i + blocks] += grad[:, :, i * block : (i + 1) * block]
        return total.flatten(1, 2)[:, before : before + length], None, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, mask: Tensor) -> Tensor:
    """q (N, K, G, Lq, D), k (N, K, places + Lk, D), v (N, K, places + Lk, Dv), mask (N or 1, Lq, Lk)
    -> (N, K, G, Lq, Dv). The first SINK_PLACES keys and values are zeros where there is a sink."""
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, _hidden(q.dtype))
    return _Attend.apply(q * q.shape[-1] ** -0.5, k, v, sink, bias)


class _Attend(torch.autograd.Function):
    """softmax(q k + bias) v on folded matrices; autograd's own version would make a gradient for the whole bias."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor) -> Tensor:
        p = _probabilities(q, k, sink, bias)
        kept = p if k.shape[2] <= KEEP_SCORES else None
        ctx.save_for_backward(q, k, v, sink, bias, kept)
        return torch.bmm(p, v.flatten(0, 1)).view(*q.shape[:-1], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, bias, kept = ctx.saved_tensors
        p = _probabilities(q, k, sink, bias) if kept is None else kept
        grad = grad.reshape(p.shape[0], p.shape[1], -1)
        d_v = torch.bmm(p.transpose(1, 2), grad)
        d_p = torch.bmm(grad, v.flatten(0, 1).transpose(1, 2))
        d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
        d_q = torch.bmm(d_s, k.flatten(0, 1)).view(q.shape)
        d_k = torch.bmm(d_s.transpose(1, 2), q.flatten(2, 3).flatten(0, 1)).view(k.shape)
        d_sink = None
        if sink is not None:
            d_sink = d_s.view(*q.shape[:4], -1)[..., 0].sum((0, 3)).view(sink.shape).to(sink.dtype)
        return d_q, d_k, d_v.view(v.shape), d_sink, None


def _hidden(dtype: torch.dtype) -> float:
    """A score that no softmax notices; not -inf, so that a row of padding, which sees nothing, stays finite."""
    return torch.finfo(dtype).min / 4


def _probabilities(q: Tensor, k: Tensor, sink: Tensor | None, bias: Tensor) -> Tensor:
    """(N * K, G * Lq, places + Lk) with q (N, K, G, Lq, D), k (N, K, places + Lk, D), bias (N or 1, Lq, Lk)."""
    s = torch.bmm(q.flatten(2, 3).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    s_NKGLL = s.view(*q.shape[:4], k.shape[2])
    places = k.shape[2] - bias.shape[-1]
    s_NKGLL[..., places:] += bias[:, None, None]
    if sink is not None:
        s_NKGLL[..., 0] = sink.view(1, q.shape[1], q.shape[2], 1)
        s_NKGLL[..., 1:places] = _hidden(s.dtype)
    return s.softmax(-1)


# -- CUDA -------------------------------------------------------------------------------------------------------------


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, window: int | None, sink: Tensor | None, visible: Visible) -> Tensor:
    """The same by flex_attention, which skips blocks that the mask empties; a sink is out * sigmoid(lse - sink)."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible(b, i, j)

    mask = create_block_mask(mask_mod, q.shape[0], None, q.shape[1], k.shape[1], device=q.device)
    run: Any = _compiled_flex() if q.is_cuda else flex_attention
    out, aux = run(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    if sink is not None:
        out = out * torch.sigmoid(aux.lse - sink[:, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2)
