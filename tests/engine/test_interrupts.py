"""Interrupts, threads and failing sinks: what they do not end goes on as if they had not been."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from oracles import assert_same, random_prompts

from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.speculation import DraftLength

pytestmark = pytest.mark.usefixtures("runner")


@pytest.mark.parametrize("where", ["forward", "draft"])
def test_ctrl_c_cancels_what_generate_was_given_and_nothing_else(drafting, monkeypatch, interruptible, where):
    monkeypatch.setattr(DraftLength, "choose", lambda *_: 2)
    engine = Engine(drafting, speculate=2)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4)
    other = engine.submit([3, 4, 5], params)
    calls, run = 0, getattr(engine.runner, where)

    def interrupted(*args):
        nonlocal calls
        calls += 1
        result = run(*args)
        if calls == 6:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(engine.runner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2], [7] * 50], SamplingParams(max_tokens=100))
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 1)
    (fresh,) = engine.generate([[1, 2]], params)
    while other.finish_reason is None:
        engine.step()
    want = Engine(drafting).generate([[3, 4, 5], [1, 2]], params)
    assert_same([other.output(), fresh], want)


@pytest.mark.parametrize("ways", ["stream", "generate"])
def test_interrupts_while_requests_come_in_and_are_cancelled_leave_none_running(model, monkeypatch, ways):
    engine = Engine(model)
    settle, interrupts = engine._settle, iter([True, True])  # where a request is sent, and where all are cancelled

    def interrupted():
        if next(interrupts, False):
            raise KeyboardInterrupt
        settle()

    monkeypatch.setattr(engine, "_settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(engine.stream([3])) if ways == "stream" else engine.generate([[3], [4]], SamplingParams(max_tokens=9))
    while engine.step():
        pass
    assert engine.stats()["tokens_run"] == 0


def test_threads_share_an_engine(model):
    engine = Engine(model, speculate=1, max_running=8)
    prompts = [random_prompts(*range(3, 9)) for _ in range(4)]
    params = SamplingParams(max_tokens=15, temperature=1.0, seed=1)
    barrier = threading.Barrier(4)

    def work(mine):
        barrier.wait()
        return engine.generate(mine, params)

    with ThreadPoolExecutor(4) as pool:
        for mine, outputs in zip(prompts, pool.map(work, prompts), strict=True):
            assert_same(outputs, Engine(model).generate(mine, params))


def test_what_is_cancelled_during_a_pass_is_freed_after_it(model):
    engine, started, release = Engine(model), threading.Event(), threading.Event()
    forward = engine.runner.forward

    def slow(step):
        started.set()
        assert release.wait(20)
        return forward(step)

    engine.runner.forward = slow
    requests = [engine.submit([i], SamplingParams(max_tokens=9)) for i in range(2)]
    thread = threading.Thread(target=engine.step)
    thread.start()
    started.wait(20)
    for request in requests:
        engine.cancel(request)
    assert all(request.finish_reason is None for request in requests)
    release.set()
    thread.join()
    assert all(request.finish_reason == "cancelled" for request in requests)
    assert sum(engine.stats()["cache_used_bytes"].values()) == 0


def test_a_sink_that_fails_costs_its_own_events_only(model):
    def sink(event):
        raise RuntimeError("foreign code")

    engine = Engine(model)
    bad = engine.submit([1, 2, 3], SamplingParams(max_tokens=5), sink=sink)
    good = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0]
    while bad.finish_reason is None:
        engine.step()
    assert bad.output().tokens == good.tokens
