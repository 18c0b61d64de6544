"""AdamW's groups, the learning-rate and batch schedules, and the balancing of experts without a loss."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mimoflash.model.moe import Router


def parameter_groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and sinks, which are vectors, do not."""
    decayed = [p for p in parameters if p.dim() >= 2]
    kept = [p for p in parameters if p.dim() < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def learning_rate(
    tokens: float, *, peak: float, final: float, warmup_tokens: float, constant_tokens: float, total_tokens: float
) -> float:
    """Linear from 0 to `peak`, constant, then a cosine to `final` at `total_tokens` (arXiv 2601.02780, section 3)."""
    if tokens < warmup_tokens:
        return peak * tokens / warmup_tokens
    start = warmup_tokens + constant_tokens
    if tokens <= start or total_tokens <= start:
        return peak
    part = min(1.0, (tokens - start) / (total_tokens - start))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * part))


def batch_size(tokens: float, *, first: int, full: int, warmup_tokens: float) -> int:
    """Sequences a step: linear from `first` to `full` over `warmup_tokens`."""
    part = min(1.0, tokens / warmup_tokens) if warmup_tokens else 1.0
    return round(first + (full - first) * part)


@torch.no_grad()
def update_expert_bias(model: nn.Module, counts: Tensor, step: float) -> None:
    """Moves each expert's correction bias by `step` towards its fair share of `counts` (MoE layers, experts)
    (auxiliary-loss-free balancing, arXiv 2408.15664)."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, count in zip(routers, counts, strict=True):
        router.e_score_correction_bias.add_(torch.sign(count.mean() - count), alpha=step)


def imbalance(counts: Tensor) -> float:
    """Largest load over the mean load of a layer's experts, averaged over the layers of `counts` (layers, experts)."""
    return (counts.max(1).values / counts.mean(1).clamp(min=1e-9)).mean().item()
