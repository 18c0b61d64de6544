"""From logits to a token: greedy, or sampled at a temperature from the nucleus."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. `temperature` 0 takes the most likely token; `top_p` keeps the smallest set of
    tokens that holds this much probability. `seed` fixes a request's tokens, whatever runs beside it. `stop`: strings
    that end it. `ignore_stop_tokens` goes on past the tokenizer's end tokens."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = field(default=())
    ignore_stop_tokens: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: at least one token is generated")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: 0 (greedy) or more is needed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not all(self.stop):
            raise ValueError("stop holds an empty string, which every text ends with: leave it out")


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row from logits (N, V); temperature, top_p and `uniform` (draws from [0, 1)) are (N,) float32.

    Returns tokens (N,), their log-probabilities under the model (temperature 1, nothing cut), and under what they were
    sampled from (0 where greedy).
    """
    logp_NV = logits.float().log_softmax(-1)
    greedy_N = logp_NV.argmax(-1)
    if not (temperature > 0).any():
        return greedy_N, logp_NV.gather(1, greedy_N[:, None])[:, 0], torch.zeros_like(uniform)
    p_NV, order_NV = (logp_NV / temperature.clamp(min=1e-6)[:, None]).softmax(-1).sort(dim=-1, descending=True)
    before_NV = p_NV.cumsum(-1) - p_NV
    p_NV = p_NV.masked_fill(before_NV >= top_p[:, None], 0.0)  # the first is always kept
    p_NV = p_NV / p_NV.sum(-1, keepdim=True)
    cumulative_NV = p_NV.cumsum(-1)
    place_N = (cumulative_NV <= uniform[:, None] * cumulative_NV[:, -1:]).sum(-1)
    place_N = place_N.minimum((p_NV > 0).sum(-1) - 1)  # a draw may round up to 1
    sampled_N = order_NV.gather(1, place_N[:, None])[:, 0]
    sampling_logp_N = p_NV.gather(1, place_N[:, None])[:, 0].log()
    is_greedy_N = temperature <= 0
    tokens_N = torch.where(is_greedy_N, greedy_N, sampled_N)
    return tokens_N, logp_NV.gather(1, tokens_N[:, None])[:, 0], sampling_logp_N.masked_fill(is_greedy_N, 0.0)
