"""The whole network. Start here: embedding, layers, norm, head, and the MTP layers beside them.

Module names are those of the published tensors, so that a state dict reads like the checkpoint.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from mimoflash.config import DENSE, GLOBAL, WINDOW, ModelConfig
from mimoflash.model.attention import Attention, Cache, Rope, rope_angles
from mimoflash.model.moe import DenseFFN, Experts, MoE, Router, Routing
from mimoflash.model.mtp import MTPLayer
from mimoflash.model.norm import RMSNorm


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.kind = config.layer_types[index]
        self.self_attn = Attention(config, self.kind, index)
        self.mlp = DenseFFN(config) if config.mlp_layer_types[index] == DENSE else MoE(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(
        self, x: Tensor, positions: Tensor, ropes: dict[str, Rope], document_ids: Tensor | None, cache: Cache | None,
        route: Tensor | None,
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), positions, ropes[self.kind], document_ids, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(normed, route)
            return x + y, routing
        return x + self.mlp(normed), None


class MTP(nn.Module):
    """The MTP layers, and the ids that they may draft (D,) int64, sorted (None: all): a head that asks about few tokens
    is cheap."""

    draft_tokens: Tensor | None = None  # no buffer: it is no part of the published format

    def __init__(self, config: ModelConfig):
        super().__init__()
        layers = range(config.num_nextn_predict_layers)
        self.layers = nn.ModuleList(MTPLayer(config, config.layers + k) for k in layers)


class Trunk(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config)
        self.mtp = MTP(config)


@dataclass
class TrunkOutput:
    """`hidden` (B, L, H) before the final norm; one Routing for each MoE layer, B * L tokens each."""

    hidden: Tensor
    routings: list[Routing] = field(default_factory=list)

    @property
    def routes(self) -> Tensor:
        """(B, L, MoE layers, experts per token): the experts chosen, as `routes` takes them back."""
        batch, length = self.hidden.shape[:2]
        if not self.routings:
            return self.hidden.new_zeros(batch, length, 0, 0, dtype=torch.long)
        return torch.stack([r.indices.view(batch, length, -1) for r in self.routings], dim=2)


class Transformer(nn.Module):
    """MiMo-V2-Flash (arXiv 2601.02780, section 2). Weights are random: `load_model` fills them from a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        initialise(self, config.initializer_range)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None,
        cache: Cache | None = None, routes: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, L) int64 -> logits (B, L, vocabulary).

        `positions` (B, L): RoPE positions; 0, 1, ... from the cache's length on if not given. `document_ids` (B, L): a
        token attends to its own document only; -1 is padding. `cache`: earlier positions, and these are added to it.
        `routes` (B, L, MoE layers, experts per token): experts to replay. Raises ValueError on tokens outside the
        vocabulary or shapes that do not fit.
        """
        return self.logits(self.trunk(tokens, positions, document_ids, cache, routes).hidden)

    def trunk(
        self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None,
        cache: Cache | None = None, routes: Tensor | None = None,
    ) -> TrunkOutput:
        """As `forward`, but hidden states before the final norm, and what the routers decided."""
        self._check(tokens, positions, document_ids, cache, routes)
        positions = self._positions(tokens, positions, cache)
        x = self.model.embed_tokens(tokens)
        ropes = self.ropes(positions, x.dtype)
        out = TrunkOutput(x)
        for layer in self.model.layers:
            route = routes[:, :, len(out.routings)] if routes is not None and isinstance(layer.mlp, MoE) else None
            out.hidden, routing = layer(out.hidden, positions, ropes, document_ids, cache, route)
            if routing is not None:
                out.routings.append(routing)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states before the final norm (.., H) -> (.., vocabulary)."""
        return self.lm_head(self.model.norm(hidden))

    def mtp(
        self, k: int, hidden: Tensor, next_tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """MTP layer k: `hidden` (B, L, H) of the trunk at `positions`, before its final norm, and the tokens 1 + k
        places later (B, L) -> normed hidden states (B, L, H), which `lm_head` turns into logits of the token after."""
        rope = rope_angles(self.config.attention(WINDOW), positions, hidden.dtype)
        embedding = self.model.embed_tokens(next_tokens)
        return self.model.mtp.layers[k](hidden, embedding, positions, rope, document_ids, cache)

    def mtp_hidden(
        self, hidden: Tensor, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Every MTP layer over whole sequences: layer k at position t looks at hidden[t] and tokens up to t + 1 + k.
        Its last 1 + k positions, in the row and in each document, are without meaning."""
        positions = self._positions(tokens, positions, None)
        layers = range(len(self.model.mtp.layers))
        return [self.mtp(k, hidden, shift_left(tokens, 1 + k), positions, document_ids) for k in layers]

    def mtp_logits(
        self, tokens: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None
    ) -> list[Tensor]:
        """One (B, L, vocabulary) for each MTP layer; layer k at position t predicts token t + 2 + k."""
        hidden = self.trunk(tokens, positions, document_ids).hidden
        return [self.lm_head(h) for h in self.mtp_hidden(hidden, tokens, positions, document_ids)]

    def ropes(self, positions: Tensor, dtype: torch.dtype) -> dict[str, Rope]:
        return {kind: rope_angles(self.config.attention(kind), positions, dtype) for kind in (GLOBAL, WINDOW)}

    @torch.no_grad()
    def set_mtp_layers(self, count: int) -> None:
        """Keeps the first `count` MTP layers; where there are fewer, copies of the last one are added (the report
        replicates the one of pre-training), or new ones if there is none."""
        layers = self.model.mtp.layers
        for k in range(len(layers), count):
            layer = MTPLayer(self.config, self.config.layers + k)
            if k:
                layer.load_state_dict(layers[-1].state_dict())
            else:
                initialise(layer, self.config.initializer_range)
            layers.append(layer.to(self.lm_head.weight))
        del layers[count:]
        self.config = dataclasses.replace(self.config, num_nextn_predict_layers=count)

    def _positions(self, tokens: Tensor, positions: Tensor | None, cache: Cache | None) -> Tensor:
        if positions is not None:
            return positions
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return places if cache is None else places + cache.length[:, None]

    def _check(
        self, tokens: Tensor, positions: Tensor | None, document_ids: Tensor | None, cache: Cache | None,
        routes: Tensor | None,
    ) -> None:
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens must be (batch, length), neither of them 0, not {tuple(tokens.shape)}")
        if not tokens.is_meta and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self.config.vocab_size}")
        for name, value in (("positions", positions), ("document_ids", document_ids)):
            if value is not None and value.shape != tokens.shape:
                raise ValueError(f"{name} is {tuple(value.shape)} but tokens are {tuple(tokens.shape)}: give one each")
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids are for packed sequences, a cache holds one document a row: give one")
        wanted = (*tokens.shape, len(self.config.moe_layers), self.config.num_experts_per_tok)
        if routes is not None and tuple(routes.shape) != wanted:
            raise ValueError(
                f"routes is {tuple(routes.shape)}; (batch, length, MoE layers, experts per token) is {wanted}"
            )


@torch.no_grad()
def initialise(network: nn.Module, std: float) -> None:
    """Normal weights of the standard deviation; norms 1, correction biases and sinks 0, as modules are made."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            module.weight.normal_(0.0, std)
        elif isinstance(module, Experts):
            module.gate_up_proj.normal_(0.0, std)
            module.down_proj.normal_(0.0, std)


def shift_left(x: Tensor, places: int) -> Tensor:
    """x (B, L) moved to the left, zeros behind."""
    return torch.cat([x[:, places:], x.new_zeros(x.shape[0], min(places, x.shape[1]))], dim=1)
