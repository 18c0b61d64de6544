"""The engine over real models: against generation without a cache, transformers, and itself from scratch."""

import copy
import dataclasses
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from mimoflash.config import DENSE, GLOBAL, SPARSE, ModelConfig
from mimoflash.engine import Engine, SamplingParams, backend, reuse, scheduler
from mimoflash.engine.cache import PAGE, page_bytes, slot_bytes
from mimoflash.engine.speculation import DraftLength
from mimoflash.kernels import native
from mimoflash.model import Transformer
from mimoflash.text import train_tokenizer

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=3, initializer_range=0.3)
FLOAT = torch.float32


@pytest.fixture(params=["torch", "native"], autouse=True)
def runner(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(backend, "_native_is_available", lambda: False)
    elif not native.available():
        pytest.skip("no compiled kernels")
    return request.param


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@pytest.fixture(scope="module")
def drafting():
    """A model of sixteen words whose MTP layers have seen some of what it writes: they are right now and then."""
    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=16))
    text = torch.randint(0, 16, (16, 4))
    with torch.no_grad():
        for _ in range(40):
            text = torch.cat([text, (model(text)[:, -1] / 0.5).softmax(-1).multinomial(1)], 1)
        hidden = model.trunk(text).hidden
    optimizer = torch.optim.Adam(model.model.mtp.parameters(), lr=1e-2)
    for _ in range(60):
        drafts = model.mtp_hidden(hidden, text)
        losses = [
            cross_entropy(model.lm_head(h[:, : -2 - k]).flatten(0, 1), text[:, 2 + k :].flatten())
            for k, h in enumerate(drafts)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def greedy_without_cache(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def random_prompts(*lengths, vocabulary=128):
    return [torch.randint(0, vocabulary, (n,)).tolist() for n in lengths]


def memory(slots, pages, speculate=0, config=CONFIG):
    return slots * slot_bytes(config, speculate, FLOAT) + pages * page_bytes(config, FLOAT)


def assert_same(outputs, others):
    """The same tokens and routes, and log-probabilities up to rounding."""
    for a, b in zip(outputs, others, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.routes.sort(-1).values, b.routes.sort(-1).values)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.sampling_logprobs == pytest.approx(b.sampling_logprobs, abs=1e-4)


# -- what is generated ------------------------------------------------------------------------------------------------


@settings(max_examples=6, phases=[Phase.generate])
@given(st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=40), min_size=1, max_size=5), st.integers(0, 3))
def test_greedy_equals_no_cache(model, prompts, speculate):
    outputs = Engine(model, speculate=speculate).generate(prompts, SamplingParams(max_tokens=12))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.tokens == greedy_without_cache(model, prompt, 12)
        assert output.finish_reason == "length"
        assert output.routes.shape == (len(prompt) + 11, 3, 2)


@pytest.mark.parametrize("speculate", [0, 3])
def test_transformers_generates_the_same(model, speculate):
    transformers = pytest.importorskip("transformers")
    fields = ("rope_theta", "swa_rope_theta", "sliding_window_size")
    raw = {k: v for k, v in model.config.to_dict().items() if k not in fields}
    theirs = transformers.MiMoV2FlashForCausalLM(transformers.MiMoV2FlashConfig(**raw)).eval()
    tensors = {k.replace("attention_sink_bias", "sinks"): v for k, v in model.state_dict().items() if ".mtp." not in k}
    theirs.load_state_dict(tensors)
    (prompt,) = random_prompts(21)
    want = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, 21:].tolist()
    assert Engine(model, speculate=speculate).generate([prompt], SamplingParams(max_tokens=64))[0].tokens == want


@pytest.mark.parametrize("speculate", [0, 3])
def test_log_probabilities_and_routes_are_the_models(model, speculate):
    (prompt,) = random_prompts(15)
    params = SamplingParams(max_tokens=20, temperature=0.7, top_p=0.8, seed=3, top_logprobs=4)
    (out,) = Engine(model, speculate=speculate).generate([prompt], params)
    tokens = torch.tensor([prompt + out.tokens])
    with torch.no_grad():
        run = model.trunk(tokens[:, :-1])
        logp = model.logits(run.hidden)[0, 14:].log_softmax(-1)
    assert torch.equal(out.routes.long().sort(-1).values, run.routes[0].sort(-1).values)
    assert out.routes.dtype == torch.uint8
    assert_close(torch.tensor(out.logprobs), logp.gather(1, tokens[0, 15:, None])[:, 0], atol=1e-4, rtol=1e-4)
    for row, token, reported, likeliest in zip(logp, out.tokens, out.sampling_logprobs, out.top_logprobs, strict=True):
        p = (row / 0.7).softmax(-1)
        assert p[p > p[token]].sum() < 0.8  # the token is in the nucleus
        order = p.sort(descending=True).values
        kept = order[(order.cumsum(0) - order) < 0.8].sum()
        assert reported == pytest.approx(float((p[token] / kept).log()), abs=1e-3)
        assert [token for token, _ in likeliest] == row.topk(4).indices.tolist()
        assert [value for _, value in likeliest] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_a_model_without_experts_has_no_routes():
    config = ModelConfig.tiny(layer_types=(GLOBAL,) * 2, mlp_layer_types=(DENSE,) * 2)
    (out,) = Engine(Transformer(config)).generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    assert out.routes.numel() == 0
    assert len(out.routes) == 6


def test_a_seed_fixes_the_tokens_whatever_runs_beside(model):
    params = [SamplingParams(max_tokens=9 + i, temperature=1.0, seed=i) for i in range(6)]
    prompts = random_prompts(*range(5, 11))
    together = Engine(model).generate(prompts, params)
    alone = [Engine(model).generate([q], p)[0] for q, p in zip(prompts, params, strict=True)]
    assert_same(together, alone)
    assert len({tuple(o.tokens[:9]) for o in together}) > 1


def test_without_a_seed_each_time_is_another(model):
    params = SamplingParams(max_tokens=20, temperature=1.0)
    first, second = Engine(model).generate([[1, 2, 3]] * 2, params)
    assert first.tokens != second.tokens


# -- speculation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", [1, 2, 3, "changing"])
def test_speculation_changes_nothing_but_the_number_of_passes(drafting, monkeypatch, temperature, drafts):
    prompts = random_prompts(1, 7, 30, 100, vocabulary=16)
    params = [
        SamplingParams(max_tokens=40 + i, temperature=temperature, seed=i, repetition_penalty=1.1 if i == 3 else 1.0)
        for i in range(4)
    ]
    plain_engine = Engine(drafting)
    plain = plain_engine.generate(prompts, params)
    steps = iter(range(10**6))
    changing = [3, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 1, 3]
    chosen = (lambda *_: changing[next(steps) % 13]) if drafts == "changing" else (lambda *_: drafts)
    monkeypatch.setattr(DraftLength, "choose", chosen)
    engine = Engine(drafting, speculate=3)
    speculated = engine.generate(prompts, params)
    assert_same(speculated, plain)
    stats = engine.stats()
    assert stats["passes"] < plain_engine.stats()["passes"] or drafts == "changing"
    assert 0 < stats["accepted"][0] < stats["drafted"][0]
    assert 1.0 < max(o.accept_length for o in speculated) <= 4.0
    assert all(o.accept_length == 1.0 for o in plain)


def test_a_stop_among_right_drafts_ends_the_answer(drafting, monkeypatch):
    monkeypatch.setattr(DraftLength, "choose", lambda *_: 3)
    (prompt,) = random_prompts(20, vocabulary=16)
    (free,) = Engine(drafting).generate([prompt], SamplingParams(max_tokens=60))
    for stop in set(free.tokens[5:]):
        params = SamplingParams(max_tokens=60, stop_token_ids=[stop])
        (out,) = Engine(drafting, speculate=3).generate([prompt], params)
        assert out.tokens == free.tokens[: free.tokens.index(stop) + 1]
        assert out.finish_reason == "stop"
        assert len(out.routes) == len(prompt) + len(out.tokens) - 1


# -- how it is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculate", [0, 3])
def test_prompts_in_chunks_and_preempted_requests_give_the_same(model, monkeypatch, speculate):
    prompts = random_prompts(3, 50, 77, 130, 64)
    params = [SamplingParams(max_tokens=70, temperature=1.0, seed=i) for i in range(5)]
    whole = Engine(model, speculate=speculate).generate(prompts, params)
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 16)
    engine = Engine(model, speculate=speculate, max_running=4, cache_bytes=memory(4, 6, speculate))
    assert_same(engine.generate(prompts, params), whole)
    assert engine.stats()["preemptions"] > 0


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("dropped", [0, 1, 5])
def test_a_next_turn_runs_only_what_is_new(model, speculate, dropped):
    """`dropped`: tokens at the end of the answer that the next prompt does not repeat (reasoning, say)."""
    (prompt,), (new,) = random_prompts(90), random_prompts(40)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=5)
    engine = Engine(model, speculate=speculate)
    (first,) = engine.generate([prompt], params)
    text = prompt + first.tokens[: 30 - dropped] + new
    ran = engine.stats()["tokens_run"]
    (second,) = engine.generate([text], SamplingParams(max_tokens=1))
    kept = 90 + 29 if dropped <= 1 else 90  # the last token of an answer has not run; rings hold the ends of both
    assert second.cached_tokens == kept
    assert engine.stats()["tokens_run"] - ran == len(text) - kept
    (third,) = engine.generate([text + second.tokens + new], params)
    fresh = Engine(model, speculate=speculate)
    assert_same([second], fresh.generate([text], SamplingParams(max_tokens=1)))
    assert_same([third], Engine(model).generate([text + second.tokens + new], params))
    assert third.cached_tokens == len(text)


def test_a_model_of_global_layers_goes_on_from_anywhere():
    config = ModelConfig.tiny(layer_types=(GLOBAL,) * 3, mlp_layer_types=(DENSE, SPARSE, SPARSE), initializer_range=0.3)
    model = Transformer(config).eval()
    engine, (prompt,), (new,) = Engine(model), random_prompts(90), random_prompts(10)
    (first,) = engine.generate([prompt], SamplingParams(max_tokens=30))
    text = prompt + first.tokens[:17] + new
    (second,) = engine.generate([text], SamplingParams(max_tokens=20))
    assert second.cached_tokens == 90 + 17
    assert_same([second], Engine(model).generate([text], SamplingParams(max_tokens=20)))


@pytest.mark.parametrize("speculate", [0, 3])
def test_shared_prefixes_change_nothing(model, monkeypatch, speculate):
    for module in (reuse, scheduler):
        monkeypatch.setattr(module, "BLOCK", PAGE)
    (system,) = random_prompts(150)
    prompts = [system + new for new in random_prompts(5, 30, 1)]
    engine = Engine(model, speculate=speculate, share_prefixes=True)
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    outputs = [engine.generate([prompt], params)[0] for prompt in prompts]
    assert [o.cached_tokens for o in outputs] == [0, 2 * PAGE, 2 * PAGE]
    assert_same(outputs, [Engine(model).generate([prompt], params)[0] for prompt in prompts])


# -- ends -------------------------------------------------------------------------------------------------------------


def test_ends_at_a_stop_string():
    tokenizer = train_tokenizer(["abc def ghi"] * 30, 128 * 3)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, eos_token_id=None)
    network, prompt = Transformer(config).eval(), tokenizer.encode("abc")
    free = Engine(network).generate([prompt], SamplingParams(max_tokens=30, ignore_stop_tokens=True))[0].tokens
    stop = tokenizer.decode(free[3:6])
    for speculate in (0, 3):
        engine = Engine(network, tokenizer, speculate=speculate)
        (out,) = engine.generate([prompt], SamplingParams(max_tokens=30, stop=stop, ignore_stop_tokens=True))
        assert out.finish_reason == "stop"
        assert stop in tokenizer.decode(out.tokens)
        assert stop not in tokenizer.decode(out.tokens[:-1])


def test_ends_at_the_models_end_token(model):
    free = Engine(model).generate([[1, 2]], SamplingParams(max_tokens=30))[0].tokens
    end = free[7]
    ending = Transformer(dataclasses.replace(CONFIG, eos_token_id=end))
    ending.load_state_dict(model.state_dict())
    (out,) = Engine(ending).generate([[1, 2]], SamplingParams(max_tokens=30))
    assert out.tokens == free[: free.index(end) + 1]
    assert out.finish_reason == "stop"
    (out,) = Engine(ending).generate([[1, 2]], SamplingParams(max_tokens=30, ignore_stop_tokens=True))
    assert out.tokens == free


def test_broken_logits_end_a_request_with_an_error():
    broken = Transformer(CONFIG)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    (out,) = Engine(broken).generate([[1, 2]], SamplingParams(max_tokens=5))
    assert (out.tokens, out.finish_reason) == ([], "error")
    assert "not finite" in out.error


# -- stream, interrupts, threads --------------------------------------------------------------------------------------


def test_stream_gives_what_generate_gives(drafting):
    params = SamplingParams(max_tokens=17, temperature=1.0, seed=1)
    for speculate in (0, 3):
        engine = Engine(drafting, speculate=speculate)
        assert list(engine.stream([1, 2, 3], params)) == Engine(drafting).generate([[1, 2, 3]], params)[0].tokens


def test_closing_a_stream_cancels_its_request(model):
    engine = Engine(model)
    stream = engine.stream([1, 2, 3], SamplingParams(max_tokens=100))
    assert len([next(stream) for _ in range(3)]) == 3
    assert engine.stats()["running"] == 1
    stream.close()
    stats = engine.stats()
    assert (stats["running"], stats["kept"], sum(stats["cache_used_bytes"].values())) == (0, 0, 0)


@pytest.fixture
def interruptible():
    """Shells start what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.mark.parametrize("after", range(0, 120, 7))
def test_an_interrupt_anywhere_in_a_step_loses_nothing(drafting, monkeypatch, after):
    """Raised at some line of the engine's own code, as a signal would be."""
    monkeypatch.setattr(DraftLength, "choose", lambda *_: 2)
    engine = Engine(drafting, speculate=2)
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=4, frequency_penalty=0.1)
    requests = [engine.submit(prompt, params) for prompt in ([3, 4, 5], [1], [2] * 40)]
    for _ in range(3):
        engine.step()
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if "mimoflash/engine/" not in frame.f_code.co_filename or frame.f_code.co_name in ("recover", "_recovery"):
            return None
        lines += event == "line"
        if event == "line" and lines == 5 + after * 4:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        while engine.step():
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    while engine.step():
        pass
    assert_same([r.output() for r in requests], Engine(drafting).generate([[3, 4, 5], [1], [2] * 40], params))
    while engine.core.scheduler.drop_kept():
        pass
    assert sum(engine.stats()["cache_used_bytes"].values()) == 0


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


# -- weights, memory, errors ------------------------------------------------------------------------------------------


def test_new_weights_are_taken_over_in_place(model):
    torch.manual_seed(9)
    served, other = Transformer(CONFIG).eval(), Transformer(CONFIG).eval()
    served.load_state_dict(model.state_dict())
    engine, params = Engine(served, speculate=1), SamplingParams(max_tokens=10)
    (before,) = engine.generate([[1, 2, 3]], params)
    running = engine.submit([4, 5, 6], SamplingParams(max_tokens=12))
    for _ in range(5):
        engine.step()
    had = list(running.text)
    routes = served.trunk(torch.tensor([had[:-1]])).routes[0].sort(-1).values
    address = served.lm_head.weight.data_ptr()
    engine.update_weights(other.state_dict())
    assert served.lm_head.weight.data_ptr() == address
    assert engine.stats()["kept"] == 0
    while running.finish_reason is None:
        engine.step()
    assert running.text[: len(had)] == had  # goes on from its text, under the new weights alone
    assert running.text[len(had) :] == greedy_without_cache(other, had, 12 - (len(had) - 3))
    kept = running.output().routes[: len(routes)]
    assert torch.equal(kept.long().sort(-1).values, routes)  # those that its tokens were sampled by
    (after,) = engine.generate([[1, 2, 3, *before.tokens, 9]], params)
    assert after.cached_tokens == 0
    assert_same([after], Engine(other).generate([[1, 2, 3, *before.tokens, 9]], params))
    with torch.no_grad():
        served.load_state_dict(model.state_dict())
    engine.update_weights()  # they were changed from outside
    assert_same(engine.generate([[1, 2, 3]], params), [before])


@pytest.mark.parametrize(("state", "message"), [({"x": torch.ones(1)}, "no tensor 'x'"), (None, "lm_head.weight is")])
def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(model, state, message):
    engine = Engine(model)
    before = model.model.norm.weight.clone()
    state = state or {"model.norm.weight": before + 1, "lm_head.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=message):
        engine.update_weights(state)
    assert torch.equal(model.model.norm.weight, before)


def test_weights_in_bf16(model):
    rounded = Transformer(CONFIG)
    rounded.load_state_dict({k: v.bfloat16().float() if "gate" not in k else v for k, v in model.state_dict().items()})
    (prompt,) = random_prompts(30)
    engine = Engine(model, dtype="bf16")
    assert engine.runner.cache.dtype == torch.bfloat16
    (out,) = engine.generate([prompt], SamplingParams(max_tokens=1, top_logprobs=5))
    (want,) = Engine(rounded).generate([prompt], SamplingParams(max_tokens=1, top_logprobs=5))
    assert dict(out.top_logprobs[0])[want.tokens[0]] == pytest.approx(want.logprobs[0], abs=0.2)


def test_the_cache_is_as_large_as_it_may_be_and_needs_to_be(model):
    whole = Engine(model, max_running=3).runner.cache
    assert (whole.slots, whole.pages) == (3, 3 * 1024 // PAGE)  # full context for all
    small = Engine(model, max_running=3, cache_bytes=memory(3, 5)).runner.cache
    assert (small.slots, small.pages) == (3, 5)
    tight = Engine(model, max_running=64, cache_bytes=memory(2, 2)).runner.cache
    assert tight.slots < 64
    assert tight.bytes() <= memory(2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculate": 4}, "0 to 3"),
        ({"speculate": -1}, "0 to 3"),
        ({"dtype": "float8"}, "must be one of float32, bf16, int8, int4"),
        ({"dtype": "fp8"}, "on a GPU"),
        ({"max_running": 0}, "max_running is 0"),
        ({"cache_bytes": 1000}, "cache_bytes is 1000"),
    ],
)
def test_what_an_engine_cannot_be_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **arguments)


def test_what_the_model_or_the_machine_lacks_is_named(model, runner):
    one = Transformer(dataclasses.replace(CONFIG, num_nextn_predict_layers=1))
    with pytest.raises(ValueError, match="the model has 1 MTP layers"):
        Engine(one, speculate=2)
    if runner == "torch":
        with pytest.raises(ValueError, match="needs the compiled CPU kernels"):
            Engine(model, dtype="int8")


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], None, "prompt 0 is empty"),
        ([[1], [128]], None, "prompt 1 has a token outside"),
        ([[1], [-1]], None, "prompt 1 has a token outside"),
        ([[1]], [SamplingParams()] * 2, "2 SamplingParams for 1"),
        ([[1]], SamplingParams(stop="x"), "need a tokenizer"),
        ([[1] * 1024], None, "prompt 0 has 1024 tokens; the model's context of 1024"),
        ([[1]], SamplingParams(stop_token_ids=[128]), "stop_token_ids names token 128"),
    ],
)
def test_bad_requests_are_named(model, prompts, params, message):
    engine = Engine(model)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, params)
    assert engine.stats()["waiting"] == 0


def test_a_closed_engine_has_ended_everything(model):
    engine = Engine(model)
    engine.generate([[1, 2]], SamplingParams(max_tokens=3))
    request = engine.submit([1, 2, 3], SamplingParams(max_tokens=50))
    engine.step()
    engine.close()
    assert request.output().finish_reason == "cancelled"
    assert sum(engine.stats()["cache_used_bytes"].values()) == 0
    with pytest.raises(ValueError, match="closed"):
        engine.submit([1])


def test_a_sink_that_fails_costs_its_own_events_only(model):
    def sink(event):
        raise RuntimeError("foreign code")

    engine = Engine(model)
    bad = engine.submit([1, 2, 3], SamplingParams(max_tokens=5), sink=sink)
    good = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0]
    while bad.finish_reason is None:
        engine.step()
    assert bad.output().tokens == good.tokens


def test_routes_are_the_outputs_own(model):
    engine = Engine(model)
    first = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=8))[0]
    kept = first.routes.clone()
    first.routes.fill_(7)
    second = engine.generate([[1, 2, 3, *first.tokens, 4]], SamplingParams(max_tokens=2))[0]
    assert second.cached_tokens > 3
    assert torch.equal(second.routes[: len(kept)], kept)


def test_an_error_ends_a_stream_loudly(model):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        list(Engine(broken).stream([1, 2, 3]))
