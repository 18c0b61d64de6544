"""From logits to tokens: every token is a function of the model's distribution, the request's seed and the position.

The randomness of a token is not drawn but computed, from (seed, position, token id), where the seed is a hash of the
one that was given and the prompt. So it is the same with or without speculation, at any draft length and in any batch;
a draft is right exactly if it is the token that sampling gives.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimoflash.engine.params import SamplingParams
from mimoflash.engine.row_state import RowState
from mimoflash.kernels import native

__all__ = ["RowState", "Sampled", "Sampler", "SamplingParams", "exponential_noise", "sample"]


def sample(
    logits: Tensor,
    raw: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row: `logits` (N, V) after bias, penalties and mask (-inf), `raw` (N, V) as the model gave them.

    The others are (N,): temperature, top_p, min_p float32, top_k int32, seed int64 (the bits of a uint64), position
    int64: the place in its sequence that the token will take. Ties go to the lowest id; tokens rank by logit, then id.
    Returns tokens (N,) int64, their float32 log-probabilities under softmax(raw), and under what they were sampled from
    (0 where greedy). A row needs one finite logit at least.
    """
    tokens_N = logits.argmax(-1)
    sampling_N = torch.zeros_like(temperature)
    (drawn,) = (temperature > 0).nonzero(as_tuple=True)
    if len(drawn):
        w_NV = _weights(logits[drawn], temperature[drawn], top_p[drawn], top_k[drawn], min_p[drawn])
        ids_V = torch.arange(logits.shape[1], device=logits.device)
        # an exponential race: the first of several clocks of rates p rings with the probability p
        race_NV = exponential_noise(seed[drawn], position[drawn], ids_V) / w_NV
        tokens_N[drawn] = race_NV.argmin(-1)
        kept_N = w_NV.gather(1, tokens_N[drawn, None])[:, 0] / w_NV.sum(-1)
        sampling_N[drawn] = kept_N.log().float()
    logp_N = raw.float().log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]
    return tokens_N, logp_N, sampling_N


def _weights(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities up to a factor a row (N, V) float64, the largest 1, 0 for tokens that are cut."""
    below_NV = logits.double() - logits.amax(-1, keepdim=True)
    w_NV = (below_NV / temperature[:, None]).exp()
    (cut,) = ((top_k > 0) | (top_p < 1)).nonzero(as_tuple=True)
    if len(cut):
        order_NV = logits[cut].sort(stable=True, dim=-1, descending=True).indices
        sorted_NV = w_NV[cut].gather(1, order_NV)
        k_N1, p_N1 = top_k[cut, None], top_p[cut, None].double()
        rank_V = torch.arange(logits.shape[1], device=logits.device)
        sorted_NV = sorted_NV.masked_fill((k_N1 > 0) & (rank_V >= k_N1), 0)
        mass_NV = sorted_NV.cumsum(-1)
        reached_NV = mass_NV - sorted_NV >= p_N1 * mass_NV[:, -1:]  # by the tokens before
        sorted_NV = sorted_NV.masked_fill((p_N1 < 1) & reached_NV, 0)
        w_NV[cut] = torch.zeros_like(sorted_NV).scatter(1, order_NV, sorted_NV)
    return w_NV.masked_fill(w_NV < min_p[:, None], 0)


def exponential_noise(seed: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Exponential variates of rate 1, (N, V) float64, one for each (seed, position) (N,) int64 and token id (V,).

    Minus their logarithm is Gumbel noise. Each is a hash of the three; the same on every device and in every batch.
    """
    z_N = seed + _signed(0x9E3779B97F4A7C15, 64) * (position + 1)  # a splitmix64 generator at its position-th draw
    z_N = (z_N ^ _shift(z_N, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    z_N = (z_N ^ _shift(z_N, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    z_N = z_N ^ _shift(z_N, 31, 64)
    key1_N, key2_N = z_N.int(), _shift(z_N, 32, 64).int()  # low and high half: int() keeps the low 32 bits
    h_NV = tokens.int() * _signed(0x9E3779B9, 32) + key1_N[:, None]
    h_NV = _mix32(_mix32(h_NV) ^ key2_N[:, None])
    v_NV = ((h_NV.long() & 0xFFFFFFFF).double() + 0.5) / 2**32
    return -(-v_NV).log1p()


def _mix32(x: Tensor) -> Tensor:
    """murmur3's finaliser of int32 taken as uint32."""
    x = (x ^ _shift(x, 16, 32)) * _signed(0x85EBCA6B, 32)
    x = (x ^ _shift(x, 13, 32)) * _signed(0xC2B2AE35, 32)
    return x ^ _shift(x, 16, 32)


def _shift(x: Tensor, bits: int, width: int) -> Tensor:
    """To the right, filling with zeros: signed integers of `width` bits taken as unsigned."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


class Sampled(NamedTuple):
    """A token, its log-probability under the model and under what it was sampled from, and the likeliest tokens of its
    position with theirs (as many as `top_logprobs` asks for)."""

    token: int
    logprob: float
    sampling_logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Picks tokens for many requests at once."""

    def __init__(self) -> None:
        self._settings = _Settings([], [], torch.device("cpu"))  # the last ones: pass after pass they are the same

    def pick(
        self, logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Sequence[int]] | None = None
    ) -> list[list[Sampled]]:
        """The tokens by which each request goes on, and their states moved on by them.

        `logits` (N, V) float32 holds, request by request, 1 + len(drafts[i]) rows: those of the next token, then those
        after each draft (without drafts: one row a request). A request takes tokens as long as each is its draft: one
        more than it has right drafts; fewer where it is finished before, or where it meets an error.
        """
        drafts = drafts if drafts is not None else [()] * len(rows)
        firsts = accumulate((1 + len(draft) for draft in drafts), initial=0)
        turns = [_Turn(row, draft, first) for row, draft, first in zip(rows, drafts, firsts, strict=False)]
        assert sum(1 + len(draft) for draft in drafts) == len(logits), "a row of logits for each request and each draft"
        self._pick_plain(logits, [turn for turn in turns if turn.row.is_plain])
        self._pick_adjusted(logits, [turn for turn in turns if not turn.row.is_plain])
        for turn in turns:
            if turn.row.params.top_logprobs and turn.taken:
                turn.report_likeliest(logits)
        return [turn.taken for turn in turns]

    def _pick_plain(self, logits: Tensor, turns: list["_Turn"]) -> None:
        """All rows at once, as if all drafts were right."""
        if turns:
            counts = [1 + len(turn.drafts) for turn in turns]
            if sum(counts) < len(logits):
                logits = logits[[turn.first + i for turn, n in zip(turns, counts, strict=True) for i in range(n)]]
            sampled = self._sample_rows(logits, logits, [turn.row for turn in turns], counts)
            for turn, count in zip(turns, counts, strict=True):
                for one in islice(sampled, count):
                    turn.take(one)

    def _pick_adjusted(self, logits: Tensor, turns: list["_Turn"]) -> None:
        """The next row of each, as long as any goes on: what it depends on is known then."""
        while turns:
            raw = logits[[turn.first + len(turn.taken) for turn in turns]]
            adjusted = raw.clone()
            for turn, its in zip(turns, adjusted, strict=True):
                turn.adjust(its)
            alive = [i for i, turn in enumerate(turns) if not turn.is_over]
            turns = [turns[i] for i in alive]
            if turns:
                rows = [turn.row for turn in turns]
                sampled = self._sample_rows(adjusted[alive], raw[alive], rows, [1] * len(turns))
                for turn, one in zip(turns, sampled, strict=True):
                    turn.take(one)
                turns = [turn for turn in turns if not turn.is_over]

    def _sample_rows(
        self, logits: Tensor, raw: Tensor, rows: Sequence[RowState], counts: Sequence[int]
    ) -> Iterator[Sampled]:
        """A token from each row of logits: counts[i] of them are request i's, for its next token and those after."""
        if not self._settings.are_of(rows, counts, logits.device):
            self._settings = _Settings(rows, counts, logits.device)
        position = torch.tensor([row.position + i for row, n in zip(rows, counts, strict=True) for i in range(n)])
        results = _implementation(logits.device)(
            logits, raw, *self._settings.columns, position.to(logits.device)
        )
        return map(Sampled, *(x.tolist() for x in results))


class _Settings:
    """What `sample` is told of each row beside its position: `columns` temperature, top_p, top_k, min_p, seed."""

    def __init__(self, rows: Sequence[RowState], counts: Sequence[int], device: torch.device):
        self.rows, self.counts, self.device = list(rows), list(counts), device
        params = [row.params for row in rows]

        def column(values: list[Any], dtype: Any) -> Tensor:
            return torch.from_numpy(np.repeat(np.array(values, dtype), counts)).to(device)

        self.columns = (
            column([p.temperature for p in params], np.float32),
            column([p.top_p for p in params], np.float32),
            column([p.top_k for p in params], np.int32),
            column([p.min_p for p in params], np.float32),
            column([row.seed for row in rows], np.uint64).view(torch.int64),
        )

    def are_of(self, rows: Sequence[RowState], counts: Sequence[int], device: torch.device) -> bool:
        return (
            len(rows) == len(self.rows) and all(map(operator.is_, rows, self.rows))
            and counts == self.counts and device == self.device
        )


@dataclass
class _Turn:
    """A request's part of one `pick`: its logits start at row `first`."""

    row: RowState
    drafts: Sequence[int]
    first: int
    taken: list[Sampled] = field(default_factory=list)
    is_over: bool = False

    def adjust(self, logits: Tensor) -> None:
        try:
            self.row.adjust(logits)
            if logits.max() == -math.inf:
                self._fail("no token is allowed here: the grammar and logit_bias leave none")
        except ValueError as error:
            self._fail(str(error))

    def take(self, sampled: Sampled) -> None:
        if self.is_over:
            return
        if math.isnan(sampled.logprob):
            self._fail("the model's logits are not finite: its weights or what it was given are broken")
            return
        place = len(self.taken)
        self.taken.append(sampled)
        self.row.take(sampled.token)
        was_drafted = place < len(self.drafts) and self.drafts[place] == sampled.token
        self.is_over = self.row.is_finished or not was_drafted

    def _fail(self, reason: str) -> None:
        self.row.error, self.is_over = reason, True

    def report_likeliest(self, logits: Tensor) -> None:
        logp = logits[self.first : self.first + len(self.taken)].float().log_softmax(-1)
        values, ids = logp.topk(min(self.row.params.top_logprobs, logp.shape[1]))
        for i, (its_ids, its_values) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
            likeliest = tuple(zip(its_ids, its_values, strict=True))
            self.taken[i] = self.taken[i]._replace(top_logprobs=likeliest)


def _implementation(device: torch.device) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`sample`, or the same in C++ where it is built."""
    is_native = device.type == "cpu" and hasattr(native, "sample") and native.available()
    return native.sample if is_native else sample
