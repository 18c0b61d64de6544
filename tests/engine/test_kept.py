"""What is kept of finished requests: what goes on from it, and what it gives way to."""

import numpy as np
from ledger import VOCABULARY, assert_is_right, assert_is_right_at_the_end, make_engine, params_of, run_all
from oracles import assert_nothing_is_left

from mimoflash.engine import SamplingParams, reuse, scheduler
from mimoflash.engine.cache import PAGE


def test_a_preempted_request_keeps_the_end_of_its_prompt_for_the_next_turn():
    engine = make_engine()
    first = engine.submit([1] * 50, params_of(0, 20))
    while first.generated < 10:
        engine.step()
    engine.update_weights()  # takes its slot
    run_all(engine)
    second = engine.submit([*first.text[:55], 2, 2], params_of(0, 5))
    run_all(engine)
    assert second.cached_tokens == 50
    assert_is_right(second)


def test_prefixes_are_shared_only_if_asked(monkeypatch):
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    system = list(np.random.default_rng(0).integers(0, VOCABULARY, 2 * PAGE + 20))
    for shares in (False, True):
        engine = make_engine(share_prefixes=shares, pages=16)
        requests = []
        for i in range(3):
            requests.append(engine.submit([*system, i, i], params_of(i, 8)))
            run_all(engine)
        assert [r.cached_tokens for r in requests] == ([0, 2 * PAGE, 2 * PAGE] if shares else [0, 0, 0])
        for request in requests:
            assert_is_right(request)
        assert_nothing_is_left(engine)


def test_the_same_prompt_again_is_another_conversation():
    engine = make_engine()
    for seed in range(3):  # a group of rollouts: routes of one do not come from another
        request = engine.submit([1] * 30, params_of(seed, 5))
        run_all(engine)
        assert request.cached_tokens == 0


def test_kept_conversations_give_way_to_new_requests():
    engine = make_engine(slots=2, pages=6)
    old = engine.submit([1] * 200, params_of(0, 50))
    run_all(engine)
    assert engine.stats()["kept"] == 1
    new = [engine.submit([2 + i] * 150, params_of(0, 10)) for i in range(2)]
    run_all(engine)
    again = engine.submit([*old.text, 1], params_of(0, 5))
    run_all(engine)
    assert again.cached_tokens == 0
    for request in (old, *new, again):
        assert_is_right(request)


def test_right_drafts_after_a_stop_string_are_not_part_of_the_conversation(monkeypatch):
    engine = make_engine(speculate=3)
    engine.tokenizer = object()

    def stop_before_two_drafts(_, sampled):
        return (sampled[:1], True) if len(sampled) > 2 else (sampled, False)

    monkeypatch.setattr(engine.core, "_until_stop", stop_before_two_drafts)
    first = engine.submit([1] * 20, SamplingParams(max_tokens=200, stop="x"))
    run_all(engine)
    assert first.finish_reason == "stop"
    second = engine.submit([*first.text, 2, 2], params_of(0, 5))
    run_all(engine)
    assert second.cached_tokens == len(first.text) - 1
    assert_is_right(second)


def test_a_kept_conversation_has_no_page_too_many():
    engine = make_engine()
    engine.submit([1] * PAGE, params_of(0, 1))  # a page more was taken for what might have followed
    run_all(engine)
    assert engine.stats()["kept"] == 1
    assert engine.runner.cache.free_pages == engine.runner.cache.pages - 1


def test_a_next_turn_that_drops_most_of_a_long_answer_has_room():
    engine = make_engine(slots=2, pages=6)
    old = engine.submit([1] * 30, params_of(0, 300))
    run_all(engine)
    new = engine.submit(old.text[:31] + [2] * 300, params_of(0, 10))
    run_all(engine)
    assert new.cached_tokens == 30
    assert_is_right(new)


def kept_conversations(engine, count, length):
    requests = []
    for i in range(count):
        requests.append(engine.submit([i + 1] * length, params_of(i, 2)))
        run_all(engine)
    return requests


def test_only_as_many_conversations_give_way_as_are_needed():
    engine = make_engine(slots=6, pages=12)
    old = kept_conversations(engine, 4, 2 * PAGE + 9)  # three pages each
    new = engine.submit([9] * (3 * PAGE + 9), params_of(0, 3))  # four and one to spare
    run_all(engine)
    kept = engine.core.scheduler.conversations.kept
    assert [request in kept for request in old] == [False, False, True, True]
    assert_is_right(new)


def test_an_admission_that_fails_drops_nothing():
    engine = make_engine(slots=6, pages=12)
    old = kept_conversations(engine, 2, PAGE + 9)  # two pages each
    running = engine.submit([8] * (5 * PAGE), params_of(0, 40))  # six
    engine.step()
    new = engine.submit([9] * (5 * PAGE + 9), params_of(1, 20))  # six of the six that are left, but one more to spare
    engine.step()
    assert new.slot == -1
    assert all(request in engine.core.scheduler.conversations.kept for request in old)
    again = [engine.submit([*request.text, 1], params_of(2, 2), priority=1) for request in old]
    run_all(engine)
    assert [request.cached_tokens for request in again] == [len(request.text) - 1 for request in old]
    for request in (running, new, *again):
        assert_is_right(request)
    assert_nothing_is_left(engine)


def test_shared_pages_are_counted_once_when_room_is_made(monkeypatch):
    """A page that a conversation and a prefix hold is free only when both have given it up."""
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    engine = make_engine(slots=6, pages=12, share_prefixes=True)
    system = [7] * (2 * PAGE)
    for i in range(3):
        engine.submit([*system, i, i], params_of(i, 2))  # a page of its own, two shared ones
        run_all(engine)
    assert engine.runner.cache.free_pages == 12 - 2 - 3
    shared = engine.core.scheduler.prefixes.kept.copy()
    assert len(shared) == 2
    running = engine.submit([8] * (3 * PAGE + 9), params_of(0, 40))  # four pages of seven
    engine.step()
    new = engine.submit([9] * (4 * PAGE + 9), params_of(0, 3))  # five and one to spare: each conversation frees one
    engine.step()
    assert new.slot >= 0
    assert engine.stats()["kept"] == 0
    assert shared.keys() <= engine.core.scheduler.prefixes.kept.keys()
    assert_is_right_at_the_end(engine, running, new)
