"""What a model makes of given rollouts: student and teachers alike, by one and the same forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mimoflash.kernels.cross_entropy import cross_entropy
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch


@dataclass(frozen=True)
class Scored:
    """A model's view of a batch with N own tokens, in the order of the mask's rows; token n is drawn from entry n of
    `logits_NV`. `hidden_BSH`: of every place but the last, before the final norm."""

    batch: RolloutBatch
    hidden_BSH: Tensor
    logits_NV: Tensor

    @cached_property
    def logp_NV(self) -> Tensor:
        """Natural, at temperature 1, float32."""
        return self.logits_NV.log_softmax(-1, dtype=torch.float32)

    def token_logp(self) -> Tensor:
        """logp_BT of the own tokens; 0 elsewhere."""
        own_BT, tokens_BT = self.batch.mask_BT > 0, self.batch.tokens_BT
        logp_N = -cross_entropy(self.logits_NV, tokens_BT[own_BT])
        return torch.zeros_like(self.batch.mask_BT).masked_scatter(own_BT, logp_N)


def view(model: Transformer, batch: RolloutBatch, *, replay: bool) -> Scored:
    """`replay`: by the routes of the rollout, as the model that sampled it needs (R3); another model routes freely. The
    head is asked about own tokens only."""
    routes_BSMK = batch.routes_BSMK if replay else None
    out = model.trunk(batch.tokens_BT[:, :-1], routes=routes_BSMK)
    if routes_BSMK is not None:
        assert torch.equal(out.routes, routes_BSMK.long()), "every captured route is replayed, in its own layer"
    return Scored(batch, out.hidden, model.logits(out.hidden[batch.mask_BT[:, 1:] > 0]))


def token_logp(model: Transformer, batch: RolloutBatch, *, replay: bool) -> Tensor:
    """logp_BT of the batch's own tokens, natural, at temperature 1, float32; 0 elsewhere."""
    return view(model, batch, replay=replay).token_logp()


@torch.no_grad()
def score(model: Transformer, batches: Sequence[RolloutBatch], *, replay: bool) -> list[Tensor]:
    """`token_logp` of each of the batches, without gradient: no more logits at a time than one of them has."""
    return [token_logp(model, batch, replay=replay) for batch in batches]


def mtp_loss(model: Transformer, scored: Scored) -> Tensor:
    """Cross entropy of the MTP layers on the own tokens that they draft, a mean over tokens and layers, so that drafts
    go on being accepted while the model moves. Its gradient reaches nothing but these layers."""
    batch = scored.batch
    tokens_BS = batch.tokens_BT[:, :-1]
    losses = []
    with frozen(model.lm_head.weight, model.model.embed_tokens.weight):
        for k, drafted_BSH in enumerate(model.mtp_hidden(scored.hidden_BSH.detach(), tokens_BS)):
            ahead = 2 + k  # layer k at place t drafts token t + 2 + k
            own_BT = batch.mask_BT[:, ahead:] > 0
            if own_BT.any():
                logits_NV = model.lm_head(drafted_BSH[:, : own_BT.shape[1]][own_BT])
                losses.append(cross_entropy(logits_NV, batch.tokens_BT[:, ahead:][own_BT]).mean())
    return torch.stack(losses).mean() if losses else scored.hidden_BSH.new_zeros(())


@contextmanager
def frozen(*parameters: Tensor) -> Iterator[None]:
    """What is computed in here has no gradient to these parameters."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
