"""The engine over real models: against generation without a cache, transformers, and itself from scratch."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracles import CONFIG, assert_same, greedy_without_cache, memory, random_prompts
from torch.testing import assert_close

from mimoflash.config import DENSE, GLOBAL, ModelConfig
from mimoflash.engine import Engine, Grammar, SamplingParams
from mimoflash.engine.cache import PAGE
from mimoflash.engine.speculation import DraftLength
from mimoflash.model import Transformer
from mimoflash.text import train_tokenizer

pytestmark = pytest.mark.usefixtures("runner")


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


def test_the_cache_is_as_large_as_it_may_be_and_needs_to_be(model):
    whole = Engine(model, max_running=3).runner.cache
    assert (whole.slots, whole.pages) == (3, 3 * 1024 // PAGE)  # full context for all
    small = Engine(model, max_running=3, cache_bytes=memory(3, 5)).runner.cache
    assert (small.slots, small.pages) == (3, 5)
    tight = Engine(model, max_running=64, cache_bytes=memory(2, 2)).runner.cache
    assert tight.slots < 64
    assert tight.bytes() <= memory(2, 2)


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


def test_an_error_ends_a_stream_loudly(model):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        list(Engine(broken).stream([1, 2, 3]))


def test_equal_seeds_on_other_prompts_draw_independently(model):
    """Where every token is as likely, only the noise tells answers apart."""
    uniform = copy.deepcopy(model)
    uniform.lm_head.weight.data.zero_()
    prompts, params = [[i, i + 1] for i in range(60)], SamplingParams(max_tokens=5, temperature=1.0, seed=3)
    outputs = [tuple(out.tokens) for out in Engine(uniform).generate(prompts, params)]
    assert len(set(outputs)) == 60
    assert [tuple(out.tokens) for out in Engine(uniform, speculate=3).generate(prompts, params)] == outputs


def test_the_tokenizers_end_tokens_and_the_models_all_end():
    tokenizer = train_tokenizer(["abc def ghi"] * 30, 128 * 3)
    inside = max(tokenizer.stop_ids) + 1
    for vocabulary, own in ((inside, 5), (inside + 64, (5, 6)), (64, 5), (64, None)):
        network = Transformer(dataclasses.replace(CONFIG, vocab_size=vocabulary, eos_token_id=own))
        models = {own} - {None} if not isinstance(own, tuple) else set(own)
        assert Engine(network, tokenizer).core.stop_ids == {i for i in tokenizer.stop_ids | models if i < vocabulary}
    params = SamplingParams(max_tokens=4, grammar=Grammar.regex("[a-z]+"))
    network = Transformer(dataclasses.replace(CONFIG, vocab_size=inside - 1))  # without the tokenizer's end token
    (out,) = Engine(network, tokenizer).generate([[1]], params)
    assert out.tokens
    assert out.error is None
