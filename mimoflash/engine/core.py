"""The loop without its threads: a pass is planned, drafted for, run, sampled, and its tokens handed out."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mimoflash.config import ModelConfig
from mimoflash.engine.params import SamplingParams
from mimoflash.engine.prompt_scores import most_rows, record
from mimoflash.engine.request import Event, FinishReason, NewTokens, Request, Routes
from mimoflash.engine.row_state import RowState
from mimoflash.engine.runner import NO_FILL, RECENT, DraftNoise, Ints, Runner, Step
from mimoflash.engine.sampling import Sampled, Sampler
from mimoflash.engine.scheduler import Plan, Scheduler
from mimoflash.engine.speculation import DraftLength
from mimoflash.text import Tokenizer

Result = TypeVar("Result")


@dataclass
class Totals:
    """Since the start: passes of the model, positions that they ran, tokens generated."""

    passes: int = 0
    tokens_run: int = 0
    tokens_generated: int = 0


class Core:
    """Used by one thread at a time, from within `whole`."""

    def __init__(self, config: ModelConfig, runner: Runner, scheduler: Scheduler, tokenizer: Tokenizer | None):
        self.runner, self.scheduler, self.tokenizer = runner, scheduler, tokenizer
        self.vocab_size = config.vocab_size
        scheduler.score_rows = most_rows(config.vocab_size)
        self.stop_ids = _stop_ids(config, tokenizer)
        self.sampler = Sampler()
        self.lengths = DraftLength(runner.cache.drafts)
        self.totals = Totals()
        self._is_whole = True

    def whole(self, do: Callable[[], Result]) -> Result:
        """What `do` returns. Where an exception, Ctrl-C too, has left something half done, it is mended before: here,
        not where it was raised, since another interrupt may come while it is mended."""
        if not self._is_whole:
            self._recover()
        self._is_whole = False
        result = do()
        self._is_whole = True
        return result

    def step(self) -> bool:
        """One pass. False if there was nothing to run."""
        for request in self.scheduler.expired():
            self.finish(request, "deadline")
        decoding = self.scheduler.decoding
        plan = self.scheduler.plan(self.lengths.choose(decoding) if decoding and self.lengths.limit else 0)
        if not plan.decodes and not plan.chunks:
            assert not self.scheduler.requests, "what waits fits into an empty cache"
            return False
        self._run(plan)
        return True

    def row_state(self, prompt: list[int], params: SamplingParams, seed: int | None = None) -> RowState:
        """At the prompt's end. Raises ValueError as RowState."""
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_stop_tokens else self.stop_ids)
        state = RowState(params, prompt, self.vocab_size, stop_ids=stop_ids, tokenizer=self.tokenizer)
        if seed is not None:
            state.seed = seed
        return state

    def finish(self, request: Request, reason: FinishReason) -> None:
        """The request is over. It stays known until its output is sent: an interrupt does not lose that."""
        self.scheduler.finish(request, reason)
        request.finish_reason = reason
        _send_output(request)
        self.scheduler.forget(request)

    def _run(self, plan: Plan) -> None:
        drafts = self._draft(plan)
        start = time.perf_counter()
        step = _step(plan, drafts, self.runner.cache.drafts, self.runner.cache.window)
        logits, routes = self.runner.forward(step)
        readers = [request for request, count in plan.chunks if count == request.pending]
        states = [request.state for request in plan.decodes + readers]
        picked = len(states) + sum(map(len, drafts))
        if plan.scores:
            record(plan.scores, logits[picked:])
        taken = self.sampler.pick(logits[:picked], states, [*drafts, *[()] * len(readers)])
        if not plan.chunks:
            self.lengths.record_step(len(step.tokens), time.perf_counter() - start)
        self.totals.passes += 1
        self.totals.tokens_run += len(step.tokens)
        self._hand_out(plan, drafts, taken, routes.numpy())

    # -- drafts ---------------------------------------------------------------------------------------------------

    def _draft(self, plan: Plan) -> list[list[int]]:
        """The drafts of each request that decodes, as many as planned."""
        drafts: list[list[int]] = [[] for _ in plan.decodes]
        who = [i for i, count in enumerate(plan.drafts) if count]
        if not who:
            return drafts
        start, count = time.perf_counter(), max(plan.drafts)
        requests = [plan.decodes[i] for i in who]
        noise = DraftNoise(
            np.array([r.params.temperature for r in requests], np.float32),
            np.array([r.state.seed for r in requests], np.uint64),
        )
        slots = np.array([r.slot for r in requests], np.int32)
        positions = np.array([r.run - 1 for r in requests], np.int32)
        recent = np.array([_recent(r.text) for r in requests], np.int32)
        drafted = self.runner.draft(slots, positions, recent, count, noise).tolist()
        for i, tokens in zip(who, drafted, strict=True):
            drafts[i] = tokens[: plan.drafts[i]]
        self.lengths.record_drafting(len(who), count, time.perf_counter() - start)
        return drafts

    # -- what came of it ------------------------------------------------------------------------------------------

    def _hand_out(self, plan: Plan, drafts: list[list[int]], taken: list[list[Sampled]], routes: Routes) -> None:
        row = 0
        for request, draft, sampled in zip(plan.decodes, drafts, taken, strict=False):
            self._has_run(request, routes[row : row + max(len(sampled), 1)])
            row += 1 + len(draft)
            if draft and sampled:
                self.lengths.acceptance.record(len(draft), len(sampled) - 1)
                request.verifications += 1
                request.gained += len(sampled)
            self._take(request, sampled)
        finished = iter(taken[len(plan.decodes) :])
        for request, count in plan.chunks:
            self._has_run(request, routes[row : row + count])
            row += count
            if not request.pending:
                self._take(request, next(finished))

    def _has_run(self, request: Request, routes: Routes) -> None:
        """Positions from request.run on are in the cache now."""
        end = request.run + len(routes)
        if end > request.routed:  # else it is run again after a preemption
            request.routes[request.routed : end] = routes[request.routed - request.run :]
            request.routed = end
        request.run = end
        if end <= request.prompt_tokens:
            self.scheduler.prompt_has_run(request)

    def _take(self, request: Request, sampled: list[Sampled]) -> None:
        """Adds the tokens to the request, up to a stop, and ends it where it is over."""
        stopped = False
        if request.params.stop:
            sampled, stopped = self._until_stop(request, sampled)
        if sampled:
            tokens, logprobs, sampling_logprobs, likeliest = map(list, zip(*sampled, strict=True))
            request.text += tokens
            request.logprobs += logprobs
            request.sampling_logprobs += sampling_logprobs
            request.top_logprobs += likeliest if request.params.top_logprobs else []
            self.totals.tokens_generated += len(tokens)
        request.error = request.state.error
        reason = _end(request, stopped)
        request.settled = request.generated, reason
        _send_tokens(request)
        if reason is not None:
            self.finish(request, reason)

    def _until_stop(self, request: Request, sampled: list[Sampled]) -> tuple[list[Sampled], bool]:
        """The tokens up to the one that completes a stop string, and whether there is one."""
        assert self.tokenizer is not None, "checked when the request came"
        # a stop string that has just been completed lies within its own length, in tokens, of the end
        longest = max(len(text.encode()) for text in request.params.stop) + 1
        since = max(request.prompt_tokens, len(request.text) - longest)
        tokens = request.text[since:] + [one.token for one in sampled]
        for n in range(1, len(sampled) + 1):
            tail = self.tokenizer.decode(tokens[: len(tokens) - len(sampled) + n][-longest:])
            if any(text in tail for text in request.params.stop):
                return sampled[:n], True
        return sampled, False

    # -- after an exception ---------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Ends all requests by an error; nothing that was half done is needed for that. May be begun again."""
        self._is_whole = False
        for request in list(self.scheduler.requests):
            request.unsettle()
            reason = request.finish_reason or request.settled[1]
            if reason is None:
                request.error = f"{type(error).__name__}: {error}"
            request.finish_reason = reason or "error"
            self.scheduler.forget(request)  # before its sink is called, which may be what fails
            _send_tokens(request)
            _send_output(request)
        self.scheduler.reset()
        self._is_whole = True

    def _recover(self) -> None:
        """What an exception anywhere has left half done is undone: every request has what was settled of it and runs
        again from its start, or ends where that was settled, too. May itself be interrupted, and begun again."""
        for request in self.scheduler.requests:
            if request.slot >= 0:
                request.unsettle()
                prompt, tokens = request.text[: request.prompt_tokens], request.settled_tokens
                request.state = self.row_state(prompt, request.params, seed=request.state.seed)
                for token in tokens:
                    request.state.take(token)
        self.scheduler.reset()
        for request in list(self.scheduler.requests):
            _send_tokens(request)
            if (reason := request.finish_reason or request.settled[1]) is not None:
                self.finish(request, reason)


def _end(request: Request, stopped: bool) -> FinishReason | None:
    """Whether, and how, the request ends with the tokens that it has now."""
    if request.state.error is not None:
        return "error"
    if stopped or request.state.is_finished:
        return "stop"
    return "length" if request.generated >= request.limit else None


def _send_tokens(request: Request) -> None:
    """What is settled and has not been sent; an interrupted sink gets it again."""
    start, (end, _) = request.sent, request.settled
    if start < end and request.sink is not None:
        first = request.prompt_tokens  # only what is new is copied: this runs for every token
        tokens = request.text[first + start : first + end]
        _send(request, NewTokens(tokens, request.logprobs[start:end], request.top_logprobs[start:end], start))
    request.sent = end


def _send_output(request: Request) -> None:
    if request.sink is not None:
        _send(request, request.output())
        request.sink = None


def _send(request: Request, event: Event) -> None:
    """A sink is foreign code: one that fails gets no more, and the engine goes on."""
    assert request.sink is not None
    try:
        request.sink(event)
    except Exception:
        logging.getLogger(__name__).exception("the sink of a request failed: it gets no more events")
        request.sink = None


def _stop_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's end tokens and the tokenizer's, as far as the vocabulary has them."""
    eos = config.eos_token_id
    ids = set(eos if isinstance(eos, tuple) else () if eos is None else (eos,))
    if tokenizer is not None:
        ids |= tokenizer.stop_ids
    return frozenset(token for token in ids if 0 <= token < config.vocab_size)


# -- arrays for the runner --------------------------------------------------------------------------------------------


def _step(plan: Plan, drafts: list[list[int]], lookahead: int, window: int) -> Step:
    """`lookahead`: tokens that the MTP layers look ahead by; prompts are shown to them from a window before the end."""
    slots, starts, counts = [], [], []
    tokens: list[int] = []
    for request, draft in zip(plan.decodes, drafts, strict=True):
        slots.append(request.slot)
        starts.append(request.run)
        counts.append(1 + len(draft))
        tokens.append(request.text[-1])
        tokens += draft
    rows = list(range(len(tokens)))
    scored: list[int] = []  # rows, too: after those that tokens are picked from
    ahead: list[list[int]] = [[NO_FILL] * lookahead] * len(slots)
    for request, count in plan.chunks:
        end = request.run + count
        slots.append(request.slot)
        starts.append(request.run)
        counts.append(count)
        tokens += request.text[request.run : end]
        if count == request.pending:
            rows.append(len(tokens) - 1)
        scored += [len(tokens) - end + position for position in plan.scores.get(request, ())]
        known = request.text[end : end + lookahead] if end > len(request.text) - window else [NO_FILL]
        ahead.append(known + [-1] * (lookahead - len(known)))
    shown = np.array(ahead, np.int32) if plan.chunks and lookahead else None
    return Step(_ints(slots), _ints(starts), _ints(counts), _ints(tokens), _ints(rows + scored), shown)


def _ints(values: list[int]) -> Ints:
    return np.array(values, np.int32)


def _recent(text: list[int]) -> list[int]:
    last = text[-RECENT:]
    return [-1] * (RECENT - len(last)) + last
