"""Prompts cut into chunks, requests stopped and begun again, and what later requests go on from: all give the same."""

import pytest
import torch
from oracles import assert_same, memory, random_prompts

from mimoflash.config import DENSE, GLOBAL, SPARSE, ModelConfig
from mimoflash.engine import Engine, SamplingParams, reuse, scheduler
from mimoflash.engine.cache import PAGE
from mimoflash.model import Transformer

pytestmark = pytest.mark.usefixtures("runner")


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


def test_routes_are_the_outputs_own(model):
    engine = Engine(model)
    first = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=8))[0]
    kept = first.routes.clone()
    first.routes.fill_(7)
    second = engine.generate([[1, 2, 3, *first.tokens, 4]], SamplingParams(max_tokens=2))[0]
    assert second.cached_tokens > 3
    assert torch.equal(second.routes[: len(kept)], kept)
