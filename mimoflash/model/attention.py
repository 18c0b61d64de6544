"""An attention layer: projections, partial RoPE, value scale, the cache, and the kernel that does the rest."""

from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from mimoflash.config import AttentionShape, ModelConfig
from mimoflash.kernels.attention import attention


class Cache(Protocol):
    """Keys and values of earlier positions, by layer; MTP layers follow the trunk's."""

    length: Tensor  # (B,) positions held

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the new k (B, L, Hkv, D), v (B, L, Hkv, Dv) at positions (B, L); returns all keys and values that the
        new queries may attend to, and their positions (B, Lk), -1 where there is none."""


Rope = tuple[Tensor, Tensor]  # cos, sin (B, L, 1, rope_dim / 2)


def rope_angles(shape: AttentionShape, positions: Tensor, dtype: torch.dtype) -> Rope:
    """cos and sin of position x base^(-2i / rope_dim), i < rope_dim / 2, for positions (B, L)."""
    exponents = torch.arange(0, shape.rope_dim, 2, device=positions.device, dtype=torch.float32) / shape.rope_dim
    angles = positions[..., None].float() / shape.rope_theta**exponents
    return angles.cos().unsqueeze(2).to(dtype), angles.sin().unsqueeze(2).to(dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate-half on the first rope_dim of the last axis of x (B, L, heads, D); the rest passes."""
    cos, sin = rope
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class Attention(nn.Module):
    """Global or sliding-window attention (arXiv 2601.02780, section 2.2). `layer` is its place in the cache."""

    def __init__(self, config: ModelConfig, kind: str, layer: int):
        super().__init__()
        self.shape = shape = config.attention(kind)
        self.layer = layer
        self.value_scale = config.attention_value_scale
        self.q_proj = nn.Linear(config.hidden_size, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shape.kv_heads * shape.v_head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.v_head_dim, config.hidden_size, bias=False)
        self.attention_sink_bias = nn.Parameter(torch.zeros(shape.heads)) if shape.sink else None

    def forward(
        self, x: Tensor, positions: Tensor, rope: Rope, document_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        q = rotate(self.q_proj(x).unflatten(-1, (self.shape.heads, -1)), rope)  # (B, L, H, D)
        k = rotate(self.k_proj(x).unflatten(-1, (self.shape.kv_heads, -1)), rope)  # (B, L, Hkv, D)
        v = (self.v_proj(x) * self.value_scale).unflatten(-1, (self.shape.kv_heads, -1))  # (B, L, Hkv, Dv)
        seen = {}
        if cache is not None:
            k, v, key_positions = cache.update(self.layer, k, v, positions)
            seen = {"query_positions": positions, "key_positions": key_positions}
        out = attention(
            q, k, v, window=self.shape.window, sink=self.attention_sink_bias, document_ids=document_ids, **seen
        )
        return self.o_proj(out.flatten(2))
