"""A runner without a model: where a real one keeps keys and values it keeps the tokens themselves, and what comes next
is a function of what it finds there. So an answer is right only if every page, ring and slot was."""

import numpy as np
import torch

from mimoflash.engine.cache import PAGE
from mimoflash.engine.row_state import RowState
from mimoflash.engine.sampling import Sampler

VOCABULARY = 12


def next_logits(context, window):
    """Logits after `context`, of which window layers see the last `window` tokens."""
    seed = hash((tuple(context), tuple(context[-window:])))
    return torch.from_numpy(np.random.default_rng(seed % 2**32).normal(size=VOCABULARY).astype(np.float32) * 3)


def route_of(position, token, config):
    shape = len(config.moe_layers), config.num_experts_per_tok
    return np.full(shape, (3 * position + token) % config.n_routed_experts, np.uint8)


def alone(prompt, params, window, seed=0):
    """Tokens and log-probabilities of a request that nothing runs beside, without a cache."""
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
