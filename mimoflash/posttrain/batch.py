"""From rollouts to tensors: padded side by side, with a mask on the model's own tokens and routes to replay."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimoflash.config import ModelConfig
from mimoflash.posttrain.rollout import Rollout


@dataclass(frozen=True)
class Sample:
    """A rollout and its outcome: the reward, normalised within the rollouts of the same task."""

    rollout: Rollout
    outcome: float

    @property
    def length(self) -> int:
        """Up to the last token that the model wrote: what comes after it has no part in any loss."""
        return self.rollout.turns[-1][1]


@dataclass(frozen=True)
class RolloutBatch:
    """B samples of at most T tokens. Entry t of each tensor speaks of token t, which is predicted at place t - 1.

    `tokens_BT` int64. `mask_BT` float32: 1 on the model's own tokens, 0 on prompt, tool and environment tokens and on
    padding. `rollout_logp_BT`: of the own tokens under what they were sampled from, else 0. `routes_BSMK` (B, T - 1,
    MoE layers, experts per token): of every place but the last, at which nothing of the batch is predicted.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    rollout_logp_BT: Tensor
    outcome_B: Tensor
    routes_BSMK: Tensor

    @property
    def own_tokens(self) -> float:
        return self.mask_BT.sum().item()


def filter_empty(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those in which the model wrote a token."""
    return [rollout for rollout in rollouts if any(end > start for start, end in rollout.turns)]


def micro_batches(samples: Sequence[Sample], tokens: int) -> Iterator[list[Sample]]:
    """All samples, those of like length together: as many at a time as take `tokens` padded tokens (one at least)."""
    part: list[Sample] = []
    for sample in sorted(samples, key=lambda s: s.length):  # so the last one of a part is its longest
        if part and (len(part) + 1) * sample.length > tokens:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def make_batch(
    samples: Sequence[Sample], config: ModelConfig, device: torch.device | str = "cpu"
) -> RolloutBatch:
    """Raises ValueError for a rollout without a token of its own, and for one whose parts do not fit one another or the
    model: routes that are not one a place that ran, with the MoE layers alone and as many experts as a token has."""
    for sample in samples:
        _check(sample.rollout, config)
    batch, length = len(samples), max(sample.length for sample in samples)
    shape = (batch, length - 1, len(config.moe_layers), config.num_experts_per_tok)
    tokens_BT = torch.zeros(batch, length, dtype=torch.long)
    mask_BT, rollout_logp_BT = torch.zeros(batch, length), torch.zeros(batch, length)
    routes_BSMK = torch.zeros(shape, dtype=samples[0].rollout.routes.dtype)
    for row, sample in enumerate(samples):
        rollout = sample.rollout
        tokens_BT[row, : sample.length] = torch.tensor(rollout.tokens[: sample.length])
        routes_BSMK[row, : len(rollout.routes)] = rollout.routes
        for start, end in rollout.turns:
            mask_BT[row, start:end] = 1.0
            rollout_logp_BT[row, start:end] = torch.tensor(rollout.sampling_logprobs[start:end])
    outcome_B = torch.tensor([sample.outcome for sample in samples])
    tensors = (tokens_BT, mask_BT, rollout_logp_BT, outcome_B, routes_BSMK)
    return RolloutBatch(*(tensor.to(device) for tensor in tensors))


def _check(rollout: Rollout, config: ModelConfig) -> None:
    name = f"the rollout of seed {rollout.seed}"
    if not filter_empty([rollout]):
        raise ValueError(f"{name} has no token of its own: drop it before (filter_empty)")
    if len(rollout.sampling_logprobs) != len(rollout.tokens):
        raise ValueError(f"{name} has {len(rollout.tokens)} tokens, {len(rollout.sampling_logprobs)} sampling_logprobs")
    places = [place for turn in rollout.turns for place in turn]
    if places != sorted(places) or places[0] < 1 or places[-1] > len(rollout.tokens):
        raise ValueError(f"{name} has turns {rollout.turns}: they must follow each other, and a prompt comes before")
    _check_routes(rollout.routes, name, places[-1] - 1, config)


def _check_routes(routes: Tensor, name: str, places: int, config: ModelConfig) -> None:
    wanted = (places, len(config.moe_layers), config.num_experts_per_tok)
    if tuple(routes.shape) != wanted:
        raise ValueError(
            f"{name} has routes {tuple(routes.shape)}; (places that ran, MoE layers, experts per token) is {wanted}. "
            "Dense layers have no routes, and the last token that the model wrote has not run"
        )
    if not routes.numel():
        return
    if not 0 <= routes.min() <= routes.max() < config.n_routed_experts:
        raise ValueError(f"{name} has routes to an expert that is not among the {config.n_routed_experts}")
    ordered = routes.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"{name} has a route that names an expert twice: no router chose it, it was never filled in")
