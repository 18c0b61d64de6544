"""An engine's weights: taken over while it runs, and in other types."""

import pytest
import torch
from oracles import CONFIG, assert_same, greedy_without_cache, random_prompts

from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer

pytestmark = pytest.mark.usefixtures("runner")


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
