"""Schedules: whatever runs beside, waits, is stopped or kept, each answer is the one that the request gets alone."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger import VOCABULARY, assert_is_right, assert_is_right_at_the_end, make_engine, params_of, run_all
from oracles import assert_nothing_is_left

from mimoflash.engine import reuse, scheduler
from mimoflash.engine.cache import PAGE

actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 3 * PAGE), st.integers(1, 2 * PAGE), st.integers(-1, 1)),
        st.tuples(st.just("continue"), st.integers(0, 9), st.integers(0, 40), st.integers(1, 40)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("steps"), st.integers(1, 30)),
        st.tuples(st.just("new weights")),
        st.tuples(st.just("interrupt")),
    ),
    min_size=3, max_size=25,
)


@settings(max_examples=40)
@given(actions, st.integers(0, 3), st.booleans(), st.integers(1, 4), st.integers(6, 14), st.integers(20, 200))
def test_every_schedule_gives_each_request_its_own_answer(todo, speculate, shares, slots, pages, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "PREFILL_TOKENS", chunk)
        for module in (reuse, scheduler):
            patch.setattr(module, "BLOCK", PAGE)
        engine, requests = make_engine(slots=slots, pages=pages, speculate=speculate, share_prefixes=shares), []
        for kind, *values in todo:
            if kind == "submit":
                length, most, priority = values
                beginning = [5] * (length // 2) + list(np.random.default_rng(length).integers(0, VOCABULARY, length))
                prompt, temperature = beginning[:length], 1.0 if length % 2 else 0.0
                requests.append(engine.submit(prompt, params_of(len(requests), most, temperature), priority=priority))
            elif kind == "continue" and requests:  # a next turn: all of an earlier text or some of its answer dropped
                earlier, drop, new = requests[values[0] % len(requests)], *values[1:]
                text = earlier.text[: max(len(earlier.text) - drop, earlier.prompt_tokens + 1)] + [3] * new
                requests.append(engine.submit(text[: 4 * PAGE], params_of(len(requests), 20)))
            elif kind == "cancel" and requests:
                engine.cancel(requests[values[0] % len(requests)])
            elif kind == "steps":
                for _ in range(values[0]):
                    engine.step()
            elif kind == "new weights":
                engine.update_weights()
            elif kind == "interrupt" and engine.core.scheduler.requests:
                with pytest.MonkeyPatch.context() as broken:
                    broken.setattr(engine.runner, "forward", raise_interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        engine.step()
        run_all(engine)
        assert_is_right_at_the_end(engine, *requests)


def raise_interrupt(step):
    raise KeyboardInterrupt


def test_the_schedules_reach_what_they_are_meant_to_reach():
    """Preemption, both kinds of reuse and right and wrong drafts occur in a schedule like those above."""
    engine = make_engine(pages=8, speculate=2)
    requests = [engine.submit([i] * 100, params_of(i, 90, 0.0)) for i in range(4)]
    run_all(engine)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert 0 < stats["accepted"][0] < stats["drafted"][0]
    latest = next(reversed(engine.core.scheduler.conversations.kept))
    whole = engine.submit([*latest.text, 1], params_of(0, 5))
    run_all(engine)
    assert whole.cached_tokens == len(latest.text) - 1
    dropped = engine.submit([*whole.text[: whole.prompt_tokens + 2], 7, 7, 7], params_of(0, 5))
    run_all(engine)
    assert dropped.cached_tokens == whole.prompt_tokens
    for request in (*requests, whole, dropped):
        assert_is_right(request)


def order_of_first_tokens(engine, requests):
    order = []
    while engine.step():
        order += [r for r in requests if r.generated and r not in order]
    return order


def test_priority_then_arrival():
    engine = make_engine(slots=1)
    low, first, second = (engine.submit([i] * 9, params_of(i, 3), priority=p) for i, p in enumerate((0, 1, 1)))
    assert order_of_first_tokens(engine, [low, first, second]) == [first, second, low]


def test_a_higher_priority_takes_the_slot_of_a_lower_one_which_loses_nothing():
    engine = make_engine(slots=1)
    low = engine.submit([1] * 9, params_of(1, 40))
    for _ in range(10):
        engine.step()
    high = engine.submit([2] * 9, params_of(2, 3), priority=1)
    while high.finish_reason is None:
        engine.step()
    assert low.finish_reason is None
    assert engine.stats()["preemptions"] == 1
    run_all(engine)
    assert_is_right(low)


def test_drafts_do_not_reach_beyond_the_end():
    engine = make_engine(speculate=3, slots=12, pages=24)
    engine.core.lengths.choose = lambda _: 3
    requests = [engine.submit([i, 1], params_of(i, 1 + i, 0.0)) for i in range(12)]
    run_all(engine)
    assert sum(engine.stats()["accepted"]) > 0
    for request in requests:
        assert_is_right(request)


def test_decoding_goes_on_while_a_long_prompt_is_read(monkeypatch):
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 16)
    engine = make_engine()
    decoding = engine.submit([1, 2, 3], params_of(1, 50))
    engine.step()
    reading = engine.submit([4] * 100, params_of(1, 5))
    while not reading.generated:
        before, ran = decoding.generated, engine.runner.ran
        engine.step()
        assert decoding.generated == before + 1
        assert engine.runner.ran - ran <= 16 + 1
    assert decoding.generated == 1 + 7  # 100 tokens in sixteens


def test_a_preempted_request_goes_on_from_the_text_it_had():
    engine = make_engine(slots=2, pages=7)
    first, last = (engine.submit([i] * n, params_of(i, 70)) for i, n in enumerate((150, 160)))  # three pages, then four
    had = 0
    while last.slot >= 0 or not had:
        had = last.generated
        engine.step()
    assert last.generated == had > 0
    assert first.slot >= 0
    assert last.finish_reason is None
    run_all(engine)
    assert_is_right(first)
    assert_is_right(last)


def test_a_sink_may_cancel_and_submit():
    engine, events = make_engine(), []

    def sink(event):
        events.append(event)
        if len(events) == 3:
            engine.cancel(request)
            more.append(engine.submit([7], params_of(1, 4)))

    more = []
    request = engine.submit([1] * 9, params_of(0, 30), sink=sink)
    run_all(engine)
    assert request.finish_reason == "cancelled"
    assert (len(events), events[-1].tokens) == (4, request.output().tokens)
    assert_is_right(request)
    assert_is_right(more[0])


def test_a_deadline_ends_a_request_with_what_it_has():
    engine = make_engine(slots=1)
    running = engine.submit([1] * 9, params_of(1, 300), deadline=0.05)
    waiting = engine.submit([2] * 9, params_of(1, 300), deadline=0.01)
    patient = engine.submit([2] * 9, params_of(1, 3), deadline=60)
    while running.finish_reason is None:
        engine.step()
    assert 0 < running.generated < 300
    assert (waiting.finish_reason, waiting.output().tokens) == ("deadline", [])
    run_all(engine)
    for request in (running, waiting, patient):
        assert_is_right(request)
    assert patient.finish_reason == "length"
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("state", ["waiting", "reading", "decoding", "finished"])
def test_cancelling_frees_everything_at_once(state, monkeypatch):
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 16)
    engine = make_engine(slots=1)
    cache = engine.runner.cache
    ahead = engine.submit([1] * 9, params_of(1, 300)) if state == "waiting" else None
    request = engine.submit([2] * 50, params_of(1, 5))
    for _ in range({"waiting": 2, "reading": 2, "decoding": 6, "finished": 20}[state]):
        engine.step()
    engine.cancel(request)
    assert request.finish_reason == ("length" if state == "finished" else "cancelled")
    if ahead is not None:
        engine.cancel(ahead)
    if state != "finished":  # else it is kept for a next turn
        assert (cache.free_pages, cache.free_slots) == (cache.pages, cache.slots)
    assert_nothing_is_left(engine)


def test_thousands_of_requests_take_time_in_proportion():
    """Counts what is compared, not seconds: each request is looked at a bounded number of times."""
    engine = make_engine(slots=4)
    requests = [engine.submit([i % VOCABULARY, 1], params_of(0, 1)) for i in range(1500)]
    lookups = 0
    plan = engine.core.scheduler._admit

    def counted(request):
        nonlocal lookups
        lookups += 1
        return plan(request)

    engine.core.scheduler._admit = counted
    run_all(engine)
    assert all(r.finish_reason == "length" for r in requests)
    assert lookups < 2 * 1500


@pytest.mark.parametrize(
    ("length", "most", "message"),
    [(6 * PAGE, 5, "leaves no room"), (4 * PAGE, 2 * PAGE, "the cache holds 320"), (0, 5, "empty"), (-1, 5, "outside")],
)
def test_what_can_never_run_is_refused(length, most, message):
    prompt = [VOCABULARY] if length < 0 else [1] * length
    with pytest.raises(ValueError, match=message):
        make_engine(pages=5).submit(prompt, params_of(0, most))


def test_a_request_ends_where_the_context_does():
    engine = make_engine()
    request = engine.submit([1] * (6 * PAGE - 4), params_of(0, 50))
    run_all(engine)
    assert (request.generated, request.finish_reason) == (4, "length")


def test_time_does_not_matter_without_deadlines(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    engine = make_engine()
    request = engine.submit([1] * 9, params_of(0, 5))
    run_all(engine)
    assert_is_right(request)


def test_finished_requests_leave_no_deadline_behind():
    engine = make_engine()
    late, early = (engine.submit([1], params_of(0, 3), deadline=seconds) for seconds in (3600, 1800))
    engine.cancel(late)
    assert [request for *_, request in engine.core.scheduler.deadlines] == [early]
    run_all(engine)
    assert engine.core.scheduler.deadlines == []
    assert_is_right(early)


def test_new_weights_are_no_preemption():
    engine = make_engine()
    request = engine.submit([1, 2], params_of(0, 9))
    engine.step()
    engine.update_weights()
    assert engine.stats()["preemptions"] == 0
    run_all(engine)
    assert_is_right(request)
