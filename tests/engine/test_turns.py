"""Turns at the engine: nobody waits for ever, and nothing that comes in the meantime is left lying."""

import signal
import threading
import time
from statistics import median

import pytest
from ledger import make_engine, params_of

from mimoflash.engine import SamplingParams
from mimoflash.engine.turns import Turns


@pytest.fixture
def slow():
    """An engine whose passes take ten milliseconds, and a thread that makes one after the other."""
    engine = make_engine()
    forward, stop = engine.runner.forward, threading.Event()

    def slowly(step):
        time.sleep(0.01)
        return forward(step)

    def drive():
        while not stop.is_set():
            engine.step()

    engine.runner.forward = slowly
    engine.submit([1, 2], params_of(0, 300))
    thread = threading.Thread(target=drive)
    thread.start()
    yield engine
    stop.set()
    thread.join()


def test_who_asks_beside_a_thread_that_steps_waits_for_one_pass(slow):
    waited = []
    for ask in (slow.stats, slow.update_weights, slow.step) * 7:
        before = slow.core.totals.passes
        ask()
        waited.append(slow.core.totals.passes - before)
    assert median(waited) <= 3  # that which ran, one more perhaps, and its own


def test_two_threads_that_generate_both_go_on(slow):
    before = slow.core.totals.passes
    (out,) = slow.generate([[3]], params_of(1, 5))
    assert len(out.tokens) == 5
    assert slow.core.totals.passes - before < 100  # the other one takes 300


def test_a_cancel_during_stats_is_settled_at_once():
    engine = make_engine()
    request = engine.submit([1], params_of(0, 50))
    engine.step()
    entered, release, stats = threading.Event(), threading.Event(), engine._stats

    def slow_stats():
        entered.set()
        assert release.wait(20)
        return stats()

    engine._stats = slow_stats
    thread = threading.Thread(target=engine.stats)
    thread.start()
    assert entered.wait(20)
    engine.cancel(request)
    assert request.finish_reason is None
    release.set()
    thread.join()
    assert request.finish_reason == "cancelled"


def test_a_stream_gets_its_tokens_while_another_thread_steps(slow):
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    assert list(slow.stream([3], params)) == make_engine().generate([[3]], params)[0].tokens


class SlowToWake:
    """A lock that the thread named "late" gets only once it is awake, as the system may have it."""

    def __init__(self):
        self.lock, self.is_asked, self.awake = threading.Lock(), threading.Event(), threading.Event()
        self.release = self.lock.release

    def acquire(self, blocking):
        if threading.current_thread().name == "late":
            self.is_asked.set()
            assert self.awake.wait(20)
        return self.lock.acquire(blocking)


def test_a_thread_that_has_had_its_turn_comes_after_who_waited():
    turns, order = Turns(), []
    turns._lock = lock = SlowToWake()
    late = threading.Thread(target=turns.run, args=(lambda: order.append("late"),), name="late")
    again = threading.Thread(target=turns.run, args=(lambda: order.append("again"),))
    late.start()
    assert lock.is_asked.wait(20)
    again.start()
    again.join(0.1)  # the lock is free, but it does not get it
    lock.awake.set()
    late.join()
    again.join()
    assert order == ["late", "again"]


def test_turns_are_free_after_an_exception():
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        turns.run(lambda: 1 // 0)
    assert turns.run_if_free(lambda: None)
    assert turns.run(lambda: turns.run_if_free(lambda: None)) is False


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer")
def test_signals_never_leave_the_lock_held():
    """Signals in quick succession, which come wherever the interpreter lets them."""
    turns, caught = Turns(), 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in range(3000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + n % 60))
                for _ in range(50):
                    turns.run(int)
                    turns.run_if_free(int)
            except KeyboardInterrupt:
                caught += 1
            finally:
                while signal.getitimer(signal.ITIMER_REAL)[0]:  # one that has not come yet
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    except KeyboardInterrupt:
                        caught += 1
            assert not turns._lock.locked()
            assert not turns._gate.locked()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught > 100
