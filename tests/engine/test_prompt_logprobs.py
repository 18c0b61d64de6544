"""Log-probabilities of prompts: those of the model over the whole text, however it is cut, stopped and run again."""

import asyncio
import copy

import numpy as np
import pytest
import torch
from ledger import CONFIG, VOCABULARY, WINDOW, LedgerRunner, assert_is_right, next_logits, params_of, run_all
from ledger import make_engine as make_ledger_engine
from oracles import assert_nothing_is_left, assert_same, memory, random_prompts
from test_interrupted_lines import Interrupts, Listener

from mimoflash.engine import Engine, SamplingParams, prompt_scores, reuse, scheduler
from mimoflash.engine.cache import PAGE
from mimoflash.engine.cuda import CudaRunner
from mimoflash.engine.speculation import DraftLength

ROWS = 7  # of logits in a pass, where chunks are cut
TOLERANCE = 1e-4  # twice what float32 costs these models' own log-probabilities


def scoring(k, max_tokens=1, **more):
    return SamplingParams(max_tokens=max_tokens, prompt_logprobs=k, **more)


@torch.no_grad()
def whole(model, prompt):
    """(T - 1, V) log-probabilities of what may follow each token but the last."""
    return model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)


def assert_are(reported, logp, prompt, k):
    """`reported`, for the first tokens of `prompt` at least, is what `logp` (T - 1, V) says."""
    assert reported[0] is None
    for row, token, (logprob, likeliest) in zip(logp, prompt[1:], reported[1:], strict=False):
        assert type(logprob) is float
        assert logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        ids, values = [token for token, _ in likeliest], [value for _, value in likeliest]
        best = row.topk(min(k, len(row)))
        assert values == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        assert values == sorted(values, reverse=True)
        # the same tokens, or such as rounding may swap
        assert len(set(ids)) == len(ids)
        assert row[ids].tolist() == pytest.approx(best.values.tolist(), abs=TOLERANCE)


def assert_all_are(output, model, prompt, k):
    assert len(output.prompt_logprobs) == len(prompt) == output.prompt_tokens
    assert output.cached_tokens == 0
    assert_are(output.prompt_logprobs, whole(model, prompt), prompt, k)


def cut_to(monkeypatch, rows, vocabulary=128):
    """For engines that are made from now on."""
    monkeypatch.setattr(prompt_scores, "LOGITS_BYTES", rows * 4 * vocabulary + 3)


def watch(monkeypatch, engine):
    """How many rows of logits each pass makes."""
    rows, forward = [], engine.runner.forward

    def watched(step):
        rows.append(len(step.logits_rows))
        return forward(step)

    monkeypatch.setattr(engine.runner, "forward", watched)
    return rows


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("rows", [None, ROWS, 1])
def test_they_are_the_models_own(model, monkeypatch, runner, rows, speculate):
    """Side by side and beside others, over several passes, whatever tokens are sampled from."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 70)
    monkeypatch.setattr(DraftLength, "choose", lambda *_: speculate)
    if rows:
        cut_to(monkeypatch, rows)
    prompts = random_prompts(1, 150, 2, 33, 64, 90)
    params = [
        scoring(4, 8),
        scoring(3, 6, temperature=0.7, top_k=4, seed=1, logit_bias={3: 5.0}, repetition_penalty=1.3, top_logprobs=2),
        scoring(0, 20), SamplingParams(max_tokens=30, temperature=1.0, seed=2), scoring(200, 9), scoring(1),
    ]  # fmt: skip
    engine = Engine(model, speculate=speculate)
    outputs = engine.generate(prompts, params)
    for prompt, its, output in zip(prompts, params, outputs, strict=True):
        if its.prompt_logprobs is None:
            assert output.prompt_logprobs is None
            continue
        assert_all_are(output, model, prompt, its.prompt_logprobs)
    plain = [SamplingParams(**vars(its) | {"prompt_logprobs": None}) for its in params]
    assert_same(outputs, Engine(model).generate(prompts, plain))


def test_the_runner_for_cuda_tells_the_same(model, monkeypatch):
    monkeypatch.setattr(DraftLength, "choose", lambda *_: 3)
    for rows in (ROWS, 2):  # 2: such a chunk is as short as one of drafts, and runs with them
        cut_to(monkeypatch, rows)
        engine = Engine(model, speculate=3)
        engine.runner = engine.core.runner = CudaRunner(model, engine.runner.cache)
        prompts = random_prompts(20, 1, 90)
        for prompt, output in zip(prompts, engine.generate(prompts, scoring(2, 12)), strict=True):
            assert_all_are(output, model, prompt, 2)


def test_a_pass_makes_no_more_rows_than_there_is_memory_for(model, monkeypatch, runner):
    cut_to(monkeypatch, ROWS)
    engine = Engine(model)
    made = watch(monkeypatch, engine)
    prompts = random_prompts(50, 40, 30)
    for prompt, output in zip(prompts, engine.generate(prompts, scoring(0)), strict=True):
        assert_all_are(output, model, prompt, 0)
    assert sum(made) == 49 + 39 + 29 + 3  # and one for each that has read its prompt
    assert max(made) <= ROWS + 3
    assert len(made) == -(-(49 + 39 + 29) // ROWS)
    assert [prompt_scores.most_rows(size) for size in (128, 64, 10**9)] == [7, 14, 1]


def test_other_prompts_are_run_as_before(model, monkeypatch):
    cut_to(monkeypatch, 1)
    engine = Engine(model)
    made = watch(monkeypatch, engine)
    engine.generate(random_prompts(200, 300), SamplingParams(max_tokens=1))
    assert made == [2]


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_conversation_is_not_gone_on_from_but_may_be_again(model, monkeypatch, runner, speculate):
    cut_to(monkeypatch, ROWS)
    engine = Engine(model, speculate=speculate)
    (prompt,), (new,) = random_prompts(90), random_prompts(40)
    (first,) = engine.generate([prompt], SamplingParams(max_tokens=30))
    text = prompt + first.tokens + new
    (second,) = engine.generate([text], scoring(2, 5))
    assert_all_are(second, model, text, 2)
    longer = text + second.tokens + new
    (third,) = engine.generate([longer], SamplingParams(max_tokens=5))
    assert third.cached_tokens == len(text) + 4
    assert_same([second, third], Engine(model).generate([text, longer], SamplingParams(max_tokens=5)))


@pytest.mark.parametrize("scored_first", [False, True])
def test_shared_prefixes_are_run_but_given_to_others(model, monkeypatch, runner, scored_first):
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    cut_to(monkeypatch, 25)  # no divisor of BLOCK
    (system,) = random_prompts(150)
    prompts = [system + new for new in random_prompts(5, 30)]
    params = [scoring(1, 9), SamplingParams(max_tokens=9)][:: 1 if scored_first else -1]
    engine = Engine(model, share_prefixes=True)
    outputs = [engine.generate([prompt], its)[0] for prompt, its in zip(prompts, params, strict=True)]
    scored = 0 if scored_first else 1
    assert_all_are(outputs[scored], model, prompts[scored], 1)
    assert [output.cached_tokens for output in outputs] == ([0, 2 * PAGE] if scored_first else [0, 0])
    assert_same(outputs, Engine(model).generate(prompts, SamplingParams(max_tokens=9)))


def test_once_all_are_known_a_preempted_request_may_go_on_from_what_is_shared(model, monkeypatch, runner):
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    engine = Engine(model, share_prefixes=True)
    made = watch(monkeypatch, engine)
    (prompt,) = random_prompts(150)
    request = engine.submit(prompt, scoring(1, 20))
    while request.generated < 5:
        engine.step()
    engine.core.scheduler.preempt(request)
    run_all(engine)
    assert engine.stats()["tokens_reused"] == 2 * PAGE
    assert sum(made) == 149 + 20
    assert_all_are(request.output(), model, prompt, 1)


def test_a_prompt_that_is_preempted_tells_nothing_twice(model, monkeypatch, runner):
    cut_to(monkeypatch, ROWS)
    engine = Engine(model, max_running=1, cache_bytes=memory(1, 2))
    made = watch(monkeypatch, engine)
    prompt, other = random_prompts(40, 9)
    request = engine.submit(prompt, scoring(3, 10))
    for _ in range(3):
        engine.step()
    known = request.prompt_logprobs[:]
    assert len(known) == 1 + 3 * ROWS
    urgent = engine.submit(other, scoring(0), priority=1)
    run_all(engine)
    assert engine.stats()["preemptions"] == 1
    assert all(a is b for a, b in zip(known, request.prompt_logprobs, strict=False))
    assert_all_are(request.output(), model, prompt, 3)
    assert_all_are(urgent.output(), model, other, 0)
    assert sum(made) == 39 + 10 + 8 + 1
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_cache_that_is_too_small(model, monkeypatch, runner, speculate):
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 16)
    prompts = random_prompts(3, 50, 77, 130, 64)
    params = [scoring(i, 70, temperature=1.0, seed=i) for i in range(5)]
    engine = Engine(model, speculate=speculate, max_running=4, cache_bytes=memory(4, 6, speculate))
    outputs = engine.generate(prompts, params)
    assert engine.stats()["preemptions"] > 0
    for k, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        assert_all_are(output, model, prompt, k)
    assert_same(outputs, Engine(model).generate(prompts, params))


def test_all_are_told_by_the_same_weights(model, monkeypatch, runner):
    cut_to(monkeypatch, ROWS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    engine = Engine(copy.deepcopy(model))
    short, long = random_prompts(5, 40)
    requests = [engine.submit(prompt, scoring(2, 9)) for prompt in (short, long)]
    for _ in range(2):
        engine.step()
    engine.update_weights(other.state_dict())
    run_all(engine)
    assert_all_are(requests[0].output(), model, short, 2)  # known by then: they stay
    assert_all_are(requests[1].output(), other, long, 2)


def test_what_ends_early_tells_what_it_knows(model, monkeypatch, runner):
    cut_to(monkeypatch, ROWS)
    engine = Engine(model, max_running=1)
    (prompt,) = random_prompts(40)
    requests = [engine.submit(prompt, scoring(2)) for _ in range(2)]
    for _ in range(2):
        engine.step()
    for request in requests:
        engine.cancel(request)
    some, none = (request.output().prompt_logprobs for request in requests)
    assert len(some) == 1 + 2 * ROWS
    assert_are(some, whole(model, prompt), prompt, 2)
    assert none == [None]

    passes, forward = iter(range(3)), engine.runner.forward
    monkeypatch.setattr(engine.runner, "forward", lambda step: (next(passes), forward(step))[1])
    failed = asyncio.run(engine.answer(prompt, scoring(2)))
    assert failed.finish_reason == "error"
    assert len(failed.prompt_logprobs) == 1 + 3 * ROWS
    assert_are(failed.prompt_logprobs, whole(model, prompt), prompt, 2)
    assert_all_are(Engine(model).generate([prompt], scoring(2))[0], model, prompt, 2)


def test_an_output_whose_sink_is_interrupted_comes_again_as_it_was(model, monkeypatch, runner):
    cut_to(monkeypatch, ROWS)
    engine, heard = Engine(model), []

    def sink(output):
        heard.append((output.finish_reason, output.prompt_logprobs[:]))
        if len(heard) == 1:
            raise KeyboardInterrupt

    (prompt,) = random_prompts(40)
    request = engine.submit(prompt, scoring(2), sink=sink)
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.cancel(request)
    run_all(engine)
    assert heard == [("cancelled", request.output().prompt_logprobs)] * 2
    assert len(request.output().prompt_logprobs) == 1 + ROWS


def test_a_prompt_as_long_as_the_context_leaves_room_for(model, runner):
    prompt, longer = random_prompts(1023, 1024)
    engine = Engine(model)
    assert_all_are(engine.generate([prompt], scoring(1))[0], model, prompt, 1)
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        engine.generate([longer], scoring(1))


@pytest.mark.parametrize("wrong", [-1, True, 1.0, "1"])
def test_a_wrong_number_is_named(wrong):
    with pytest.raises(ValueError, match=r"prompt_logprobs is .*: it must be None, or an integer"):
        SamplingParams(prompt_logprobs=wrong)


# Interrupts -------------------------------------------------------------------------------------------------------


class AnyOrder(LedgerRunner):
    """Gives logits in the order in which they are asked for."""

    def forward(self, step):
        logits, routes = super().forward(step)
        return logits[np.argsort(np.argsort(step.logits_rows))], routes


def begin(engine):
    """One whose prompt is read in several passes and stopped by another, that one, and others beside them."""
    prompts = [3] * 20 + [1, 2, 9], [4, 4], [5] * 9, [7, 8]
    params = [*(scoring(i, 2 + i % 2, temperature=i % 2, seed=i) for i in range(3)), params_of(3, 2)]
    listeners = [Listener() for _ in prompts]

    def submit():
        return [
            engine.submit(prompt, its, sink=sink) for prompt, its, sink in zip(prompts, params, listeners, strict=True)
        ]

    return engine._turns.run(submit), listeners


def go_through(engine, requests):
    """Passes with a request preempted while it reads its prompt, one cancelled, and the rest."""
    engine.step()
    if requests[0].slot >= 0:
        engine._in_turn(lambda: engine.core.scheduler.preempt(requests[0]))
    engine.step()
    engine.cancel(requests[2])
    run_all(engine)


@pytest.mark.parametrize(("second", "stride"), [(False, 7), (True, 13)])
def test_an_interrupt_at_any_line_loses_and_repeats_nothing(monkeypatch, second, stride):
    cut_to(monkeypatch, 5, VOCABULARY)
    engine = make_ledger_engine(slots=2, pages=7, speculate=2)
    engine.runner = engine.core.runner = AnyOrder(CONFIG, engine.runner.cache)
    engine.core.lengths.choose = lambda _: 2
    line, is_through = 1, False
    while not is_through:
        requests, listeners = begin(engine)
        with (interrupts := Interrupts(line)):
            go_through(engine, requests)
        is_through = interrupts.lines > 0
        engine.stats()  # mends
        if second:
            with Interrupts(1 + line % 97):
                run_all(engine)
        run_all(engine)
        for request, listener in zip(requests, listeners, strict=True):
            assert_is_right(request)
            reported, prompt = request.output().prompt_logprobs, request.text[: request.prompt_tokens]
            assert all(heard.prompt_logprobs == reported for heard in listener.outputs)
            if request.params.prompt_logprobs is None:
                assert reported is None
                continue
            assert request.is_cancelled or len(reported) == len(prompt)
            logits = torch.stack([next_logits(prompt[:n], WINDOW) for n in range(1, len(prompt))])
            assert_are(reported, logits.log_softmax(-1), prompt, request.params.prompt_logprobs)
        assert_nothing_is_left(engine)
        line += stride
    assert line > 1000
    assert engine.stats()["preemptions"] > 0
