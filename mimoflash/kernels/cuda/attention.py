"""Attention of a few new tokens a sequence over pages and rings, and the writing of their keys and values."""

# Triton reads the annotations of a kernel's arguments itself.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def attend(
    q, k, v, units, starts, counts, firsts, sinks, out, partial_out, partial_top, partial_sum,
    units_s, units_p, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PLACES: tl.constexpr, WINDOW: tl.constexpr, HAS_FIRSTS: tl.constexpr, HAS_SINKS: tl.constexpr,
    WORKERS: tl.constexpr, SPLIT: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, OPERAND: tl.constexpr,
):
    """Program (s, KV head and block of its query rows, worker): rows are (token, query head of the group).

    WINDOW 0: pages; worker w takes the splits w, w + WORKERS, ... of SPLIT positions, whatever the length is and
    whoever else runs, and leaves the sum of exp(score - top) v, top and sum of exps. A window: one worker runs over the
    ring and writes the result. OPERAND: the type that products take.
    """
    s = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // ROW_BLOCKS
    worker = tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    start = tl.load(starts + s)
    end = start + tl.load(counts + s)
    first = start * 0
    if HAS_FIRSTS:
        first = tl.load(firsts + s)

    row = (tl.program_id(1) % ROW_BLOCKS) * BM + tl.arange(0, BM)
    position = start + row // GROUP
    real = (row < L * GROUP) & (position < end)
    row_q = (s * L + row // GROUP) * HEADS + kv_head * GROUP + row % GROUP  # of q and of out
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q_tile = tl.load(q + row_q[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)

    BLOCKS_A_SPLIT: tl.constexpr = SPLIT // BN
    if WINDOW == 0:
        splits = (end + SPLIT - 1) // SPLIT
        turns = (splits - worker + WORKERS - 1) // WORKERS * BLOCKS_A_SPLIT
        unit = s
    else:
        turns = tl.where(end > start, (PLACES + BN - 1) // BN, 0)
        unit = tl.load(units + s * units_s).to(tl.int64)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    for turn in range(turns):
        if WINDOW == 0:
            block = ((turn // BLOCKS_A_SPLIT) * WORKERS + worker) * BLOCKS_A_SPLIT + turn % BLOCKS_A_SPLIT
            held = block * BN + tl.arange(0, BN)
            place = held % PLACES
            there = held < end
            page = units + s * units_s + (block * BN // PLACES) * units_p
            unit = tl.load(page, mask=block * BN < end, other=0).to(tl.int64)
        else:
            place = turn * BN + tl.arange(0, BN)
            held = end - 1 - (end - 1 - place + PLACES) % PLACES  # the latest position that the place can hold
            there = (place < PLACES) & (held >= first)
        line = (unit * KV_HEADS + kv_head) * PLACES + place
        seen = there[None, :] & (held[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (held[None, :] > position[:, None] - WINDOW)

        k_tile = tl.load(k + line[None, :] * D + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(q_tile, k_tile.to(OPERAND), input_precision="ieee") * scale
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        p = tl.exp(scores - finite_top[:, None])
        shrink = tl.exp(top - finite_top)
        total = total * shrink + tl.sum(p, 1)
        v_tile = tl.load(v + line[:, None] * DV + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(OPERAND), v_tile.to(OPERAND), input_precision="ieee")
        top = new_top

    in_out = (row < L * GROUP)[:, None] & (dv < DV)[None, :]
    if WORKERS == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + kv_head * GROUP + row % GROUP).to(tl.float32)
            new_top = tl.maximum(top, sink)
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.exp(sink - new_top)
            acc = acc * shrink[:, None]
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + row_q[:, None] * DV + dv[None, :], acc, mask=in_out)
    elif turns > 0:
        at = ((s * KV_HEADS + kv_head) * WORKERS + worker) * (L * GROUP) + row
        tl.store(partial_out + at[:, None] * DV + dv[None, :], acc, mask=in_out)
        tl.store(partial_top + at, top, mask=row < L * GROUP)
        tl.store(partial_sum + at, total, mask=row < L * GROUP)


@triton.jit
def merge(
    partial_out, partial_top, partial_sum, starts, counts, sinks, out,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, L: tl.constexpr, DV: tl.constexpr, HAS_SINKS: tl.constexpr,
    WORKERS: tl.constexpr, SPLIT: tl.constexpr, BDV: tl.constexpr,
):
    """Program (s, token and query head): the workers' parts of one row, in the workers' order."""
    s = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    GROUP: tl.constexpr = HEADS // KV_HEADS
    end = tl.load(starts + s) + tl.load(counts + s)
    worker = tl.arange(0, WORKERS)
    there = worker < (end + SPLIT - 1) // SPLIT
    dv = tl.arange(0, BDV)
    at = ((s * KV_HEADS + head // GROUP) * WORKERS + worker) * (L * GROUP) + token * GROUP + head % GROUP
    tops = tl.load(partial_top + at, mask=there, other=float("-inf"))
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp(tops - top)
    total = tl.sum(tl.load(partial_sum + at, mask=there, other=0.0) * shrink, 0)
    if HAS_SINKS:
        total += tl.exp(sink - top)
    parts = tl.load(
        partial_out + at[:, None] * DV + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
    )
    result = tl.sum(parts * shrink[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + ((s * L + token) * HEADS + head) * DV + dv, result, mask=dv < DV)


@triton.jit
def rotate_and_store(
    q, k, v, cos, sin, positions, units, cached_k, cached_v, units_s, units_p, value_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, L: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PLACES: tl.constexpr, PAGED: tl.constexpr,
    BHALF: tl.constexpr, BREST: tl.constexpr, BDV: tl.constexpr,
):
    """Program (token, query or KV head): a query head is rotated in place; a key head is rotated into the cache, its
    value scaled into it. HEADS 0: keys and values only. Position -1: nothing is stored."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BHALF)
    in_half = i < HALF
    c = tl.load(cos + row * HALF + i, mask=in_half, other=0.0).to(tl.float32)
    n = tl.load(sin + row * HALF + i, mask=in_half, other=0.0).to(tl.float32)
    position = tl.load(positions + row)
    if head < HEADS:
        x = q + (row * HEADS + head) * D
        # both halves lie in the same threads: none reads what another has written
        a = tl.load(x + i, mask=in_half, other=0.0).to(tl.float32)
        b = tl.load(x + HALF + i, mask=in_half, other=0.0).to(tl.float32)
        tl.store(x + i, a * c - b * n, mask=in_half)
        tl.store(x + HALF + i, b * c + a * n, mask=in_half)
    elif position >= 0:
        kv_head = head - HEADS
        s = row // L
        unit = tl.load(units + s * units_s + (position // PLACES if PAGED else 0) * units_p).to(tl.int64)
        line = (unit * KV_HEADS + kv_head) * PLACES + position % PLACES
        x = k + (row * KV_HEADS + kv_head) * D
        a = tl.load(x + i, mask=in_half, other=0.0).to(tl.float32)
        b = tl.load(x + HALF + i, mask=in_half, other=0.0).to(tl.float32)
        tl.store(cached_k + line * D + i, a * c - b * n, mask=in_half)
        tl.store(cached_k + line * D + HALF + i, b * c + a * n, mask=in_half)
        rest = 2 * HALF + tl.arange(0, BREST)
        tl.store(cached_k + line * D + rest, tl.load(x + rest, mask=rest < D, other=0.0), mask=rest < D)
        dv = tl.arange(0, BDV)
        value = tl.load(v + (row * KV_HEADS + kv_head) * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
        tl.store(cached_v + line * DV + dv, value * value_scale, mask=dv < DV)
