"""Interrupts at every line of the engine's own code, and of the sinks that it calls, as a signal would come there."""

import sys

import pytest
from ledger import assert_is_right, make_engine, params_of, run_all
from oracles import assert_nothing_is_left

from mimoflash.engine import NewTokens

# a signal cannot come where a tracer can: between a lock's release and the end of the line before (see `Turns`)
NOT_WALKED = "engine/turns.py"


class Listener:
    """A sink: what it has heard of its request."""

    def __init__(self):
        self.tokens, self.outputs = [], []

    def __call__(self, event):
        if isinstance(event, NewTokens):
            self.tokens[event.start :] = event.tokens
        else:
            self.outputs.append(event)
        self.last = event


class Interrupts:
    """Raises KeyboardInterrupt when so many lines have run."""

    def __init__(self, lines):
        self.lines = lines

    def __enter__(self):
        sys.settrace(self._trace)

    def __exit__(self, kind, error, traceback):
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def _trace(self, frame, event, _):
        is_walked = "mimoflash/engine/" in frame.f_code.co_filename or frame.f_code.co_qualname == "Listener.__call__"
        if not is_walked or frame.f_code.co_filename.endswith(NOT_WALKED):
            return None
        self.lines -= event == "line"
        if self.lines == 0 and event == "line":
            raise KeyboardInterrupt
        return self._trace


@pytest.fixture(scope="module")
def engine():
    """One for all interrupts: it goes on from each."""
    engine = make_engine(slots=2, pages=7, speculate=2)
    engine.core.lengths.choose = lambda _: 2
    return engine


def begin(engine):
    """Requests that, step by step, wait, read their prompts, decode with right and wrong drafts, give way, are
    cancelled, come late, and end; one goes on from a conversation that is kept."""
    first = engine.submit([7] * 9, params_of(9, 3, 0.0))
    run_all(engine)
    prompts = [*first.text, 1, 2], [3] * 64, [4], [5, 5]
    listeners = [Listener() for _ in prompts]

    def submit():
        return [
            engine.submit(prompt, params_of(i, 2 + i % 2, i % 2), sink=sink, deadline=3600, priority=i == 2)
            for i, (prompt, sink) in enumerate(zip(prompts, listeners, strict=True))
        ]

    return engine._turns.run(submit), listeners  # the first step takes them in


def go_through(engine, requests):
    """Two steps, a request cancelled in the meantime, and the rest."""
    for _ in range(2):
        engine.step()
    engine.cancel(requests[3])
    run_all(engine)


def count_lines(engine):
    requests, _ = begin(engine)
    counter = Interrupts(-1)
    with counter:
        go_through(engine, requests)
    return -1 - counter.lines


EVERY = pytest.param("go on", 1, marks=pytest.mark.long)


@pytest.mark.parametrize(("then", "stride"), [EVERY, ("go on", 5), ("a second interrupt", 9), ("cancel", 9)])
def test_an_interrupt_at_any_line_loses_nothing(engine, then, stride):
    lines = count_lines(engine)
    assert lines > 1000
    assert_nothing_is_left(engine)
    for line in range(1, lines + 1, stride):
        requests, listeners = begin(engine)
        with Interrupts(line):
            go_through(engine, requests)
        engine.stats()  # mends
        late = {request for *_, request in engine.core.scheduler.deadlines}
        assert late == {request for request in requests if request.finish_reason is None}
        if then == "a second interrupt":
            with Interrupts(1 + line % 97):
                run_all(engine)
        if then == "cancel":
            for request in requests:
                engine.cancel(request)
            assert all(request.finish_reason for request in requests)
        run_all(engine)
        for request, listener in zip(requests, listeners, strict=True):
            assert_is_right(request)
            output = request.output()
            assert listener.tokens == output.tokens
            assert {tuple(heard.tokens) for heard in listener.outputs} == {tuple(output.tokens)}
        assert not engine.core.scheduler.deadlines
        assert_nothing_is_left(engine)
