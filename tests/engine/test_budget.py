"""What an engine keeps never takes more than its `cache_bytes`."""

import numpy as np
import pytest
import torch
from ledger import CONFIG, MODEL, VOCABULARY, assert_is_right, make_engine, params_of, run_all
from oracles import assert_nothing_is_left, memory

from mimoflash.config import DENSE, GLOBAL, WINDOW, ModelConfig
from mimoflash.engine import Engine, backend, reuse, scheduler
from mimoflash.engine.cache import KINDS, PAGE, copy_bytes, page_bytes, slot_bytes

FLOAT = torch.float32


def taken(engine):
    """Bytes of all tensors with keys and values that there are."""
    parts = engine.core.scheduler
    copies = [request.snapshot for request in [*parts.running, *parts.conversations.kept]]
    copies += [prefix.rings for prefix in parts.prefixes.kept.values()] if parts.prefixes else []
    rings = [x for copy in copies if copy for pair in copy.rings for x in pair]
    return sum(x.nbytes for layer in engine.runner.cache.layers for x in (layer.k, layer.v)) + sum(
        x.nbytes for x in rings
    )


@pytest.mark.parametrize("shares", [False, True])
def test_copies_of_rings_are_within_the_budget(monkeypatch, shares):
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    engine = make_engine(slots=4, pages=20, share_prefixes=shares)
    budget = memory(4, 20, 0, CONFIG, shares)
    random, requests, most = np.random.default_rng(0), [], 0
    for i in range(12):  # other beginnings each time: more blocks than copies
        prompt = random.integers(0, VOCABULARY, int(random.integers(1, 5 * PAGE))).tolist()
        requests.append(engine.submit(prompt, params_of(i, 5)))
        while engine.step():
            stats = engine.stats()
            used = taken(engine)
            most = max(most, used)
            assert used <= budget
            assert stats["cache_used_bytes"]["copies"] == used - sum(stats["cache_bytes"][kind] for kind in KINDS)
            assert stats["cache_used_bytes"]["copies"] <= stats["cache_bytes"]["copies"]
            assert sum(stats["cache_bytes"].values()) <= budget
    assert most > sum(engine.stats()["cache_bytes"][kind] for kind in KINDS)
    for request in requests:
        assert_is_right(request)
    assert_nothing_is_left(engine)


def test_the_latest_prefix_is_kept_where_there_are_copies_for_one_only(monkeypatch):
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    engine = make_engine(slots=4, pages=20, share_prefixes=True)
    engine.core.scheduler.prefixes.most = 3
    cached = []
    for first in (1, 1, 2, 2, 1):
        request = engine.submit([first] * (3 * PAGE) + [4, len(cached)], params_of(0, 2))
        run_all(engine)
        assert_is_right(request)
        cached.append(request.cached_tokens)
        assert len(engine.core.scheduler.prefixes.kept) <= 3
    assert cached == [0, 3 * PAGE, 0, 3 * PAGE, 0]
    assert_nothing_is_left(engine)


def test_a_prefix_longer_than_all_copies_is_kept_from_its_beginning(monkeypatch):
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    engine = make_engine(slots=4, pages=20, share_prefixes=True)
    engine.core.scheduler.prefixes.most = 2
    for expected in (0, 2 * PAGE, 2 * PAGE):
        request = engine.submit([1] * (4 * PAGE) + [3], params_of(0, 2))
        run_all(engine)
        assert request.cached_tokens == expected
        assert_is_right(request)
        while engine.core.scheduler.conversations.drop():
            pass


@pytest.mark.parametrize("layers", [(GLOBAL,) * 3, (WINDOW,) * 3, (GLOBAL, WINDOW, WINDOW)])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("shares", [False, True])
def test_any_budget_that_is_enough_for_one_is_kept_to(layers, drafts, shares):
    config = ModelConfig.tiny(layer_types=layers, mlp_layer_types=(DENSE,) * 3, num_nextn_predict_layers=3)
    slot = slot_bytes(config, drafts, FLOAT) + copy_bytes(config, drafts, FLOAT)
    page = page_bytes(config, FLOAT)
    for budget in range(slot + page, 30 * (slot + page), 1 + (slot + page) // 7):
        cache = backend._allocate(config, 16, budget, shares, drafts, FLOAT, torch.device("cpu"))
        assert cache.slots > 0
        assert cache.pages > 0 or not page
        assert cache.bytes() + cache.copies_bytes <= budget
        assert shares or cache.copies == 0


def test_too_little_memory_is_named():
    enough = memory(1, 1, 0, CONFIG)
    with pytest.raises(ValueError, match="give more"):
        Engine(MODEL, cache_bytes=enough - 1)
    assert Engine(MODEL, cache_bytes=enough).runner.cache.slots == 1
