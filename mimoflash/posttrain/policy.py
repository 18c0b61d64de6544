"""Log-probabilities of given tokens under a model: student and teachers alike, by one and the same forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimoflash.kernels.cross_entropy import cross_entropy
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch


def token_logp(model: Transformer, batch: RolloutBatch, *, replay: bool) -> Tensor:
    """logp_BT of the batch's own tokens, natural, at temperature 1, float32; 0 elsewhere.

    `replay`: by the routes of the rollout, as the model that sampled it needs (R3); another model routes freely. The
    head is asked about own tokens only.
    """
    routes_BSMK = batch.routes_BSMK if replay else None
    out = model.trunk(batch.tokens_BT[:, :-1], routes=routes_BSMK)
    if routes_BSMK is not None:
        assert torch.equal(out.routes, routes_BSMK.long()), "every captured route is replayed, in its own layer"
    row, place = batch.mask_BT[:, 1:].nonzero(as_tuple=True)
    logits_NV = model.logits(out.hidden[row, place])
    logp_N = -cross_entropy(logits_NV, batch.tokens_BT[row, place + 1])
    return torch.zeros_like(batch.mask_BT).index_put((row, place + 1), logp_N)


@torch.no_grad()
def score(model: Transformer, batches: Sequence[RolloutBatch], *, replay: bool) -> list[Tensor]:
    """`token_logp` of each of the batches, without gradient: no more logits at a time than one of them has."""
    return [token_logp(model, batch, replay=replay) for batch in batches]
