"""Experts and FP8 matrices for the few rows of a decoding step, without waiting for the device.

`kernels.experts` counts an expert's rows on the host and `F.grouped_mm` does below sm_90 or in float32: neither can be
in a CUDA graph. Here the rows are put in blocks by arithmetic of fixed size. On CUDA (and in Triton's interpreter) a
Triton kernel runs, elsewhere the reference.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoflash.kernels.experts import reference_experts
from mimoflash.kernels.paged_attention import has_triton, operand_type

ROWS = 16  # in a block: the least that a product of tiles takes
MANY_ROWS = 64  # where there are enough, as in a prompt: a weight is read once a block
SCALE_BLOCK = 128  # rows and columns of an FP8 matrix that share a scale


@dataclass
class Groups:
    """(token, choice) pairs by expert, each expert's from a new block on. `rows` (blocks x block,): a pair's index, -1
    none. `experts` (blocks,): each block's expert, or the number of experts where the block is not used."""

    rows: Tensor
    experts: Tensor
    block: int


def decode_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `kernels.experts.experts`: x (T, H), gate_up (E, 2 I, H), down (E, H, I), indices, weights (T, K) -> (T, H).

    An index of E is no expert: that choice adds nothing. With `scales` (E, 2 I / 128, H / 128), (E, H / 128, I / 128)
    float32, rounded up, the matrices are FP8 (e4m3).
    """
    if not has_triton(x.device):
        if scales is not None:
            gate_up, down = (dequantise(w, s, x.dtype) for w, s in zip((gate_up, down), scales, strict=True))
        return reference_experts(x, gate_up, down, indices, weights)
    per_token = indices.shape[1]
    groups = group_rows(indices, gate_up.shape[0])
    s_gate_up, s_down = scales if scales is not None else (None, None)
    gate, up = _multiply(x, gate_up, s_gate_up, groups, indices.numel(), per_token).chunk(2, -1)
    h = F.silu(gate) * up * weights.flatten()[:, None].to(x.dtype)
    return _multiply(h, down, s_down, groups, indices.numel(), 1).view(-1, per_token, x.shape[1]).sum(1)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (.., C) times an FP8 matrix (R, C) with float32 scales (R / 128, C / 128), rounded up -> (.., R)."""
    if not has_triton(x.device):
        return F.linear(x, dequantise(weight, scale, x.dtype))
    flat = x.flatten(0, -2)
    return _multiply(flat, weight[None], scale[None], None, len(flat), 1).view(*x.shape[:-1], -1)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 (.., R, C) with a scale a block of 128 x 128."""
    rows, columns = weight.shape[-2:]
    wide = scale.repeat_interleave(SCALE_BLOCK, -2)[..., :rows, :].repeat_interleave(SCALE_BLOCK, -1)[..., :columns]
    return (weight.float() * wide).to(dtype)


def group_rows(indices: Tensor, experts: int) -> Groups:
    """Puts the pairs of `indices` (T, K), experts in 0 .. experts (that: none), in blocks of one expert each."""
    flat, pairs = indices.flatten(), indices.numel()
    block = MANY_ROWS if pairs >= MANY_ROWS * experts else ROWS
    used = min(experts, pairs)
    blocks = (pairs + used * (block - 1)) // block  # the most that there may be
    chosen = flat == torch.arange(experts, device=flat.device)[:, None]  # (E, T K)
    before = chosen.cumsum(1) - 1
    needed = (chosen.sum(1) + block - 1) // block
    ends = needed.cumsum(0)
    places = (before + (ends - needed)[:, None] * block).masked_fill(~chosen, -1).amax(0)
    rows = torch.full((blocks * block + 1,), -1, dtype=torch.int32, device=flat.device)
    places = places.masked_fill(places < 0, blocks * block)  # without an expert: past the last block
    rows.scatter_(0, places, torch.arange(pairs, dtype=torch.int32, device=flat.device))
    owner = (ends[:, None] <= torch.arange(blocks, device=flat.device)).sum(0)
    return Groups(rows[:-1], owner.int(), block)


def _multiply(
    x: Tensor, w: Tensor, scales: Tensor | None, groups: Groups | None, rows: int, per_source: int
) -> Tensor:
    """Row r of the result (rows, N) is w[its expert] x[r // per_source], w (E, N, K); zeros where it has none."""
    from mimoflash.kernels.cuda import grouped as kernels

    experts, n, k = w.shape
    is_float32 = x.dtype == torch.float32
    block = groups.block if groups else MANY_ROWS if rows >= 2 * MANY_ROWS else ROWS
    blocks = len(groups.experts) if groups else -(-rows // block)
    y = x.new_zeros(rows, n) if groups else x.new_empty(rows, n)
    order, owner = (groups.rows, groups.experts) if groups else (x, x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernels.grouped_linear[-(-n // 64), blocks](
            x.contiguous(), w if scales is None else w.view(torch.uint8), x if scales is None else scales,
            order, owner, y, rows, EXPERTS=experts, N=n, K=k, PER_SOURCE=per_source, GROUPED=groups is not None,
            FP8=scales is not None, BM=block, BN=64, BK=32 if is_float32 else 128, OPERAND=operand_type(x.dtype),
            num_warps=4, num_stages=2 if is_float32 else 3,
        )
    return y
