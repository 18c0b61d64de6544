"""From rollouts to tensors: what the rollouts of a task have in common once, the rest padded side by side, with a mask
on the model's own tokens and routes to replay."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

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
    """B samples, of whose prompts the G that differ are held once (a group's rollouts share theirs), all but their last
    tokens: P at most. The rows have the rest, T tokens at most; row b goes on from prompt `prompt_B[b]`. Entry t of a
    row's tensors speaks of its token t, which is predicted at place t - 1.

    `tokens_BT` int64. `mask_BT` float32: 1 on the model's own tokens, 0 on prompt, tool and environment tokens and on
    padding. `rollout_logp_BT`: of the own tokens under what they were sampled from, else 0. `routes_BSMK` (B, T - 1,
    MoE layers, experts per token): of every place but the last, at which nothing of the batch is predicted.
    `prompts_GP` (padded), `prompt_lengths_G`, `prompt_routes_GPMK`: the same of the prompts.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    rollout_logp_BT: Tensor
    outcome_B: Tensor
    routes_BSMK: Tensor
    prompt_B: Tensor
    prompts_GP: Tensor
    prompt_lengths_G: Tensor
    prompt_routes_GPMK: Tensor

    @property
    def own_tokens(self) -> float:
        return self.mask_BT.sum().item()

    @property
    def start_B(self) -> Tensor:
        """The place of a row's first token in its rollout."""
        return self.prompt_lengths_G[self.prompt_B]

    def whole_row(self, row: int) -> list[int]:
        """The row's tokens, its prompt before it, up to the last own one."""
        prompt, length = self.prompt_B[row], int(self.start_B[row])
        end = int(self.mask_BT[row].nonzero()[-1]) + 1
        return self.prompts_GP[prompt, :length].tolist() + self.tokens_BT[row, :end].tolist()

    def to(self, device: torch.device | str) -> "RolloutBatch":
        return RolloutBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def filter_empty(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those in which the model wrote a token."""
    return [rollout for rollout in rollouts if any(end > start for start, end in rollout.turns)]


def micro_batches(samples: Sequence[Sample], tokens: int) -> Iterator[list[Sample]]:
    """All samples, those of a task together, tasks of like length next to each other: as many at a time as take
    `tokens` padded tokens (one at least)."""
    longest: dict[tuple[int, ...], int] = {}
    for sample in samples:
        longest[_prompt(sample)] = max(longest.get(_prompt(sample), 0), sample.length)
    part: list[Sample] = []
    for sample in sorted(samples, key=lambda s: (longest[_prompt(s)], _prompt(s), s.length)):
        if part and _padded_tokens([*part, sample]) > tokens:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def _padded_tokens(samples: Sequence[Sample]) -> int:
    prompts = {_prompt(sample) for sample in samples}
    answers = max(sample.length - len(_prompt(sample)) for sample in samples)
    return len(prompts) * max(map(len, prompts)) + len(samples) * answers


def _prompt(sample: Sample) -> tuple[int, ...]:
    return tuple(sample.rollout.tokens[: sample.rollout.turns[0][0]])


def make_batch(
    samples: Sequence[Sample], config: ModelConfig, device: torch.device | str = "cpu"
) -> RolloutBatch:
    """Raises ValueError for a rollout without a token of its own, and for one whose parts do not fit one another or the
    model: routes that are not one a place that ran, with the MoE layers alone and as many experts as a token has."""
    for sample in samples:
        _check(sample.rollout, config)
    # MTP layer k looks 1 + k tokens ahead of a place: of what is shared, no place may look into an answer
    apart = 1 + config.num_nextn_predict_layers
    starts = [max(sample.rollout.turns[0][0] - apart, 0) for sample in samples]
    prompt_B, firsts = _shared(samples, starts)
    shape = (len(config.moe_layers), config.num_experts_per_tok)
    prompts_GP, prompt_routes_GPMK = _padded(
        [(samples[i].rollout.tokens[: starts[i]], samples[i].rollout.routes[: starts[i]]) for i in firsts], shape
    )
    ends = [sample.length for sample in samples]
    tokens_BT, routes_BTMK = _padded(
        [(s.rollout.tokens[a:b], s.rollout.routes[a:b]) for s, a, b in zip(samples, starts, ends, strict=True)], shape
    )
    mask_BT, rollout_logp_BT = torch.zeros(tokens_BT.shape), torch.zeros(tokens_BT.shape)
    for row, (sample, offset) in enumerate(zip(samples, starts, strict=True)):
        for start, end in sample.rollout.turns:
            mask_BT[row, start - offset : end - offset] = 1.0
            logprobs = torch.tensor(sample.rollout.sampling_logprobs[start:end])
            rollout_logp_BT[row, start - offset : end - offset] = logprobs
    outcome_B = torch.tensor([sample.outcome for sample in samples])
    lengths_G = torch.tensor([starts[i] for i in firsts])
    batch = RolloutBatch(
        tokens_BT, mask_BT, rollout_logp_BT, outcome_B, routes_BTMK[:, :-1], prompt_B, prompts_GP, lengths_G,
        prompt_routes_GPMK,
    )
    return batch.to(device)


def _shared(samples: Sequence[Sample], starts: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Which prompt each sample goes on from, and the first sample of each. Prompts are the same where their tokens and
    routes are, so that every captured route is replayed."""
    known: dict[tuple[tuple[int, ...], bytes], int] = {}  # the whole prompt: MTP layers look ahead into its end
    prompt, firsts = [], []
    for i, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        routes = sample.rollout.routes[:start].contiguous().numpy().tobytes()
        key = _prompt(sample), routes
        if key not in known:
            known[key] = len(known)
            firsts.append(i)
        prompt.append(known[key])
    return torch.tensor(prompt), firsts


def _padded(rows: Sequence[tuple[list[int], Tensor]], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tokens (rows, longest) and routes (rows, longest, *shape); there may be fewer routes than tokens."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens_RT = torch.zeros(len(rows), longest, dtype=torch.long)
    routes_RTMK = torch.zeros(len(rows), longest, *shape, dtype=rows[0][1].dtype)
    for row, (tokens, routes) in enumerate(rows):
        tokens_RT[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        routes_RTMK[row, : len(routes)] = routes
    return tokens_RT, routes_RTMK


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
