"""Which requests run in the next pass, and what they have of the cache: admission, preemption, deadlines, reuse."""

import bisect
import heapq
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from mimoflash.engine.cache import HybridCache
from mimoflash.engine.prompt_scores import fitting, scored_positions
from mimoflash.engine.request import FinishReason, Request, Routes
from mimoflash.engine.reuse import BLOCK, Conversations, Prefix, SharedPrefixes

PREFILL_TOKENS = 512  # of prompts in a pass: those that decode beside wait no longer than these take


@dataclass
class Plan:
    """`decodes`: requests with one token to run, and how many drafts each may add; `chunks`: requests that read their
    prompts, and how many tokens of them; `scores`: positions in these whose logits tell the prompts' log-probabilities.
    All have the pages that they need."""

    decodes: list[Request] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    scores: dict[Request, range] = field(default_factory=dict)


class Scheduler:
    """Continuous batching. Everything is decided anew before each pass: first all that decode, then chunks of prompts,
    by priority, then arrival. Where pages run out, the last in that order gives up its own and later runs its text
    again from the start: nothing that it has generated is lost."""

    def __init__(self, cache: HybridCache, *, share_prefixes: bool = False):
        self.cache = cache
        self.requests: dict[Request, None] = {}  # all whose output has not been sent
        self.running: list[Request] = []  # those with a slot, by `order`
        self.waiting: list[tuple[tuple[int, int], Request]] = []  # a heap; finished ones are dropped as they come up
        self.deadlines: list[tuple[float, int, Request]] = []  # sorted
        self.conversations = Conversations(cache)
        self.prefixes = SharedPrefixes(cache) if share_prefixes else None
        self.blocked: Request | None = None  # the one that found no room in the last pass
        self.score_rows = 1  # of logits in a pass, for prompts' log-probabilities; set by who knows their size
        self.preemptions = self.tokens_reused = 0

    def add(self, request: Request) -> None:
        self.requests[request] = None
        heapq.heappush(self.waiting, (request.order, request))
        if request.deadline is not None:
            bisect.insort(self.deadlines, (request.deadline, request.arrival, request))

    def finish(self, request: Request, reason: FinishReason) -> None:
        """The request is over. One that ended by itself keeps its slot for a next turn, until that is needed."""
        if request.slot >= 0:
            self.running.remove(request)
            request.run = min(request.run, len(request.text) - 1)  # drafts past a stop do not count
            if reason in ("stop", "length"):
                self.cache.truncate(request.slot, request.run)
                self.conversations.keep(request)
            else:
                self.cache.free_slot(request.slot)
                request.slot, request.snapshot = -1, None

    def forget(self, request: Request) -> None:
        """A finished request, once its output has been sent."""
        if request.deadline is not None:
            entry = request.deadline, request.arrival, request
            at = bisect.bisect_left(self.deadlines, entry)
            del self.deadlines[at : bisect.bisect_right(self.deadlines, entry)]
        del self.requests[request]

    def expired(self) -> list[Request]:
        """Requests whose deadline has come."""
        now = time.monotonic()
        return [request for _, _, request in takewhile(lambda entry: entry[0] <= now, self.deadlines)]

    @property
    def decoding(self) -> int:
        """Requests that have one token to run."""
        return sum(request.pending == 1 for request in self.running)

    def plan(self, drafts: int) -> Plan:
        """The next pass, where each that decodes may add up to `drafts` tokens."""
        plan = Plan()
        self._yield_to_priority()
        for request in self.running[:]:
            if request.slot < 0 or request.pending > 1:  # given up for one before it; reads its prompt
                continue
            wanted = min(drafts, request.limit - request.generated - 1)
            if request.run + 1 + wanted > self.cache.capacity(request.slot):
                wanted = self._reserve(request, wanted)
            if request.slot >= 0:
                plan.decodes.append(request)
                plan.drafts.append(wanted)
        self._plan_chunks(plan)
        return plan

    def prompt_has_run(self, request: Request) -> None:
        """To request.run, which is not after its end: keeps what later requests may go on from."""
        if request.run == request.prompt_tokens and self.cache.has_rings:
            request.snapshot = self.cache.snapshot(request.slot, request.run)
        if self.prefixes:
            self.prefixes.add(request)

    def used_copies_bytes(self) -> int:
        """Of the copies of rings at the ends of prompts and of shared blocks: `cache.copies_bytes` at most."""
        kept = [request.snapshot for request in [*self.running, *self.conversations.kept]]
        kept += [prefix.rings for prefix in self.prefixes.kept.values()] if self.prefixes else []
        return sum(snapshot.nbytes for snapshot in kept if snapshot is not None)

    def reset(self) -> None:
        """Whatever was there: nothing is in the cache, all requests wait, with the text that they have."""
        self.conversations.forget()
        if self.prefixes:
            self.prefixes.kept.clear()
        self.cache.clear()
        self.running.clear()
        for request in self.requests:  # also those that waited: nothing changes for them
            request.slot, request.run, request.snapshot = -1, 0, None
            if request.is_unscored and request.finish_reason is None:
                request.prompt_logprobs = [None]  # the weights may be others now: all are told by the same
        self.waiting = sorted((request.order, request) for request in self.requests)
        self.deadlines = sorted((r.deadline, r.arrival, r) for r in self.requests if r.deadline is not None)

    # -- prompts --------------------------------------------------------------------------------------------------

    def _plan_chunks(self, plan: Plan) -> None:
        budget = PREFILL_TOKENS
        for request in self.running:
            if request.pending > 1 and budget:
                budget -= self._plan_chunk(plan, request, budget)
        while budget and (first := self._next_waiting()) is not None:
            if not self._admit(first):
                self.blocked = first
                break
            heapq.heappop(self.waiting)
            bisect.insort(self.running, first, key=lambda each: each.order)
            budget -= self._plan_chunk(plan, first, budget)

    def _plan_chunk(self, plan: Plan, request: Request, budget: int) -> int:
        count = min(request.pending, budget)
        if request.run < request.prompt_tokens:
            # passes end where the rings are copied: at the prompt's end, and where prefixes are shared
            if self.cache.has_rings:
                count = min(count, request.prompt_tokens - request.run)
            if self.prefixes:
                count = min(count, BLOCK - request.run % BLOCK)
        if request.is_unscored:
            count = fitting(request, count, self.score_rows - sum(map(len, plan.scores.values())))
            if positions := scored_positions(request, count):
                plan.scores[request] = positions
        if count:  # else those before it have all the rows of this pass
            plan.chunks.append((request, count))
        return count

    def _next_waiting(self) -> Request | None:
        while self.waiting:
            request = self.waiting[0][1]
            if request.finish_reason is None:
                return request
            heapq.heappop(self.waiting)
        return None

    def _admit(self, request: Request) -> bool:
        """A slot and pages for the request's text, and one more for each that runs: so that it is not the next to give
        them up. False where there is not enough, even without what is kept of finished requests."""
        earlier, length = self.conversations.find(request)
        blocks: list[Prefix] = []
        if earlier is not None:
            self.conversations.kept.pop(earlier)  # not to be dropped now
        elif self.prefixes:
            blocks = self.prefixes.find(request)
            length = len(blocks) * BLOCK
        pages = [page for block in blocks for page in block.pages]
        self.cache.retain(pages)
        held = length if earlier is None else earlier.run  # positions; `resume` gives back those after `length`
        missing = self.cache.pages_for(len(request.text) + 1) - self.cache.pages_for(held)
        missing += len(self.running) if self.cache.has_pages else 0
        if not self._make_room(slots=0 if earlier else 1, pages=missing):
            self.cache.release(pages)
            if earlier is not None:
                self.conversations.keep(earlier)
            return False
        if earlier is not None:
            slot, routes = self.conversations.resume(earlier, length), earlier.routes[:length]
        else:
            slot = self.cache.take_slot()
            routes = np.concatenate([request.routes[:0], *(block.routes for block in blocks)])
            self.cache.adopt(slot, pages)
            if blocks:
                self.cache.restore(slot, blocks[-1].rings)
        reserved = self.cache.reserve(slot, len(request.text) + 1)
        assert reserved, "room was made"
        self._start(request, slot, length, routes)
        return True

    def _start(self, request: Request, slot: int, length: int, routes: Routes) -> None:
        """The request goes on at `length`: what is before has been run for another, by these routes."""
        request.slot, request.run = slot, length
        if not len(request.routes):  # it has not run before
            shape = request.prompt_tokens + request.limit, *request.routes.shape[1:]
            request.routes = np.empty(shape, request.routes.dtype)
            request.cached_tokens = length
        self.tokens_reused += length
        if length > request.routed:
            request.routes[:length] = routes
            request.routed = length

    # -- room -----------------------------------------------------------------------------------------------------

    def _reserve(self, request: Request, drafts: int) -> int:
        """Pages for the next token and its drafts; returns how many drafts have room. The request may lose its slot."""
        while not self.cache.reserve(request.slot, request.run + 1 + drafts):
            if self.drop_kept():
                continue
            if drafts:
                drafts = 0
                continue
            last = self.running[-1]
            self.preempt(last)
            if last is request:
                break
        return drafts

    def preempt(self, request: Request) -> None:
        """Its slot and pages are free; it waits, at the place that its priority and arrival give it."""
        self.running.remove(request)
        self.cache.free_slot(request.slot)
        request.slot, request.run, request.snapshot = -1, 0, None
        heapq.heappush(self.waiting, (request.order, request))
        self.preemptions += 1

    def _yield_to_priority(self) -> None:
        """One request stops for one of higher priority that found no room in the last pass."""
        blocked, self.blocked = self.blocked, None
        if blocked is not None and blocked.finish_reason is None and self.running:
            last = self.running[-1]
            if last.priority < blocked.priority:
                self.preempt(last)

    def _make_room(self, *, slots: int, pages: int) -> bool:
        """Gives up what is kept of finished requests, as much as is needed; nothing where all of it would not do."""
        count = self._drops_for(slots, pages)
        for _ in range(count or 0):
            self.drop_kept()
        return count is not None

    def _drops_for(self, slots: int, pages: int) -> int | None:
        """How many times `drop_kept` makes this room; None where it cannot."""
        cache = self.cache
        slots, pages = slots - cache.free_slots, pages - cache.free_pages  # missing
        if slots <= 0 and pages <= 0:
            return 0
        conversations = [cache.pages_of(request.slot) for request in self.conversations.kept]
        blocks = [prefix.pages for prefix in self.prefixes.kept.values()] if self.prefixes else []
        if sum(map(len, conversations)) + sum(map(len, blocks)) < pages:  # most often so where there is no room
            return None
        dropped: Counter[int] = Counter()  # references to pages
        for count, its_pages in enumerate([*conversations, *blocks], 1):
            dropped.update(its_pages)
            slots -= count <= len(conversations)
            pages -= sum(dropped[page] == cache.references(page) for page in its_pages)
            if slots <= 0 and pages <= 0:
                return count
        return None

    def drop_kept(self) -> bool:
        """Gives up what is kept of one finished request; False if there is nothing."""
        return self.conversations.drop() or (self.prefixes is not None and self.prefixes.drop())
