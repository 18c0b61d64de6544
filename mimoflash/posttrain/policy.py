"""What a model makes of given rollouts: student and teachers alike, by one and the same forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mimoflash.kernels.cross_entropy import cross_entropy
from mimoflash.model import Transformer
from mimoflash.model.transformer import shift_left
from mimoflash.posttrain.batch import RolloutBatch


class SharedPrompts:
    """A batch's prompts as the cache of its rows: their keys and values are computed once, with gradient, and each row
    sees those of its own prompt."""

    def __init__(self, batch: RolloutBatch):
        self.batch, self.length = batch, batch.start_B
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        places_P = torch.arange(batch.prompts_GP.shape[1], device=batch.prompts_GP.device)
        self.positions_GP = places_P.expand_as(batch.prompts_GP)
        self._seen_GP = self.positions_GP.masked_fill(places_P >= batch.prompt_lengths_G[:, None], -1)
        self.reads_prompts = False

    @property
    def or_none(self) -> "SharedPrompts | None":
        """Without prompts attention needs no cache, and is faster so."""
        return self if self.batch.prompts_GP.shape[1] else None

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.reads_prompts:
            self._kept[layer] = k, v
            return k, v, positions
        prompt_k, prompt_v = (x[self.batch.prompt_B] for x in self._kept[layer])
        seen = torch.cat([self._seen_GP[self.batch.prompt_B], positions], dim=1)
        return torch.cat([prompt_k, k], dim=1), torch.cat([prompt_v, v], dim=1), seen


@dataclass(frozen=True)
class View:
    """A model's view of a batch with N own tokens, in the order of the mask's rows; token n is drawn from entry n of
    `logits_NV`. `hidden_BSH`: of every place of the rows but the last, before the final norm; `prompt_hidden_GPH`: of
    the prompts."""

    batch: RolloutBatch
    prompts: SharedPrompts
    prompt_hidden_GPH: Tensor | None
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

    @property
    def positions_BS(self) -> Tensor:
        return _positions(self.batch)


def view(model: Transformer, batch: RolloutBatch, *, replay: bool) -> View:
    """`replay`: by the routes of the rollout, as the model that sampled it needs (R3); another model routes freely. The
    head is asked about own tokens only."""
    prompts = SharedPrompts(batch)
    prompt_hidden_GPH = None
    if batch.prompts_GP.shape[1]:
        prompts.reads_prompts = True
        routes = batch.prompt_routes_GPMK if replay else None
        out = model.trunk(batch.prompts_GP, prompts.positions_GP, cache=prompts, routes=routes)
        _check_replayed(out.routes, routes)
        prompt_hidden_GPH = out.hidden
        prompts.reads_prompts = False
    routes = batch.routes_BSMK if replay else None
    out = model.trunk(batch.tokens_BT[:, :-1], _positions(batch), cache=prompts.or_none, routes=routes)
    _check_replayed(out.routes, routes)
    logits_NV = model.logits(out.hidden[batch.mask_BT[:, 1:] > 0])
    return View(batch, prompts, prompt_hidden_GPH, out.hidden, logits_NV)


def _positions(batch: RolloutBatch) -> Tensor:
    places = torch.arange(batch.tokens_BT.shape[1] - 1, device=batch.tokens_BT.device)
    return batch.start_B[:, None] + places


def _check_replayed(got: Tensor, wanted: Tensor | None) -> None:
    if wanted is not None:
        assert torch.equal(got, wanted.long()), "every captured route is replayed, in its own layer"


def token_logp(model: Transformer, batch: RolloutBatch, *, replay: bool) -> Tensor:
    """logp_BT of the batch's own tokens, natural, at temperature 1, float32; 0 elsewhere."""
    return view(model, batch, replay=replay).token_logp()


@torch.no_grad()
def score(model: Transformer, batches: Sequence[RolloutBatch], *, replay: bool) -> list[Tensor]:
    """`token_logp` of each of the batches, without gradient: no more logits at a time than one of them has."""
    return [token_logp(model, batch, replay=replay) for batch in batches]


def mtp_loss(model: Transformer, seen: View) -> Tensor:
    """Cross entropy of the MTP layers on the own tokens that they draft, a mean over tokens and layers, so that drafts
    go on being accepted while the model moves. Its gradient reaches nothing but these layers."""
    batch, losses = seen.batch, []
    with frozen(model.lm_head.weight, model.model.embed_tokens.weight):
        for k in range(len(model.model.mtp.layers)):
            ahead = 2 + k  # layer k at place t drafts token t + 2 + k
            own_BT = batch.mask_BT[:, ahead:] > 0
            if own_BT.any():
                drafted_BSH = _drafted(model, seen, k)
                logits_NV = model.lm_head(drafted_BSH[:, : own_BT.shape[1]][own_BT])
                losses.append(cross_entropy(logits_NV, batch.tokens_BT[:, ahead:][own_BT]).mean())
    return torch.stack(losses).mean() if losses else seen.hidden_BSH.new_zeros(())


def _drafted(model: Transformer, seen: View, k: int) -> Tensor:
    """(B, S, H) of MTP layer k over the rows; its last places are without meaning."""
    batch, prompts = seen.batch, seen.prompts
    if seen.prompt_hidden_GPH is not None:
        prompts.reads_prompts = True
        model.mtp(k, seen.prompt_hidden_GPH.detach(), _following(batch, k), prompts.positions_GP, cache=prompts)
        prompts.reads_prompts = False
    next_BS = shift_left(batch.tokens_BT, 1 + k)[:, :-1]
    return model.mtp(k, seen.hidden_BSH.detach(), next_BS, seen.positions_BS, cache=prompts.or_none)


def _following(batch: RolloutBatch, k: int) -> Tensor:
    """(G, P): for each place of the prompts the token 1 + k places later, which the first tokens of the rows know
    where the shared part has come to its end."""
    groups = len(batch.prompts_GP)
    rows = [int((batch.prompt_B == group).nonzero()[0]) for group in range(groups)]
    following = shift_left(batch.prompts_GP, 1 + k)
    for group, row in enumerate(rows):
        end = int(batch.prompt_lengths_G[group])
        count = min(1 + k, end)
        following[group, end - count : end] = batch.tokens_BT[row, 1 + k - count : 1 + k]
    return following


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
