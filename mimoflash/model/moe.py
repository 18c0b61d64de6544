"""The feed-forward parts: dense SwiGLU, and the sparse mixture with its sigmoid router."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mimoflash.config import ModelConfig
from mimoflash.kernels.experts import experts


class DenseFFN(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Routing:
    """What a router decided for T tokens: `scores` (T, E) sigmoid, unbiased, with gradient; `indices` (T, K)."""

    scores: Tensor
    indices: Tensor


class Router(nn.Module):
    """Sigmoid scores in float32; the correction bias takes part in the choice, never in the weights
    (auxiliary-loss-free balancing, arXiv 2408.15664)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.per_token, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor, indices: Tensor | None = None) -> tuple[Routing, Tensor]:
        """x (T, H) -> routing and weights (T, K). With `indices` (T, K) these experts are taken instead of chosen, at
        the scores that this router gives them (routing replay)."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        if indices is None:
            biased = scores.detach() + self.e_score_correction_bias.float()
            indices = biased.topk(self.per_token, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores, indices), weights * self.scaling


class Experts(nn.Module):
    """The weights of all experts, stacked so that they multiply in groups."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, h, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))


class MoE(nn.Module):
    """Routed experts without a shared one (arXiv 2601.02780, section 2.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (B, L, H); `indices` (B, L, K) to replay."""
        flat = x.flatten(0, 1)
        routing, weights = self.gate(flat, None if indices is None else indices.flatten(0, 1).long())
        y = experts(flat, self.experts.gate_up_proj, self.experts.down_proj, routing.indices, weights)
        return y.view(x.shape), routing
