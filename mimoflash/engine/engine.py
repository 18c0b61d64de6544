"""Generation: prompts go through the model in chunks, then all requests take a token a step until each has ended."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mimoflash.engine.cache import HybridCache
from mimoflash.engine.sampling import SamplingParams, sample
from mimoflash.model import Transformer
from mimoflash.text import Tokenizer

PREFILL_CHUNK = 256  # positions: a window layer's cost stays length x (window + chunk)
MAX_ROWS = 64  # requests decoded together


@dataclass
class Output:
    """A finished request. `tokens`: generated ids, the end token included. `logprobs` of each under the model,
    `sampling_logprobs` under what it was sampled from. `routes` (positions run, MoE layers, experts per token): prompt
    and all generated tokens but the last."""

    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    routes: Tensor
    finish_reason: Literal["stop", "length"]


@dataclass
class _Request:
    prompt: list[int]
    params: SamplingParams
    random: random.Random
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def output(self) -> Output:
        assert self.finish_reason is not None
        routes = torch.cat(self.routes)
        return Output(self.tokens, self.logprobs, self.sampling_logprobs, routes, self.finish_reason)


class Engine:
    """Generates from a model. `tokenizer` is needed for end tokens and stop strings only: prompts are token ids."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = self._stop_ids()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Continues each prompt; `params` for all, or one a prompt. Raises ValueError for an empty prompt, a token
        outside the vocabulary, or another number of params than prompts."""
        requests = self._requests(prompts, params or SamplingParams())
        for start in range(0, len(requests), MAX_ROWS):
            for _ in self._run(requests[start : start + MAX_ROWS]):
                pass
        return [request.output() for request in requests]

    def stream(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Iterator[int]:
        """The tokens of one request, as they come."""
        (request,) = self._requests([prompt], params or SamplingParams())
        for _ in self._run([request]):
            yield request.tokens[-1]

    def _requests(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[_Request]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} SamplingParams for {len(prompts)} prompts: give one, or one a prompt")
        vocabulary = self.model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty: give at least one token")
            if not all(0 <= token < vocabulary for token in prompt):
                raise ValueError(f"prompt {i} has a token outside the vocabulary of {vocabulary}")
        if self.tokenizer is None and any(p.stop for p in each):
            raise ValueError("stop strings need a tokenizer: Engine(model, tokenizer)")
        return [_Request(list(q), p, random.Random(p.seed)) for q, p in zip(prompts, each, strict=True)]

    @torch.inference_mode()
    def _run(self, requests: list[_Request]) -> Iterator[None]:
        """Runs the requests to their ends; yields after each token."""
        was_training = self.model.training
        self.model.eval()
        try:
            weight = self.model.lm_head.weight
            cache = HybridCache(self.model.config, len(requests), dtype=weight.dtype, device=weight.device)
            hidden = self._prefill(requests, cache)
            while True:
                self._take_tokens(requests, self.model.logits(hidden))
                yield
                going = [row for row, request in enumerate(requests) if request.finish_reason is None]
                if not going:
                    return
                if len(going) < len(requests):
                    requests = [requests[row] for row in going]
                    cache.keep_rows(torch.tensor(going, device=weight.device))
                tokens = torch.tensor([[request.tokens[-1]] for request in requests], device=weight.device)
                out = self.model.trunk(tokens, cache=cache)
                cache.advance(cache.length + 1)
                for request, route in zip(requests, out.routes, strict=True):
                    request.routes.append(route)
                hidden = out.hidden[:, -1]
        finally:
            self.model.train(was_training)

    def _prefill(self, requests: list[_Request], cache: HybridCache) -> Tensor:
        """The hidden state at each prompt's last token (rows, H)."""
        device = self.model.lm_head.weight.device
        lengths = torch.tensor([len(request.prompt) for request in requests], device=device)
        last: list[Tensor | None] = [None] * len(requests)
        for start in range(0, int(lengths.max()), PREFILL_CHUNK):
            chunks = [request.prompt[start : start + PREFILL_CHUNK] for request in requests]
            width = max(len(chunk) for chunk in chunks)
            tokens = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=device)
            places = torch.arange(start, start + width, device=device).expand(len(requests), -1)
            out = self.model.trunk(tokens, places.where(places < lengths[:, None], -1), cache=cache)
            for row, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
                if chunk:
                    request.routes.append(out.routes[row, : len(chunk)])
                    last[row] = out.hidden[row, len(chunk) - 1]
        cache.advance(lengths)
        return torch.stack([hidden for hidden in last if hidden is not None])

    def _take_tokens(self, requests: list[_Request], logits: Tensor) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=logits.device, dtype=torch.float32)

        sampled = sample(
            logits,
            column([r.params.temperature for r in requests]),
            column([r.params.top_p for r in requests]),
            column([r.random.random() for r in requests]),
        )
        for request, token, logp, sampling_logp in zip(requests, *(x.tolist() for x in sampled), strict=True):
            request.tokens.append(token)
            request.logprobs.append(logp)
            request.sampling_logprobs.append(sampling_logp)
            request.finish_reason = self._finish_reason(request)

    def _finish_reason(self, request: _Request) -> Literal["stop", "length"] | None:
        params = request.params
        if request.tokens[-1] in self.stop_ids and not params.ignore_stop_tokens:
            return "stop"
        if params.stop and self.tokenizer is not None:
            # a stop string that has just been completed lies within its own length, in tokens, of the end
            longest = max(len(text.encode()) for text in params.stop)
            tail = self.tokenizer.decode(request.tokens[-longest - 1 :])
            if any(text in tail for text in params.stop):
                return "stop"
        return "length" if len(request.tokens) >= params.max_tokens else None

    def _stop_ids(self) -> frozenset[int]:
        if self.tokenizer is not None:
            return self.tokenizer.stop_ids
        eos = self.model.config.eos_token_id
        return frozenset(eos if isinstance(eos, tuple) else () if eos is None else (eos,))
