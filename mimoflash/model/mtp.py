"""A multi-token-prediction layer: drafts the token 2 + k places ahead from the trunk's hidden state."""

import torch
import torch.nn as nn
from torch import Tensor

from mimoflash.config import WINDOW, ModelConfig
from mimoflash.model.attention import Attention, Cache, Rope
from mimoflash.model.moe import DenseFFN
from mimoflash.model.norm import RMSNorm


class MTPLayer(nn.Module):
    """Window attention and a dense FFN over the next token's embedding and the trunk's hidden state
    (arXiv 2601.02780, section 2.3). All layers read the same hidden state: only the tokens chain."""

    def __init__(self, config: ModelConfig, cache_layer: int):
        super().__init__()
        h = config.hidden_size
        self.enorm = RMSNorm(config)
        self.hnorm = RMSNorm(config)
        self.eh_proj = nn.Linear(2 * h, h, bias=False)
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, WINDOW, cache_layer)
        self.pre_mlp_layernorm = RMSNorm(config)
        self.mlp = DenseFFN(config)
        self.final_layernorm = RMSNorm(config)

    def forward(
        self, hidden: Tensor, embedding: Tensor, positions: Tensor, rope: Rope, document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """hidden, embedding (B, L, H) -> (B, L, H), normed, ready for the shared head."""
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        x = x + self.self_attn(self.input_layernorm(x), positions, rope, document_ids, cache)
        x = x + self.mlp(self.pre_mlp_layernorm(x))
        return self.final_layernorm(x)
