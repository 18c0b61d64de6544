"""A few rows times one of many matrices each, in float32, bfloat16, or FP8 in blocks of 128 x 128."""

# Triton reads the annotations of a kernel's arguments itself.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def grouped_linear(
    x, w, scales, rows, block_experts, y, row_count,
    EXPERTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PER_SOURCE: tl.constexpr, GROUPED: tl.constexpr,
    FP8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OPERAND: tl.constexpr,
):
    """Program (block of outputs, block of rows): y[r] = w[expert] x[r // PER_SOURCE] for the block's rows r.

    GROUPED: a block's rows and its expert are given (-1: no row; EXPERTS: no block); else all rows and expert 0."""
    block = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = block * BM + tl.arange(0, BM)
    in_rows = row < row_count
    expert = tl.program_id(1).to(tl.int64) * 0
    if GROUPED:
        expert = tl.load(block_experts + block).to(tl.int64)
        row = tl.load(rows + row).to(tl.int32)
        in_rows = row >= 0
    if expert < EXPERTS:
        source = tl.where(in_rows, row, 0) // PER_SOURCE
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            a = tl.load(x + source[:, None] * K + k[None, :], mask=in_rows[:, None] & (k < K)[None, :], other=0.0)
            at = (expert * N + n[None, :]) * K + k[:, None]
            in_w = (n < N)[None, :] & (k < K)[:, None]
            if FP8:
                # e4m3's bits are those of a float16 of 1/256 its value: sm_80 has no instruction to convert it
                bits = tl.load(w + at, mask=in_w, other=0).to(tl.uint16)
                half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
                line = expert * ((N + 127) // 128) + tl.program_id(0) * BN // 128
                scale = tl.load(scales + line * ((K + 127) // 128) + start // 128)
                b = half.to(tl.float32).to(OPERAND)
                acc += tl.dot(a.to(OPERAND), b, input_precision="ieee") * (scale * 256)
            else:
                b = tl.load(w + at, mask=in_w, other=0.0).to(OPERAND)
                acc += tl.dot(a.to(OPERAND), b, input_precision="ieee")
        to = y + row[:, None].to(tl.int64) * N + n[None, :]
        tl.store(to, acc, mask=in_rows[:, None] & (n < N)[None, :])
