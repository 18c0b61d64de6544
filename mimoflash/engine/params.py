"""What a request asks of sampling, checked when it is made."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mimoflash.engine.grammar import Grammar


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. Raises ValueError for a field outside of what is said here.

    `temperature` 0 takes the most likely token. Above it, `top_k` (0: all), then `top_p`, then `min_p` cut the
    distribution: the k most likely tokens; the smallest set that holds this much probability; tokens at least this
    probable relative to the most likely one. `repetition_penalty` divides positive and multiplies negative logits of
    tokens in the prompt or generated; `presence_penalty` is subtracted from those of generated tokens,
    `frequency_penalty` once each time. `logit_bias` is added before, by token id (-inf forbids a token). `seed` fixes
    the tokens that follow a prompt, whatever runs beside it (None: others each time); other prompts draw independently
    by it. `stop`: strings that end the text, `stop_token_ids`: more tokens that do; `ignore_stop_tokens` goes on past
    the tokenizer's and the model's end tokens. `grammar`: what is generated follows it. `top_logprobs`: so many of the
    likeliest tokens are reported at each position. `prompt_logprobs`: the prompt's log-probabilities are reported, each
    beside those of so many likeliest tokens (0: alone; None: not at all); the whole prompt is run for them. None for a
    bias or for stops means none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()  # kept as pairs
    seed: int | None = None
    stop: str | Sequence[str] = ()  # kept as a tuple
    stop_token_ids: Sequence[int] = ()
    ignore_stop_tokens: bool = False
    grammar: Grammar | None = None
    top_logprobs: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (kind, is_allowed, allowed) in _FIELDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not is_allowed(value):
                raise ValueError(f"{name} is {value!r}: it must be {allowed}")
        if not isinstance(self.ignore_stop_tokens, bool):
            raise ValueError(f"ignore_stop_tokens is {self.ignore_stop_tokens!r}: it must be True or False")
        if not isinstance(self.grammar, Grammar | None):
            raise ValueError(f"grammar is {self.grammar!r}: it must be a Grammar or None")
        stop = (self.stop,) if isinstance(self.stop, str) else _items(self.stop)
        if stop is None or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {self.stop!r}: it must hold strings, none of them empty (all texts end with it)")
        stop_ids = _items(self.stop_token_ids)
        if stop_ids is None or not all(_is_id(token) for token in stop_ids):
            raise ValueError(f"stop_token_ids is {self.stop_token_ids!r}: it must hold token ids, 0 or more")
        bias = _items(self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias)
        if bias is None or not all(map(_is_bias, bias)):
            raise ValueError(f"logit_bias is {self.logit_bias!r}: it must map token ids to numbers or -inf")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_ids)
        object.__setattr__(self, "logit_bias", tuple(sorted(dict(bias).items())))


def _items(values: Any) -> tuple[Any, ...] | None:
    """A tuple of them, empty for None; None where there are no items."""
    return () if values is None else tuple(values) if isinstance(values, Iterable) else None


def _is_bias(pair: Any) -> bool:
    is_pair = isinstance(pair, Sequence) and len(pair) == 2
    return is_pair and _is_id(pair[0]) and isinstance(pair[1], Real) and pair[1] < math.inf


def _is_id(token: Any) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool) and int(token) >= 0


# name -> type, test, what is allowed
_FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "max_tokens": (Integral, lambda n: n >= 1, "an integer of at least 1"),
    "temperature": (Real, lambda x: x == 0 or 1e-6 <= x <= 1e6, "0 (greedy), or from 1e-6 to 1e6"),
    "top_p": (Real, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_k": (Integral, lambda n: 0 <= n < 2**31, "an integer, 0 (all tokens) or more"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "at least 0 and at most 1"),
    "repetition_penalty": (Real, lambda x: 0 < x < math.inf, "above 0 and finite (1: none)"),
    "presence_penalty": (Real, math.isfinite, "finite (0: none)"),
    "frequency_penalty": (Real, math.isfinite, "finite (0: none)"),
    "seed": (Integral | None, lambda n: n is None or 0 <= n < 2**64, "None, or an integer from 0 to 2**64 - 1"),
    "top_logprobs": (Integral, lambda n: n >= 0, "an integer of at least 0"),
    "prompt_logprobs": (Integral | None, lambda n: n is None or n >= 0, "None, or an integer of at least 0"),
}
