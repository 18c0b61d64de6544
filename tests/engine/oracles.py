"""What engines are compared with, and the model and memory that their tests share."""

import pytest
import torch

from mimoflash.config import ModelConfig
from mimoflash.engine.cache import copy_bytes, page_bytes, slot_bytes

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=3, initializer_range=0.3)


@torch.no_grad()
def greedy_without_cache(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def random_prompts(*lengths, vocabulary=128):
    return [torch.randint(0, vocabulary, (n,)).tolist() for n in lengths]


def memory(slots, pages, speculate=0, config=CONFIG, share_prefixes=False):
    """The `cache_bytes` by which an engine has so many slots and pages."""
    dtype = torch.float32
    copy = copy_bytes(config, speculate, dtype)
    needed = slots * (slot_bytes(config, speculate, dtype) + copy) + pages * page_bytes(config, dtype)
    return needed + needed // (3 * copy) * copy if share_prefixes else needed  # a quarter is for what is shared


def assert_same(outputs, others):
    """The same tokens and routes, and log-probabilities up to rounding."""
    for a, b in zip(outputs, others, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.routes.sort(-1).values, b.routes.sort(-1).values)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.sampling_logprobs == pytest.approx(b.sampling_logprobs, abs=1e-4)


def assert_nothing_is_left(engine):
    """All slots and pages are free once what is kept of finished requests is dropped."""
    cache = engine.runner.cache
    while engine.core.scheduler.drop_kept():
        pass
    assert (cache.free_pages, cache.free_slots) == (cache.pages, cache.slots)
    assert not any(map(cache.references, range(cache.pages)))
    assert sum(engine.stats()["cache_used_bytes"].values()) == 0
