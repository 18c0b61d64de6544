"""The experts of a mixture, each token through its own few: sorted by expert, multiplied in groups, sorted back."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum over k of weights[t, k] * SwiGLU expert indices[t, k] of x[t].

    x (T, H), gate_up (E, 2 I, H) with the gate's rows first, down (E, H, I), indices (T, K) int64, weights (T, K)
    -> (T, H).
    """
    rows = (x.shape[1], gate_up.shape[1], down.shape[2])
    if x.dtype == torch.float64 or any(row * x.itemsize % 16 for row in rows):
        return reference_experts(x, gate_up, down, indices, weights)  # what grouped_mm does not take
    tokens, per_token = indices.shape
    sorted_ids, order = indices.flatten().sort(stable=True)  # (T K,), and the places that they come from
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    numbers = torch.arange(gate_up.shape[0], device=order.device)
    ends = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)  # bincount would wait for a GPU

    x_S = _Dispatch.apply(x, order, back, per_token)  # (T K, H)
    gate, up = F.grouped_mm(x_S, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    # weighted here, where rows are narrower than after `down`
    h = F.silu(gate) * up * _permute(weights.flatten(), order, back).to(x.dtype)[:, None]
    y_S = F.grouped_mm(h, down.transpose(1, 2), offs=ends)
    return _permute(y_S, back, order).view(tokens, per_token, -1).sum(1)


def reference_experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The formula, expert by expert; shapes as in `experts`."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, k = (indices == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[e]) * weights[token, k, None].to(x.dtype)
        out = out.index_add(0, token, y)
    return out


class _Dispatch(torch.autograd.Function):
    """Each token's row at each of its places (T K, H); the gradients of a token's places add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.per_token = per_token
        return x.index_select(0, order // per_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back).unflatten(0, (-1, ctx.per_token)).sum(1), None, None, None


def _permute(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    return _Permute.apply(x, order, back)


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is the inverse gather; autograd would accumulate row by row on one core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None
