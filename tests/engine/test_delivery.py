"""The engine under event loops."""

import asyncio
import gc
import threading
import weakref

import pytest
import torch

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, NewTokens, Output, SamplingParams
from mimoflash.engine.delivery import Delivery
from mimoflash.model import Transformer

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=2, initializer_range=0.3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


def params(seed, max_tokens=20):
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed)


async def collect(engine, prompt, its_params, **arguments):
    events = [event async for event in engine.events(prompt, its_params, **arguments)]
    assert all(isinstance(event, NewTokens) and event.tokens for event in events[:-1])
    output = events[-1]
    assert isinstance(output, Output)
    assert [token for event in events[:-1] for token in event.tokens] == output.tokens
    assert [logp for event in events[:-1] for logp in event.logprobs] == output.logprobs
    return output


def test_many_at_once_get_what_generate_gives(model):
    prompts = [[i, i + 1, i + 2] * (1 + i) for i in range(12)]
    engine = Engine(model, speculate=2, max_running=5)

    async def all_of_them():
        return await asyncio.gather(*(collect(engine, p, params(i)) for i, p in enumerate(prompts)))

    for _ in range(2):  # one loop after the other
        outputs = asyncio.run(all_of_them())
        want = Engine(model).generate(prompts, [params(i) for i in range(12)])
        assert [o.tokens for o in outputs] == [o.tokens for o in want]
    engine.close()


def test_what_comes_within_a_moment_comes_in_one(model):
    engine = Engine(model, speculate=2)
    want = Engine(model).generate([[1, 2, 3]], params(4))[0]
    counts = []

    async def counted():
        counts.append(0)
        async for event in engine.events([1, 2, 3], params(4), gather=30.0):
            counts[0] += isinstance(event, NewTokens)
            break  # the first does not wait
        output = await collect(engine, [1, 2, 3], params(4), gather=30.0)  # neither does the end
        assert output.tokens == want.tokens
        events = [event async for event in engine.events([1, 2, 3], params(4), gather=30.0)]
        counts.append(len(events))

    asyncio.run(asyncio.wait_for(counted(), 25))
    engine.close()
    assert counts[0] == 1
    assert counts[1] <= 3  # the first tokens, the others, the Output


def test_the_loop_goes_on_while_a_pass_runs(model):
    engine, started, release = Engine(model), threading.Event(), threading.Event()
    forward = engine.runner.forward

    def slow(step):
        started.set()
        assert release.wait(20)
        return forward(step)

    engine.runner.forward = slow

    async def run():
        task = asyncio.create_task(collect(engine, [1, 2, 3], params(0)))
        while not started.is_set():
            await asyncio.sleep(0.001)
        second = asyncio.create_task(collect(engine, [4, 5], params(1)))  # comes while the lock is held
        await asyncio.sleep(0)
        third = engine.submit([6], params(2))
        engine.cancel(third)
        release.set()
        return await task, await second, third

    first, second, third = asyncio.run(run())
    want = Engine(model).generate([[1, 2, 3], [4, 5]], [params(0), params(1)])
    assert [first.tokens, second.tokens] == [o.tokens for o in want]
    assert third.finish_reason == "cancelled"
    engine.close()


@pytest.mark.parametrize("how", ["aclose", "task"])
def test_closing_the_iterator_cancels(model, how):
    engine = Engine(model)

    async def use():
        events = engine.events([1, 2, 3], params(0, 900))
        await anext(events)
        await anext(events)
        await events.aclose()

    async def forever():
        async for _ in engine.events([1, 2, 3], params(0, 900)):
            reached.set()

    async def run():
        if how == "aclose":
            await use()
        else:
            task = asyncio.create_task(forever())
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        while engine.stats()["running"] or engine.stats()["waiting"]:
            await asyncio.sleep(0.001)

    reached = asyncio.Event()
    asyncio.run(asyncio.wait_for(run(), 30))
    stats = engine.stats()
    assert stats["kept"] == 0
    assert sum(stats["cache_used_bytes"].values()) == 0
    engine.close()


def test_a_deadline_and_priorities(model):
    engine = Engine(model, max_running=1)

    async def run():
        late = asyncio.create_task(collect(engine, [1, 2], params(0, 900), deadline=0.05))
        await asyncio.sleep(0)
        low = asyncio.create_task(collect(engine, [3], params(1)))
        high = asyncio.create_task(collect(engine, [4], params(2), priority=1))
        order = []
        for name, task in (("late", late), ("low", low), ("high", high)):
            task.add_done_callback(lambda _, name=name: order.append(name))
        return await asyncio.gather(late, low, high), order

    (late, low, high), order = asyncio.run(run())
    assert late.finish_reason == "deadline"
    assert low.finish_reason == high.finish_reason == "length"
    assert order.index("high") < order.index("low")
    engine.close()


def test_a_pass_that_fails_ends_its_requests_and_the_engine_goes_on(model, caplog):
    engine = Engine(model)
    forward, calls = engine.runner.forward, []

    def failing(step):
        calls.append(step)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(step)

    engine.runner.forward = failing
    broken = asyncio.run(collect(engine, [1, 2, 3], params(0)))
    assert (broken.finish_reason, broken.error) == ("error", "RuntimeError: out of memory")
    assert len(broken.tokens) == 2
    assert "a pass of the model failed" in caplog.text
    good = asyncio.run(collect(engine, [1, 2, 3], params(0)))
    assert good.tokens == Engine(model).generate([[1, 2, 3]], params(0))[0].tokens
    assert good.tokens[:2] == broken.tokens
    engine.close()


def test_bad_requests_are_named_at_once(model):
    async def run():
        async for _ in Engine(model).events([]):
            pass

    with pytest.raises(ValueError, match="the prompt is empty"):
        asyncio.run(run())


def test_an_engine_may_be_stepped_beside_its_thread(model):
    engine = Engine(model)

    async def run():
        task = asyncio.create_task(collect(engine, [1, 2, 3], params(0, 60)))
        await asyncio.sleep(0)
        outputs = await asyncio.to_thread(engine.generate, [[4], [5]], params(1))
        return await task, outputs

    first, others = asyncio.run(run())
    want = Engine(model).generate([[1, 2, 3], [4], [5]], [params(0, 60), params(1), params(1)])
    assert [o.tokens for o in (first, *others)] == [o.tokens for o in want]
    engine.close()


def test_events_wake_the_loop_once_a_step_and_a_closed_loop_does_no_harm():
    loop, calls = asyncio.new_event_loop(), []
    delivery, queue = Delivery(loop), asyncio.Queue()
    wake = loop.call_soon_threadsafe
    loop.call_soon_threadsafe = lambda *args: (calls.append(args), wake(*args))
    events = [NewTokens([i], [0.0], []) for i in range(5)]
    for event in events:
        delivery.send(queue, event)
    loop.run_until_complete(asyncio.sleep(0))
    assert len(calls) == 1
    assert [queue.get_nowait() for _ in events] == events
    delivery.send(queue, events[0])  # on its way as the loop closes
    loop.close()
    for event in events:
        delivery.send(queue, event)
    assert queue.empty()
    assert not delivery._sent


class Clock:
    """A loop whose time a test moves on."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def is_closed(self):
        return False

    def time(self):
        return self.now

    def call_soon_threadsafe(self, call):
        self.call_at(self.now, call)

    def call_at(self, when, call, *arguments):
        self.calls.append((when, call, arguments))

    def go_to(self, time):
        while due := [each for each in self.calls if each[0] <= time]:
            first = min(due, key=lambda each: each[0])
            self.calls.remove(first)
            self.now = max(self.now, first[0])
            first[1](*first[2])
        self.now = time


def test_a_moment_is_the_same_for_all_who_gather():
    clock, one, other = Clock(), asyncio.Queue(), asyncio.Queue()
    delivery, event = Delivery(clock, gather=2.0), NewTokens([1], [0.0], [], 1)

    def sent(time):
        """To both; what they have then."""
        clock.go_to(time)
        delivery.send(one, event)
        delivery.send(other, event)
        clock.go_to(time)
        return one.qsize(), other.qsize()

    assert [sent(time) for time in (0, 0.5, 1.9, 2, 3, 4)] == [(1, 1), (1, 1), (1, 1), (3, 3), (3, 3), (5, 5)]
    clock.go_to(20)
    assert (one.qsize(), clock.calls) == (6, []), "nobody is woken where nothing comes"
    assert sent(20) == (7, 7), "after a silence the first does not wait"


def test_first_tokens_and_ends_do_not_wait_for_the_moment():
    clock, queue = Clock(), asyncio.Queue()
    delivery, more = Delivery(clock, gather=2.0), NewTokens([1], [0.0], [], 1)
    end = Output([], [], [], [], torch.empty(0), "stop", 1.0, 1, 0)

    def sent(time, *events):
        clock.go_to(time)
        for event in events:
            delivery.send(queue, event)
        clock.go_to(time)
        return queue.qsize()

    assert sent(0, more) == 1
    assert sent(0.5, more) == 1
    assert sent(1, NewTokens([1], [0.0], []), more, NewTokens([2], [0.0], [])) == 5  # with what waited
    assert sent(2.5, more) == 5, "another moment has begun"
    assert sent(2.75, end) == 7
    assert sent(3, more) == 7
    clock.go_to(20)
    assert (queue.qsize(), clock.calls) == (8, [])


def test_a_call_too_many_begins_no_second_row_of_moments():
    clock, queue, sizes = Clock(), asyncio.Queue(), set()
    delivery = Delivery(clock, gather=2.0)
    for i in range(41):
        clock.go_to(i / 2)
        delivery.send(queue, NewTokens([1], [0.0], [], 1))
        if i in (1, 3):
            clock.call_soon_threadsafe(delivery._deliver)  # as an interrupt may leave it
            clock.go_to(i / 2)
        sizes.add(queue.qsize())
    assert len(sizes) <= 12, "ten moments in 20 s"
    clock.go_to(30)
    assert (queue.qsize(), clock.calls) == (41, [])


def test_an_interrupt_between_two_moments_silences_nobody():
    clock, queue = Clock(), asyncio.Queue()
    delivery, event, at = Delivery(clock, gather=2.0), NewTokens([1], [0.0], [], 1), clock.call_at

    def interrupted(when, call, *arguments):
        clock.call_at = at
        raise KeyboardInterrupt

    delivery.send(queue, event)
    clock.call_at = interrupted
    with pytest.raises(KeyboardInterrupt):
        clock.go_to(0)
    delivery.send(queue, event)
    clock.go_to(1)
    assert queue.qsize() == 2


@pytest.mark.parametrize("gather", [0.0, 0.05])
def test_a_loop_that_is_over_is_not_kept(model, gather):
    engine, loops = Engine(model), []

    async def run():
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await collect(engine, [1, 2], params(0, 2), gather=gather)

    for _ in range(3):
        asyncio.run(run())
    gc.collect()
    assert not any(loop() for loop in loops)
    assert not engine._deliveries
    engine.close()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, RuntimeError])
def test_a_sink_that_fails_in_the_thread_leaves_no_request_behind(model, kind):
    engine = Engine(model)

    def sink(event):
        raise kind("foreign code")

    async def run():
        task = asyncio.create_task(collect(engine, [1, 2, 3], params(0)))
        await asyncio.sleep(0)
        beside = engine.submit([4], params(1, 5), sink=sink)
        return await asyncio.wait_for(task, 20), beside

    first, beside = asyncio.run(run())
    while beside.finish_reason is None:
        engine.step()
    assert first.finish_reason in ("error", "length")
    later = asyncio.run(asyncio.wait_for(collect(engine, [1, 2, 3], params(0)), 20))
    assert later.tokens == Engine(model).generate([[1, 2, 3]], params(0))[0].tokens
    assert later.tokens[: len(first.tokens)] == first.tokens
    stats = engine.stats()
    assert (stats["running"], stats["waiting"]) == (0, 0)
    engine.close()


def test_a_thread_that_cannot_go_on_ends_its_requests(model, monkeypatch):
    """Not a pass fails, but what is done with requests before it, and also afterwards: each time again."""
    engine = Engine(model)
    monkeypatch.setattr(engine.core.scheduler, "plan", lambda drafts: 1 // 0)
    monkeypatch.setattr(engine.core, "_recover", lambda: 1 // 0)
    broken = asyncio.run(asyncio.wait_for(collect(engine, [1, 2, 3], params(0)), 20))
    assert (broken.finish_reason, broken.tokens) == ("error", [])
    assert "ZeroDivisionError" in broken.error
    monkeypatch.undo()
    good = asyncio.run(asyncio.wait_for(collect(engine, [1, 2, 3], params(0)), 20))
    assert good.finish_reason == "length"
    engine.close()


def test_an_interrupted_call_is_made_again():
    class Loop:
        calls = 0

        def is_closed(self):
            return False

        def call_soon_threadsafe(self, deliver):
            Loop.calls += 1
            if Loop.calls == 1:
                raise KeyboardInterrupt
            deliver()

    loop, queue = Loop(), asyncio.Queue()
    delivery = Delivery(loop)
    with pytest.raises(KeyboardInterrupt):
        delivery.send(queue, NewTokens([1], [0.0], []))
    delivery.send(queue, NewTokens([1], [0.0], []))  # the engine sends it again
    assert queue.qsize() == 2
