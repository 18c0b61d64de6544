"""The runner in PyTorch against the model over whole texts, which knows no cache."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.config import DENSE, GLOBAL, SPARSE, WINDOW, ModelConfig
from mimoflash.engine import HybridCache
from mimoflash.engine.runner import NO_FILL, RECENT, DraftNoise, Step, TorchRunner
from mimoflash.engine.sampling import exponential_noise
from mimoflash.model import Transformer
from mimoflash.model.moe import Router

DRAFTS = 3
CONFIGS = {
    "hybrid": ModelConfig.tiny(num_nextn_predict_layers=DRAFTS, initializer_range=0.3),
    "other widths": ModelConfig.tiny(
        num_nextn_predict_layers=DRAFTS, initializer_range=0.3, sliding_window=1, global_sink=True, head_dim=32,
        num_attention_heads=6, num_key_value_heads=3, swa_num_attention_heads=2, swa_num_key_value_heads=1,
        swa_head_dim=48, swa_v_head_dim=8, layer_types=(WINDOW, GLOBAL, WINDOW, WINDOW), partial_rotary_factor=0.5,
    ),
    "windows": ModelConfig.tiny(
        num_nextn_predict_layers=DRAFTS, initializer_range=0.3, layer_types=(WINDOW,) * 2,
        mlp_layer_types=(DENSE, SPARSE),
    ),
    "global, dense": ModelConfig.tiny(
        num_nextn_predict_layers=DRAFTS, initializer_range=0.3, layer_types=(GLOBAL,) * 2, mlp_layer_types=(DENSE,) * 2
    ),
}


def make(name="hybrid", slots=4):
    torch.manual_seed(0)
    model = Transformer(CONFIGS[name]).eval()
    with torch.no_grad():
        for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if "norm" in key or "bias" in key:  # not as they are at first
                tensor.add_(torch.randn_like(tensor) * 0.3)
    cache = HybridCache(model.config, slots=slots, pages=24, drafts=DRAFTS)
    for layer in cache.layers:  # what was never written may be anything
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    return model, TorchRunner(model, cache)


def ints(values):
    return np.array(values, np.int32)


class Text:
    """A text in a slot: run piece by piece, and as a whole by the model."""

    def __init__(self, model, runner, tokens):
        self.tokens, self.runner, self.slot, self.run = list(tokens), runner, runner.cache.take_slot(), 0
        assert runner.cache.reserve(self.slot, len(tokens) + DRAFTS + 1)
        with torch.no_grad():
            out = model.trunk(torch.tensor([self.tokens]))
            self.logits, self.routes = model.logits(out.hidden)[0], out.routes[0].sort(-1).values

    def ahead(self, count):
        following = self.tokens[self.run + count : self.run + count + DRAFTS]
        return following + [-1] * (DRAFTS - len(following))


def run(runner, pieces, drafts=(), fill=True):
    """Runs (text, count) side by side, the first ones with drafts after their token; returns logits by text."""
    drafts = [*drafts, *[[]] * (len(pieces) - len(drafts))]
    tokens = [[*t.tokens[t.run : t.run + n], *draft] for (t, n), draft in zip(pieces, drafts, strict=True)]
    total = sum(map(len, tokens))
    step = Step(
        ints([t.slot for t, _ in pieces]), ints([t.run for t, _ in pieces]), ints([len(x) for x in tokens]),
        ints(list(itertools.chain(*tokens))), ints(range(total)),
        ints([[NO_FILL] * DRAFTS if draft else t.ahead(n) for (t, n), draft in zip(pieces, drafts, strict=True)])
        if fill else None,
    )
    logits, routes = runner.forward(step)
    row = 0
    for (text, count), its in zip(pieces, tokens, strict=True):
        want = slice(text.run, text.run + count)
        assert_close(logits[row : row + count], text.logits[want], atol=2e-4, rtol=2e-4)
        if runner.model.config.moe_layers:
            assert torch.equal(routes[row : row + count].long().sort(-1).values, text.routes[want])
        row += len(its)
        text.run += count


@settings(max_examples=8, phases=[Phase.generate])  # shrinking would take minutes
@given(
    st.sampled_from(list(CONFIGS)), st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.lists(st.tuples(st.sets(st.integers(0, 3)), st.sampled_from([1, 2, 4, 5, 13, 70])), max_size=12),
)
def test_pieces_beside_others_give_what_the_whole_text_gives(name, lengths, schedule):
    model, runner = make(name)
    texts = [Text(model, runner, torch.randint(0, 128, (n,)).tolist()) for n in lengths]
    for who, most in [*schedule, ({0, 1, 2, 3}, 150)]:
        pieces = [(t, min(most + i, len(t.tokens) - t.run)) for i, t in enumerate(texts) if i in who]
        if pieces := [(t, count) for t, count in pieces if count]:
            run(runner, pieces)
    assert all(t.run == len(t.tokens) for t in texts)


def chain_of_drafts(model, tokens, count, pick=lambda logits, position: int(logits.argmax()), start=0):
    """Drafts after `tokens`, by whole passes over the text: what the MTP layers would say without a cache, had they
    begun at `start`."""
    known, place = list(tokens), len(tokens) - 2  # the trunk has run here, the last token is new
    with torch.no_grad():
        hidden = model.trunk(torch.tensor([known])).hidden[:, start : place + 1]
        for k in range(count):
            following = torch.tensor([known[start + 1 + k : place + 2 + k]])
            out = model.mtp(k, hidden, following, torch.arange(start, place + 1)[None])
            known.append(pick(model.lm_head(out)[0, -1], len(known)))
    return known[len(tokens) :]


def draft(runner, texts, count, temperature=0.0, seed=0):
    recent = [[-1] * max(0, RECENT - t.run - 1) + t.tokens[max(0, t.run + 1 - RECENT) : t.run + 1] for t in texts]
    noise = DraftNoise(np.full(len(texts), temperature, np.float32), np.full(len(texts), seed, np.uint64))
    slots, positions = ints([t.slot for t in texts]), ints([t.run - 1 for t in texts])
    return runner.draft(slots, positions, ints(recent), count, noise).tolist()


@settings(max_examples=8, phases=[Phase.generate])  # shrinking would take minutes
@given(st.sampled_from(list(CONFIGS)), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.data())
def test_drafts_are_those_of_the_chain_over_the_whole_text(name, lengths, data):
    """After prompts of any length, right and wrong drafts, and pauses that are short enough to catch up with."""
    model, runner = make(name)
    texts = [Text(model, runner, torch.randint(0, 128, (n + 30,)).tolist()) for n in lengths]
    for text, length in zip(texts, lengths, strict=True):
        for count in (length // 3, length - length // 3):  # two chunks
            if count:
                run(runner, [(text, count)])
    for _ in range(7):
        count = data.draw(st.integers(1, DRAFTS))
        drafts = draft(runner, texts, count)
        assert drafts == [chain_of_drafts(model, t.tokens[: t.run + 1], count) for t in texts]
        gained = [data.draw(st.integers(1, 1 + count)) for _ in texts]
        for text, g, its in zip(texts, gained, drafts, strict=True):  # drafts before are right, the others are wrong
            its[: g - 1] = text.tokens[text.run + 1 : text.run + g]
        run(runner, [(t, g) for t, g in zip(texts, gained, strict=True)],
            drafts=[[*its[g - 1 :], 0] for its, g in zip(drafts, gained, strict=True)])


def test_after_a_long_pause_drafts_come_from_what_has_run_since():
    model, runner = make()
    text = Text(model, runner, torch.randint(0, 128, (80,)).tolist())
    run(runner, [(text, 40)])
    draft(runner, [text], 3)
    for _ in range(20):
        run(runner, [(text, 1)], fill=False)
    start = text.run - 1 - (RECENT - DRAFTS)
    assert draft(runner, [text], 3) == [chain_of_drafts(model, text.tokens[: text.run + 1], 3, start=start)]


@pytest.mark.parametrize("filled", [1, 5, 30])
def test_a_prompt_that_is_filled_towards_its_end_only(filled):
    model, runner = make()
    text = Text(model, runner, torch.randint(0, 128, (80,)).tolist())
    run(runner, [(text, 40)], fill=False)
    run(runner, [(text, filled)])
    assert draft(runner, [text], 3) == [chain_of_drafts(model, text.tokens[: text.run + 1], 3, start=40)]


def test_sampled_drafts_follow_the_noise_of_their_positions():
    model, runner = make()
    text = Text(model, runner, torch.randint(0, 128, (30,)).tolist())
    run(runner, [(text, 20)])

    def pick(logits, position):
        race = exponential_noise(torch.tensor([7]), torch.tensor([position]), torch.arange(128))[0]
        return int((race / (logits.double() / 1.5).softmax(-1)).argmin())

    assert draft(runner, [text], 3, 1.5, 7) == [chain_of_drafts(model, text.tokens[:21], 3, pick)]


def test_only_the_vocabulary_for_drafts_is_drafted():
    torch.manual_seed(0)
    model = Transformer(CONFIGS["hybrid"]).eval()
    model.model.mtp.draft_tokens = torch.tensor([3, 50, 70, 99])
    runner = TorchRunner(model, HybridCache(model.config, slots=1, pages=2, drafts=DRAFTS))
    text = Text(model, runner, torch.randint(0, 128, (30,)).tolist())
    run(runner, [(text, 20)])

    def pick(logits, position):
        return max((3, 50, 70, 99), key=lambda token: float(logits[token]))

    assert draft(runner, [text], 3) == [chain_of_drafts(model, text.tokens[:21], 3, pick)]


def test_another_dtype_is_a_copy_that_follows_the_model():
    model, _ = make()
    cache = HybridCache(model.config, slots=1, pages=2, dtype=torch.bfloat16)
    runner = TorchRunner(model, cache, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.float32
    copied = runner.model
    assert copied.lm_head.weight.dtype == torch.bfloat16
    assert all(m.weight.dtype == torch.float32 for m in copied.modules() if isinstance(m, Router))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    runner.refresh()
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight.bfloat16())


def test_routes_of_many_experts_do_not_fit_a_byte():
    config = ModelConfig.tiny(n_routed_experts=300, num_experts_per_tok=8)
    model = Transformer(config).eval()
    runner = TorchRunner(model, HybridCache(config, slots=1, pages=2))
    text = torch.randint(0, 128, (40,))
    slot = runner.cache.take_slot()
    runner.cache.reserve(slot, 40)
    _, routes = runner.forward(Step(ints([slot]), ints([0]), ints([40]), ints(text), ints([])))
    assert routes.dtype == torch.int16
    assert torch.equal(routes.long().sort(-1).values, model.trunk(text[None]).routes[0].sort(-1).values)
    assert routes.max() > 255


def test_no_logits_are_made_where_none_are_wanted():
    _, runner = make()
    slot = runner.cache.take_slot()
    runner.cache.reserve(slot, 9)
    logits, routes = runner.forward(Step(ints([slot]), ints([0]), ints([9]), ints(range(9)), ints([])))
    assert logits.shape == (0, 128)
    assert routes.shape == (9, 3, 2)
