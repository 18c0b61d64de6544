import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.config import DENSE, GLOBAL, SPARSE, WINDOW, ModelConfig
from mimoflash.engine import HybridCache
from mimoflash.engine.cache import KINDS, PAGE, page_bytes, slot_bytes

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=3)


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_are_the_formula(drafts, slots, pages, dtype):
    cache = HybridCache(CONFIG, slots=slots, pages=pages, drafts=drafts, dtype=dtype)
    size, slot = dtype.itemsize, cache.take_slot()
    assert cache.bytes() == slots * slot_bytes(CONFIG, drafts, dtype) + pages * page_bytes(CONFIG, dtype)
    assert cache.reserve(slot, pages * PAGE)
    ring, whole = CONFIG.sliding_window + drafts, pages * PAGE
    assert cache.used_bytes("global") == 2 * 1 * (24 + 16) * whole * size  # layers x KV heads x widths x positions
    assert cache.used_bytes("window") == 2 * 2 * (24 + 16) * ring * size
    assert cache.used_bytes("mtp") == drafts * 2 * (24 + 16) * ring * size
    assert cache.used_bytes() == sum(cache.used_bytes(kind) for kind in KINDS)
    spare = 2 * (2 + drafts) * (24 + 16) * drafts * size  # the places for drafts
    assert cache.used_bytes() - spare == CONFIG.kv_bytes(whole, bytes_per_value=size, mtp_layers=drafts)


def test_only_global_layers_grow():
    cache = HybridCache(CONFIG, slots=1, pages=16, drafts=3)
    slot = cache.take_slot()
    used = []
    for length in (1, PAGE, PAGE + 1, 16 * PAGE):
        assert cache.reserve(slot, length)
        used.append((cache.used_bytes("global"), cache.used_bytes("window"), cache.used_bytes("mtp")))
    page, rings = page_bytes(CONFIG, torch.float32), used[0][1:]
    assert used == [(page, *rings), (page, *rings), (2 * page, *rings), (16 * page, *rings)]


@given(st.lists(st.tuples(st.sampled_from(["take", "free", "reserve", "truncate", "lend", "give back"]),
                          st.integers(0, 3), st.integers(0, 5 * PAGE)), max_size=40))
def test_no_page_has_two_owners_and_none_is_lost(operations):
    cache = HybridCache(CONFIG, slots=4, pages=9)
    lengths, lent = {}, []
    for what, which, length in operations:
        slot = list(lengths)[which % len(lengths)] if lengths else None
        if what == "take" and cache.free_slots:
            lengths[cache.take_slot()] = 0
        elif slot is None:
            continue
        elif what == "free":
            cache.free_slot(slot)
            del lengths[slot]
        elif what == "reserve":
            free, missing = cache.free_pages, cache.pages_for(length) - cache.pages_for(lengths[slot])
            assert cache.reserve(slot, length) == (missing <= free)
            lengths[slot] = max(lengths[slot], length) if missing <= free else lengths[slot]
        elif what == "truncate":
            cache.truncate(slot, length)
            lengths[slot] = min(lengths[slot], length)
        elif what == "lend":
            pages = cache.full_pages(slot, 0, lengths[slot] // PAGE * PAGE)
            cache.retain(pages)
            lent.append(pages)
        elif lent:
            cache.release(lent.pop())
        own = {s: cache.page_table[s, : cache.pages_for(n)].tolist() for s, n in lengths.items()}
        owned = [page for pages in own.values() for page in pages]
        assert len(owned) == len(set(owned))
        assert cache.free_pages + len({*owned, *(page for pages in lent for page in pages)}) == 9
        assert cache.free_slots == 4 - len(lengths)
        assert all(cache.capacity(s) == cache.pages_for(n) * PAGE for s, n in lengths.items())


def test_shared_pages_are_freed_by_the_last():
    cache = HybridCache(CONFIG, slots=2, pages=4)
    first, second = cache.take_slot(), cache.take_slot()
    cache.reserve(first, 3 * PAGE)
    pages = cache.full_pages(first, 0, 2 * PAGE)
    cache.retain(pages)
    cache.adopt(second, pages)
    assert cache.page_table[second, :2].tolist() == cache.page_table[first, :2].tolist()
    cache.free_slot(first)
    assert cache.free_pages == 2
    cache.free_slot(second)
    assert cache.free_pages == 4


def test_a_snapshot_brings_the_rings_back_and_the_slot_to_its_length():
    cache = HybridCache(CONFIG, slots=2, pages=8, drafts=2)
    slot, other = cache.take_slot(), cache.take_slot()
    cache.reserve(slot, 4 * PAGE)
    for layer in cache.layers:
        layer.k.normal_()
        layer.v.normal_()
    rings = [x for layer in cache.layers[:4] if layer.window for x in (layer.k, layer.v)]
    before = [x.clone() for x in rings]
    snapshot = cache.snapshot(slot, 70)
    assert snapshot.nbytes == cache.bytes("window") // 2
    for x in rings:
        x.mul_(2)
    cache.mtp_start[slot], cache.mtp_end[slot] = 30, 200
    cache.restore(slot, snapshot)
    for x, old in zip(rings, before, strict=True):
        assert torch.equal(x[slot], old[slot])
        assert torch.equal(x[other], 2 * old[other])
    assert cache.capacity(slot) == 2 * PAGE
    assert (cache.mtp_start[slot], cache.mtp_end[slot]) == (70, 70)  # entries of the time before are not read


def test_a_slot_begins_without_mtp_entries():
    cache = HybridCache(CONFIG, slots=1, pages=1, drafts=1)
    slot = cache.take_slot()
    cache.mtp_start[slot], cache.mtp_end[slot] = 3, 9
    cache.free_slot(slot)
    assert cache.take_slot() == slot
    assert (cache.mtp_start[slot], cache.mtp_end[slot]) == (0, 0)


@pytest.mark.parametrize("kind", [GLOBAL, WINDOW])
def test_models_of_one_kind_of_layer(kind):
    config = ModelConfig.tiny(layer_types=(kind,) * 3, mlp_layer_types=(DENSE, SPARSE, SPARSE))
    cache = HybridCache(config, slots=2, pages=3)
    slot = cache.take_slot()
    assert (cache.has_pages, cache.has_rings) == (kind == GLOBAL, kind == WINDOW)
    assert cache.reserve(slot, 4 * PAGE) == (kind == WINDOW)  # no page is needed for windows
    assert cache.snapshot(slot, 5).nbytes == cache.bytes("window") // 2
    assert np.isin(cache.bytes("global"), 0) == (kind == WINDOW)
