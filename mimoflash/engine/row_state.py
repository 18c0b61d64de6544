"""What a request's next token depends on besides the model: penalties, bias and grammar, kept up with its text."""

import hashlib
import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mimoflash.engine.grammar import GrammarState
from mimoflash.engine.params import SamplingParams
from mimoflash.text import Tokenizer


class RowState:
    """What a request's next token depends on besides the model. `Sampler.pick` moves it on by the tokens it takes.

    `stop_ids`: tokens after which nothing follows. `is_finished`: one was taken, or the grammar's text is complete.
    `error`: why no token could be picked, if so: then the request is over. Raises ValueError for a token id outside the
    vocabulary, and for a grammar that does not compile or comes without a tokenizer.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        *,
        stop_ids: frozenset[int] = frozenset(),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        for name, ids in (("logit_bias", dict(params.logit_bias)), ("stop_token_ids", params.stop_token_ids)):
            if wrong := [token for token in ids if token >= vocab_size]:
                raise ValueError(f"{name} names token {wrong[0]}, but the vocabulary has {vocab_size} tokens")
        self.params, self.stop_ids = params, stop_ids
        self.seed = secrets.randbits(64) if params.seed is None else _mixed(int(params.seed), prompt)
        self.position = len(prompt)  # of the next token
        self.is_finished = False
        self.error: str | None = None
        self._grammar: GrammarState | None = None
        if params.grammar is not None:
            if tokenizer is None:
                raise ValueError("a grammar needs a tokenizer: Engine(model, tokenizer)")
            self._grammar = params.grammar.start(tokenizer, vocab_size, stop_ids)
        self._penalties = _Penalties(params, prompt) if _has_penalty(params) else None
        self.is_plain = not (self._grammar or self._penalties or params.logit_bias)  # `adjust` changes nothing

    def adjust(self, logits: Tensor) -> None:
        """Bias, penalties and mask, in place, on the logits (V,) of the next token. Raises ValueError where the grammar
        cannot be followed further."""
        if self.params.logit_bias:
            ids, values = zip(*self.params.logit_bias, strict=True)
            logits[torch.tensor(ids, device=logits.device)] += torch.tensor(values, device=logits.device)
        if self._penalties:
            self._penalties.apply(logits)
        if self._grammar:
            logits.masked_fill_(~self._grammar.mask().to(logits.device), -math.inf)

    def take(self, token: int) -> None:
        """`token` has become the next one."""
        self.position += 1
        self.is_finished = token in self.stop_ids
        if self._penalties:
            self._penalties.count(token)
        if self._grammar:
            self._grammar.accept(token)
            self.is_finished |= self._grammar.is_finished


def _mixed(seed: int, prompt: Sequence[int]) -> int:
    """Equal seeds on other prompts draw independently: the prompt is part of what the noise is computed from."""
    tokens = np.array(prompt, "<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little") + tokens, digest_size=8).digest(), "little")


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class _Penalties:
    """The distinct tokens of a text and how often each was generated, in arrays that grow with it."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        self.params = params
        self.place: dict[int, int] = {}
        ids = dict.fromkeys(prompt) if params.repetition_penalty != 1 else {}
        self.ids, self.counts = np.zeros(len(ids) + 64, np.int64), np.zeros(len(ids) + 64, np.float32)
        for token in ids:
            self._add(token)

    def count(self, token: int) -> None:
        if token not in self.place:
            self._add(token)
        self.counts[self.place[token]] += 1

    def _add(self, token: int) -> None:
        at = self.place[token] = len(self.place)
        if at == len(self.ids):
            self.ids, self.counts = np.resize(self.ids, 2 * at), np.append(self.counts, np.zeros(at, np.float32))
        self.ids[at] = token

    def apply(self, logits: Tensor) -> None:
        ids, counts = (torch.from_numpy(x[: len(self.place)]).to(logits.device) for x in (self.ids, self.counts))
        x, p = logits[ids], self.params
        x = torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
        logits[ids] = x - p.presence_penalty * (counts > 0) - p.frequency_penalty * counts
