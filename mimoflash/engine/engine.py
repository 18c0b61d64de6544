"""The engine: requests go in; pass by pass of the model is planned, run and sampled; tokens come out."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mimoflash.engine.backend import make_runner
from mimoflash.engine.cache import KINDS
from mimoflash.engine.core import Core
from mimoflash.engine.delivery import Delivery
from mimoflash.engine.drive import Driver
from mimoflash.engine.params import SamplingParams
from mimoflash.engine.request import Event, NewTokens, Output, Request, Routes
from mimoflash.engine.runner import route_dtype
from mimoflash.engine.scheduler import Scheduler
from mimoflash.engine.turns import Turns
from mimoflash.model import Transformer
from mimoflash.text import Tokenizer

Result = TypeVar("Result")


class Engine:
    """Generates from a model.

    `tokenizer` is needed for end tokens, stop strings and grammars only: prompts are token ids. `speculate`: the most
    tokens that MTP layers draft at a time, 0 to 3; output does not depend on it. `dtype`: of the weights, "float32",
    "bf16", on a CPU "int8" or "int4", on a GPU "fp8"; None: the model's. `max_running`: requests that run side by side.
    `cache_bytes`: for keys and values and all that is kept of them; by default a quarter of the memory that is free, or
    less where that is enough.
    A conversation's next turn runs only what is new in it; with `share_prefixes` all prompts that begin alike share
    their beginning, too. May be used from several threads and event loops at once. Raises ValueError for what the model
    or the machine lacks.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, *, speculate: int = 0, dtype: str | None = None,
        max_running: int = 64, cache_bytes: int | None = None, share_prefixes: bool = False,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.runner = make_runner(
            model, speculate=speculate, dtype=dtype, max_running=max_running, cache_bytes=cache_bytes,
            share_prefixes=share_prefixes,
        )
        scheduler = Scheduler(self.runner.cache, share_prefixes=share_prefixes)
        self.core = Core(model.config, self.runner, scheduler, tokenizer)
        self._arrivals = itertools.count()
        self._inbox: deque[Request] = deque()  # submitted or cancelled; taken in by whoever's turn it is
        self._turns = Turns()  # at all but the inbox
        self._driver = Driver(self.step, self._fail, lambda: not self._inbox and not self.core.scheduler.requests)
        # each loop's, by `gather`
        self._deliveries: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[float, Delivery]] = WeakKeyDictionary()
        self._is_closed = False

    # -- what programs call ---------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Continues each prompt; `params` for all, or one a prompt. Raises ValueError as `submit`, or for another
        number of params than prompts. An exception, Ctrl-C too, cancels these requests; the engine can be used on."""
        if any(isinstance(prompt, Integral) for prompt in prompts):
            raise ValueError("prompts holds token ids, but it must be a list of prompts: generate([[1, 2, 3]])")
        params = SamplingParams() if params is None else params
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} SamplingParams for {len(prompts)} prompts: give one, or one a prompt")
        requests = [self._request(p, q, name=f"prompt {i}") for i, (p, q) in enumerate(zip(prompts, each, strict=True))]
        try:
            for request in requests:
                self._send(request)
            for request in requests:
                while request.finish_reason is None:
                    self.step()
        finally:
            self._cancel(requests)
        return [request.output() for request in requests]

    def stream(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Iterator[int]:
        """The tokens of one request, as they come. Closing the iterator cancels it. Raises RuntimeError where the
        request ends by an error."""
        request, count = self._request(prompt, params or SamplingParams()), 0
        try:
            self._send(request)
            while True:
                is_over = request.finish_reason is not None  # looked at first: after it no token comes
                new = request.settled_tokens[count:]
                yield from new
                count += len(new)
                if is_over:
                    break
                if not new:
                    self.step()
        finally:
            self.cancel(request)
        if request.finish_reason == "error":
            raise RuntimeError(request.error)

    async def events(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, priority: int = 0,
        deadline: float | None = None, gather: float = 0.0,
    ) -> AsyncGenerator[Event, None]:
        """NewTokens as they come, then the Output. Closing the iterator (`aclose`) cancels the request. With `gather`
        the loop is woken once in so many seconds, for all requests that ask for the same: what one of them gets in the
        meantime comes in one; its first tokens and the Output do not wait. Other arguments as in `submit`. The passes
        run in a thread of their own, as long as there are requests."""
        count = 0
        with self._listening(prompt, params, priority, deadline, (NewTokens, Output), gather) as queue:
            while True:
                arrived = [await queue.get()]
                while not queue.empty():
                    arrived.append(queue.get_nowait())
                for event in _joined(arrived, count):
                    yield event
                    if isinstance(event, Output):
                        return
                    count = event.start + len(event.tokens)

    async def answer(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, priority: int = 0,
        deadline: float | None = None,
    ) -> Output:
        """The Output of `events` alone: nobody is woken for the tokens before. Cancelling the task cancels the request.
        """
        with self._listening(prompt, params, priority, deadline, (Output,)) as queue:
            output = await queue.get()
        assert isinstance(output, Output)
        return output

    def submit(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, priority: int = 0,
        deadline: float | None = None, sink: Callable[[Event], None] | None = None,
    ) -> Request:
        """Queues a request; `step` moves it on. Higher `priority` runs first. After `deadline` seconds it ends with
        what it has. `sink` gets its events, in the thread that steps: it may submit and cancel, and nothing else. One
        that is interrupted gets the same event again.

        Raises ValueError for an empty prompt, tokens outside the vocabulary, a length that the model's context or the
        cache cannot hold, and stop strings or a grammar without a tokenizer."""
        request = self._request(prompt, params or SamplingParams(), priority, deadline, sink)
        self._send(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends the request with what it has, and frees what it holds; nothing happens if it is finished."""
        self._cancel([request])

    def step(self) -> bool:
        """One pass of the model. False if there was nothing to run."""
        return self._in_turn(self._step)

    def _step(self) -> bool:
        self._take_in()
        return self.core.step()

    def stats(self) -> dict[str, Any]:
        """Figures since the start, and what is there now: "cache_bytes" and "cache_used_bytes" by kind of layer and of
        "copies" of rings (at the ends of prompts, and of shared prefixes), "running", "waiting" and "kept" (finished,
        for a next turn) requests, "passes", "tokens_run", "tokens_generated", "tokens_reused", "preemptions", and of
        speculation "drafted" and "accepted" by draft position and "accept_length", mean tokens gained by a
        verification."""
        return self._in_turn(self._stats)

    def _stats(self) -> dict[str, Any]:
        scheduler, cache, drafts = self.core.scheduler, self.runner.cache, self.core.lengths.acceptance
        return vars(self.core.totals) | {
            "cache_bytes": {kind: cache.bytes(kind) for kind in KINDS} | {"copies": cache.copies_bytes},
            "cache_used_bytes": {k: cache.used_bytes(k) for k in KINDS} | {"copies": scheduler.used_copies_bytes()},
            "running": len(scheduler.running),
            "waiting": len(scheduler.requests) - len(scheduler.running),
            "kept": len(scheduler.conversations.kept),
            "preemptions": scheduler.preemptions,
            "tokens_reused": scheduler.tokens_reused,
            "drafted": list(drafts.drafted),
            "accepted": list(drafts.accepted),
            "accept_length": drafts.mean_length,
        }

    def update_weights(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Takes over new weights, in place: those of `state`, by their names in the model's state_dict (all or some),
        or None where the model's own have been changed already. Requests that run go on under the new weights, their
        keys and values computed anew; what they have generated, its log-probabilities and routes stay as they were.
        What is kept of finished requests is dropped. Raises ValueError for an unknown name or another shape."""
        own = _fitting(self.model, state or {})

        def take_over() -> None:
            with torch.no_grad():
                for name, tensor in (state or {}).items():
                    own[name].copy_(tensor)
            self.runner.refresh()
            self.core.scheduler.reset()

        self._in_turn(take_over)

    def close(self) -> None:
        """Cancels everything, ends the thread of `events` and forgets what is kept. The engine takes no more."""
        self._is_closed = True

        def end_all() -> None:
            self._take_in()
            for request in list(self.core.scheduler.requests):
                self.core.finish(request, "cancelled")
            self.core.scheduler.reset()

        self._in_turn(end_all)
        self._driver.close()

    # -- requests come in -----------------------------------------------------------------------------------------

    @contextmanager
    def _listening(
        self, prompt: Sequence[int], params: SamplingParams | None, priority: int, deadline: float | None,
        kinds: tuple[type, ...], gather: float = 0.0,
    ) -> Iterator[asyncio.Queue[Event]]:
        """A request's events of these kinds, on their way to the running event loop; it is cancelled at the end."""
        loop = asyncio.get_running_loop()
        delivery = self._deliveries.setdefault(loop, {}).setdefault(gather, Delivery(loop, gather))
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def sink(event: Event) -> None:
            if isinstance(event, kinds):
                delivery.send(queue, event)

        request = self.submit(prompt, params, priority=priority, deadline=deadline, sink=sink)
        try:
            self._driver.start()
            yield queue
        finally:
            self.cancel(request)

    def _request(
        self, prompt: Sequence[int], params: SamplingParams, priority: int = 0, deadline: float | None = None,
        sink: Callable[[Event], None] | None = None, name: str = "the prompt",
    ) -> Request:
        if self._is_closed:
            raise ValueError("this engine is closed: make another one")
        config, text = self.model.config, list(map(int, prompt))
        if not text:
            raise ValueError(f"{name} is empty: give at least one token")
        if not 0 <= min(text) <= max(text) < config.vocab_size:
            raise ValueError(f"{name} has a token outside the vocabulary of {config.vocab_size}")
        if self.tokenizer is None and params.stop:
            raise ValueError("stop strings need a tokenizer: Engine(model, tokenizer)")
        limit = min(params.max_tokens, config.max_position_embeddings - len(text))
        if limit < 1:
            raise ValueError(
                f"{name} has {len(text)} tokens; the model's context of {config.max_position_embeddings} "
                "(max_position_embeddings) leaves no room for an answer"
            )
        room = self.runner.cache.positions
        if len(text) + limit > room:
            raise ValueError(
                f"{name} has {len(text)} tokens and up to {limit} follow, but the cache holds {room}: give more "
                "cache_bytes, or fewer max_tokens"
            )
        state = self.core.row_state(text, params)
        routes: Routes = np.empty((0, len(config.moe_layers), config.num_experts_per_tok), route_dtype(config))
        return Request(
            text, len(text), params, state, limit, routes, priority=priority, sink=sink, arrival=next(self._arrivals),
            deadline=None if deadline is None else time.monotonic() + deadline,
        )

    def _send(self, request: Request) -> None:
        self._inbox.append(request)
        self._settle()

    def _cancel(self, requests: Sequence[Request]) -> None:
        running = [request for request in requests if request.finish_reason is None]
        for request in running:
            request.is_cancelled = True
        self._inbox.extend(running)  # in one go: a second interrupt leaves none of them running
        self._settle()

    def _settle(self) -> None:
        """Takes the inbox in, unless it is another thread's turn: then that one does, when it is through."""
        while self._inbox and self._turns.run_if_free(lambda: self.core.whole(self._take_in)):
            pass

    def _in_turn(self, do: Callable[[], Result]) -> Result:
        """Whatever is done with all but the inbox is done in here."""
        try:
            return self._turns.run(lambda: self.core.whole(do))
        finally:
            self._settle()  # what came in the meantime

    def _take_in(self) -> None:
        while self._inbox:
            request = self._inbox[0]  # stays until it is in: an interrupt loses nothing
            if request.finish_reason is None:
                if request not in self.core.scheduler.requests:
                    self.core.scheduler.add(request)
                if request.is_cancelled:
                    self.core.finish(request, "cancelled")
            self._inbox.popleft()

    def _fail(self, error: BaseException) -> None:
        """Ends all requests by an error, in whatever state they are."""

        def end_all() -> None:
            while self._inbox:
                request = self._inbox.popleft()
                if request.finish_reason is None:
                    self.core.scheduler.requests[request] = None
            self.core.fail(error)

        self._turns.run(end_all)


def _joined(events: Sequence[Event], count: int) -> Iterator[Event]:
    """As one what is new after `count` tokens; after an interrupt the engine says some of it once more."""
    new = NewTokens([], [], [], count)
    for event in events:
        if isinstance(event, Output):
            if new.tokens:
                yield new
            yield event
            return
        if event.start == count + len(new.tokens):
            new.tokens.extend(event.tokens)
            new.logprobs.extend(event.logprobs)
            new.top_logprobs.extend(event.top_logprobs)
    if new.tokens:
        yield new


def _fitting(model: Transformer, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The model's own tensors. Raises ValueError where one of `state` is not among them, or another shape."""
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise ValueError(f"update_weights: the model has no tensor {name!r}")
        if own[name].shape != tensor.shape:
            raise ValueError(f"update_weights: {name} is {tuple(own[name].shape)} here, {tuple(tensor.shape)} there")
    return own
