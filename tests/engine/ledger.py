"""A runner without a model: where a real one keeps keys and values it keeps the tokens themselves, and what comes next
is a function of what it finds there. So an answer is right only if every page, ring and slot was."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from oracles import assert_nothing_is_left, memory

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.cache import PAGE
from mimoflash.engine.row_state import RowState
from mimoflash.engine.sampling import Sampler
from mimoflash.model import Transformer

VOCABULARY = 12
CONFIG = ModelConfig.tiny(vocab_size=VOCABULARY, num_nextn_predict_layers=3, max_position_embeddings=6 * PAGE)
WINDOW = CONFIG.sliding_window
MODEL = Transformer(CONFIG)


def next_logits(context, window):
    """Logits after `context`, of which window layers see the last `window` tokens."""
    seed = hash((tuple(context), tuple(context[-window:])))
    return torch.from_numpy(np.random.default_rng(seed % 2**32).normal(size=VOCABULARY).astype(np.float32) * 3)


def route_of(position, token, config):
    shape = len(config.moe_layers), config.num_experts_per_tok
    return np.full(shape, (3 * position + token) % config.n_routed_experts, np.uint8)


@cache
def alone(prompt, params, window):
    """Tokens and log-probabilities of a request that nothing runs beside, without a cache; `prompt` is a tuple."""
    state, text, logprobs = RowState(params, prompt, VOCABULARY), list(prompt), []
    while len(text) < len(prompt) + params.max_tokens and not state.is_finished:
        ((sampled,),) = Sampler().pick(next_logits(text, window)[None], [state])
        text.append(sampled.token)
        logprobs.append(sampled.logprob)
    return text[len(prompt) :], logprobs


class LedgerRunner:
    """For a config whose first layer is global and whose second has a window."""

    def __init__(self, config, cache):
        self.config, self.cache, self.window = config, cache, config.sliding_window
        self.pages = cache.layers[0].k.fill_(-1).numpy()[:, 0, :, 0]
        self.rings = cache.layers[1].k.fill_(-1).numpy()[:, 0, :, 0]
        self.ran = 0

    def forward(self, step):
        self.ran += len(step.tokens)
        logits, routes, row = [], [], 0
        for slot, start, count in zip(step.slots, step.starts, step.counts, strict=True):
            for position in range(start, start + count):
                token = int(step.tokens[row])
                self.pages[self._place(slot, position)] = token
                self.rings[slot, position % self.rings.shape[1]] = token
                routes.append(route_of(position, token, self.config))
                if row in step.logits_rows:
                    logits.append(next_logits(self._context(slot, position + 1), self.window))
                row += 1
        assert row == len(step.tokens)
        empty = torch.empty(0, VOCABULARY)
        return torch.stack(logits) if logits else empty, torch.from_numpy(np.stack(routes))

    def draft(self, slots, positions, recent, count, noise):
        """The likeliest tokens, but every third is wrong."""
        drafts = []
        for slot, position, tokens in zip(slots, positions, recent.tolist(), strict=True):
            context = self._context(slot, position + 1)
            known = [token for token in tokens[:-1] if token >= 0]
            assert context[-len(known) :] == known, "the recent tokens are those that have run"
            context.append(tokens[-1])
            for _ in range(count):
                best = int(next_logits(context, self.window).argmax())
                context.append(best if sum(context) % 3 else (best + 1) % VOCABULARY)
            drafts.append(context[-count:])
        return np.array(drafts, np.int32)

    def refresh(self):
        pass

    def _place(self, slot, position):
        return self.cache.page_table[slot, position // PAGE], position % PAGE

    def _context(self, slot, length):
        table = self.cache.page_table[slot, : -(-length // PAGE)]
        context = self.pages[table].ravel()[:length].astype(int).tolist()
        seen = np.arange(max(0, length - self.window), length) % self.rings.shape[1]
        assert context[-self.window :] == self.rings[slot, seen].tolist(), "pages and rings hold the same text"
        return context


def make_engine(*, slots=4, pages=12, speculate=0, share_prefixes=False):
    pages = min(pages, 6 * slots)  # more than the context of each is not taken
    room = memory(slots, pages, speculate, CONFIG, share_prefixes)
    engine = Engine(MODEL, speculate=speculate, max_running=slots, cache_bytes=room, share_prefixes=share_prefixes)
    assert (engine.runner.cache.slots, engine.runner.cache.pages) == (slots, pages)
    engine.runner = engine.core.runner = LedgerRunner(CONFIG, engine.runner.cache)
    lengths = itertools.cycle([speculate, 0, speculate, 1, 0, 0, 2, 3])  # whether it pays or not
    engine.core.lengths.choose = lambda _: min(next(lengths), speculate)
    return engine


def run_all(engine):
    while engine.step():
        pass


def assert_is_right(request):
    want, logprobs = alone(tuple(request.text[: request.prompt_tokens]), request.params, WINDOW)
    out = request.output()
    if request.is_cancelled or out.finish_reason == "deadline":
        assert out.tokens == want[: len(out.tokens)]
    else:
        assert out.finish_reason == "length"
        assert out.tokens == want
    assert out.logprobs == pytest.approx(logprobs[: len(out.tokens)], abs=1e-6)
    assert len(out.sampling_logprobs) == len(out.tokens)
    if out.tokens:
        assert len(out.routes) == len(request.text) - 1
    if len(out.routes):
        routes = [route_of(position, token, CONFIG) for position, token in enumerate(request.text[: len(out.routes)])]
        assert (out.routes.numpy() == np.stack(routes)).all()


def params_of(seed, max_tokens, temperature=1.0):
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)


def assert_is_right_at_the_end(engine, *requests):
    run_all(engine)
    for request in requests:
        assert_is_right(request)
    assert_nothing_is_left(engine)
