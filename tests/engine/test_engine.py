import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, HybridCache, SamplingParams
from mimoflash.engine import engine as engine_module
from mimoflash.engine.sampling import sample
from mimoflash.engine.speculation import replay_speculation
from mimoflash.model import Transformer
from mimoflash.text import train_tokenizer

CONFIG = ModelConfig.tiny(num_nextn_predict_layers=2, initializer_range=0.3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@torch.no_grad()
def greedy_without_cache(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@settings(max_examples=10)
@given(prompts=st.lists(st.lists(st.integers(0, 127), min_size=1, max_size=40), min_size=1, max_size=5))
def test_greedy_with_the_cache_equals_no_cache(prompts):
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    outputs = Engine(model).generate(prompts, SamplingParams(max_tokens=12))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.tokens == greedy_without_cache(model, prompt, 12)
        assert output.finish_reason == "length"


def test_long_prompts_go_in_chunks(model, monkeypatch):
    prompts = [torch.randint(0, 128, (n,)).tolist() for n in (3, 50, 77)]
    whole = Engine(model).generate(prompts, SamplingParams(max_tokens=5))
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    chunked = Engine(model).generate(prompts, SamplingParams(max_tokens=5))
    assert [o.tokens for o in whole] == [o.tokens for o in chunked]
    assert all(torch.equal(a.routes, b.routes) for a, b in zip(whole, chunked, strict=True))


def test_transformers_generates_the_same(model):
    transformers = pytest.importorskip("transformers")
    fields = ("rope_theta", "swa_rope_theta", "sliding_window_size")
    raw = {k: v for k, v in model.config.to_dict().items() if k not in fields}
    theirs = transformers.MiMoV2FlashForCausalLM(transformers.MiMoV2FlashConfig(**raw)).eval()
    tensors = {k.replace("attention_sink_bias", "sinks"): v for k, v in model.state_dict().items() if ".mtp." not in k}
    theirs.load_state_dict(tensors)
    prompt = torch.randint(0, 128, (1, 21))
    want = theirs.generate(prompt, max_new_tokens=64, do_sample=False)[0, 21:].tolist()
    assert Engine(model).generate([prompt[0].tolist()], SamplingParams(max_tokens=64))[0].tokens == want


def test_log_probabilities_and_routes_are_the_models(model):
    prompt = torch.randint(0, 128, (15,)).tolist()
    params = SamplingParams(max_tokens=20, temperature=0.7, top_p=0.8, seed=3)
    (out,) = Engine(model).generate([prompt], params)
    tokens = torch.tensor([prompt + out.tokens])
    with torch.no_grad():
        run = model.trunk(tokens[:, :-1])
        logp = model.logits(run.hidden)[0, 14:].log_softmax(-1)
    assert torch.equal(out.routes, run.routes[0])
    assert_close(torch.tensor(out.logprobs), logp.gather(1, tokens[0, 15:, None])[:, 0], atol=1e-4, rtol=1e-4)
    for row, token, reported in zip(logp, out.tokens, out.sampling_logprobs, strict=True):
        p = (row / 0.7).softmax(-1)
        likelier = p[p > p[token]].sum()
        assert likelier < 0.8  # the token is in the nucleus
        order = p.sort(descending=True).values
        kept = order[(order.cumsum(0) - order) < 0.8].sum()
        assert reported == pytest.approx(float((p[token] / kept).log()), abs=1e-3)


def test_a_seed_fixes_the_tokens_whatever_runs_beside(model):
    params = [SamplingParams(max_tokens=9 + i, temperature=1.0, seed=i) for i in range(6)]
    prompts = [torch.randint(0, 128, (5 + i,)).tolist() for i in range(6)]
    together = Engine(model).generate(prompts, params)
    alone = [Engine(model).generate([q], p)[0] for q, p in zip(prompts, params, strict=True)]
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    assert len({tuple(o.tokens[:9]) for o in together}) > 1


def test_sampling_follows_temperature_and_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count, temperature, top_p = 20_000, 0.8, 0.9
    generator = torch.Generator().manual_seed(0)
    tokens, _, logp = sample(
        logits.expand(count, 4), torch.full((count,), temperature), torch.full((count,), top_p),
        torch.rand(count, generator=generator),
    )
    p = (logits.double() / temperature).softmax(-1)
    kept = [i for i in range(4) if p[:i].sum() < top_p]
    want = torch.tensor([p[i] if i in kept else 0.0 for i in range(4)])
    want = want / want.sum()
    seen = Counter(tokens.tolist())
    chi2 = sum((seen[i] - count * want[i]) ** 2 / (count * want[i]) for i in kept)
    assert set(seen) == set(kept)
    assert chi2 < 13.8  # 2 degrees of freedom, p = 0.001
    assert_close(logp, want.float().log()[tokens])


def test_a_draw_that_rounds_up_to_one_stays_in_the_nucleus():
    logits = torch.tensor([[5.0, 4.0, -20.0, -30.0]])
    token, _, logp = sample(logits, torch.tensor([1.0]), torch.tensor([0.9]), torch.tensor([1.0]))
    assert token.item() in (0, 1)
    assert torch.isfinite(logp).all()


def test_ends_at_a_stop_string():
    tokenizer = train_tokenizer(["abc def ghi"] * 30, 128 * 3)
    network = Transformer(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, eos_token_id=None)).eval()
    prompt = tokenizer.encode("abc")
    free = Engine(network).generate([prompt], SamplingParams(max_tokens=30))[0].tokens
    stop = tokenizer.decode(free[3:6])
    engine = Engine(network, tokenizer)
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


def test_stream_gives_what_generate_gives(model):
    params = SamplingParams(max_tokens=7, temperature=1.0, seed=1)
    assert list(Engine(model).stream([1, 2, 3], params)) == Engine(model).generate([[1, 2, 3]], params)[0].tokens


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_replayed_speculation_is_what_a_draft_and_verify_loop_gains(layers):
    torch.manual_seed(1)
    model = Transformer(ModelConfig.tiny(num_nextn_predict_layers=layers, vocab_size=2, initializer_range=0.3)).eval()
    prompt = [1, 0, 1, 1]
    generated = greedy_without_cache(model, prompt, 60)
    text, place, gains = [*prompt, *generated], len(prompt) - 1, []
    with torch.no_grad():
        while place + 1 < len(text):  # the loop itself: draft a chain, verify, keep what agrees
            known = text[: place + 2]
            hidden = model.trunk(torch.tensor([known])).hidden
            drafted = list(known)
            for k in range(layers):
                nexts = torch.tensor([drafted[1 + k : 2 + k + place]])
                positions = torch.arange(place + 1)[None]
                out = model.mtp(k, hidden[:, : place + 1], nexts, positions)
                drafted.append(int(model.lm_head(out)[0, -1].argmax()))
            agree = [a == b for a, b in zip(drafted[place + 2 :], text[place + 2 :], strict=False)]
            gained = 1 + len(list(itertools.takewhile(bool, agree)))
            gains.append(gained)
            place += gained
    assert replay_speculation(model, prompt, generated) == gains
    assert sum(gains) == 60
    if layers:
        assert max(gains) > 1


def test_window_layers_keep_the_window_and_widths_their_own():
    config = ModelConfig.tiny(num_nextn_predict_layers=1)
    model, cache = Transformer(config), HybridCache(config, rows=1)
    with torch.no_grad():
        for start, end in itertools.pairwise([0, 5, 64, 128]):
            model(torch.randint(0, 128, (1, end - start)), cache=cache)
            cache.advance(torch.tensor([end]))
    window_values = 2 * (24 + 16) * 9  # KV heads x (key + value width) x window
    assert cache.bytes("window") == 3 * window_values * 4  # two layers and the MTP layer, float32
    assert cache.bytes("global") == 2 * 1 * (24 + 16) * 128 * 4
    assert cache.bytes() == config.kv_bytes(128, bytes_per_value=4, mtp_layers=1)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], None, "prompt 0 is empty"),
        ([[1], [128]], None, "prompt 1 has a token outside"),
        ([[1]], [SamplingParams()] * 2, "2 SamplingParams for 1"),
        ([[1]], SamplingParams(stop="x"), "need a tokenizer"),
    ],
)
def test_bad_requests_are_named(model, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        Engine(model).generate(prompts, params)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"stop": [""]}])
def test_bad_sampling_parameters_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
