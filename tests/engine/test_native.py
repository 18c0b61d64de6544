"""The compiled runner against the model itself, and against itself: a row's bits depend on its own sequence only."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.config import ModelConfig
from mimoflash.config_format import DENSE, GLOBAL, SPARSE, WINDOW
from mimoflash.engine.cache import HybridCache
from mimoflash.engine.runner import RECENT, DraftNoise, Step
from mimoflash.engine.sampling import exponential_noise
from mimoflash.kernels import native as kernels
from mimoflash.kernels.quantize import dequantise, quantise
from mimoflash.model import Transformer

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
if kernels.available():
    from mimoflash.engine.native import NativeRunner

LENGTH = 150


@st.composite
def configs(draw, mtp=0):
    kv, swa_kv = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    layers = draw(st.integers(1, 3))
    widths = st.sampled_from([4, 7, 8, 16, 19, 24, 33])
    head_dim, swa_head_dim = draw(widths), draw(widths)
    factor = draw(st.sampled_from([1.0, 0.5, 0.334]))
    if any(int(width * factor) < 2 or int(width * factor) % 2 for width in (head_dim, swa_head_dim)):
        head_dim, swa_head_dim, factor = 12, 20, 0.5
    return ModelConfig.tiny(
        vocab_size=draw(st.integers(2, 90)), hidden_size=draw(st.integers(5, 70)),
        intermediate_size=draw(st.integers(1, 70)),
        layer_types=tuple(draw(st.lists(st.sampled_from([GLOBAL, WINDOW]), min_size=layers, max_size=layers))),
        mlp_layer_types=tuple(draw(st.lists(st.sampled_from([DENSE, SPARSE]), min_size=layers, max_size=layers))),
        num_attention_heads=kv * draw(st.integers(1, 5)), num_key_value_heads=kv,
        swa_num_attention_heads=swa_kv * draw(st.integers(1, 5)), swa_num_key_value_heads=swa_kv,
        head_dim=head_dim, swa_head_dim=swa_head_dim, v_head_dim=draw(widths), swa_v_head_dim=draw(widths),
        partial_rotary_factor=factor, sliding_window=draw(st.sampled_from([1, 2, 9, 64, 70])),
        swa_sink=draw(st.booleans()), global_sink=draw(st.booleans()),
        attention_value_scale=draw(st.sampled_from([1.0, 0.707])), norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])), n_routed_experts=5,
        num_experts_per_tok=draw(st.integers(1, 5)), moe_intermediate_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()), num_nextn_predict_layers=mtp, initializer_range=0.3,
    )  # fmt: skip


def make_model(config, seed=0):
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "sink" in name or "bias" in name:
                tensor.normal_()
    return model


class Texts:
    """Texts on a native runner, one in each slot."""

    def __init__(self, model, texts, *, drafts=0, dtype=torch.float32, **options):
        self.texts = texts
        longest = max(map(len, texts))
        self.cache = HybridCache(
            model.config, slots=len(texts), pages=len(texts) * (-(-longest // 64)), drafts=drafts, dtype=dtype
        )
        self.slots = [self.cache.take_slot() for _ in texts]
        assert all(self.cache.reserve(slot, len(text)) for slot, text in zip(self.slots, texts, strict=True))
        self.runner = NativeRunner(model, self.cache, **options)
        self.at = [0] * len(texts)

    def run(self, counts, ahead=0):
        """Runs `counts` {text: tokens} further; gives {text: (logits, routes)}. `ahead`: tokens of lookahead."""
        which = list(counts)
        starts = [self.at[i] for i in which]
        tokens = [self.texts[i][self.at[i] : self.at[i] + counts[i]] for i in which]
        for i in which:
            self.at[i] += counts[i]
        lookahead = None
        if ahead:
            lookahead = np.full((len(which), self.cache.drafts), -1, np.int32)
            for row, i in enumerate(which):
                following = self.texts[i][self.at[i] : self.at[i] + min(ahead, self.cache.drafts)]
                lookahead[row, : len(following)] = following
        flat = np.concatenate(tokens).astype(np.int32)
        step = Step(
            np.array([self.slots[i] for i in which], np.int32), np.array(starts, np.int32),
            np.array([len(t) for t in tokens], np.int32), flat, np.arange(len(flat), dtype=np.int32), lookahead,
        )  # fmt: skip
        logits, routes = self.runner.forward(step)
        sizes = [len(t) for t in tokens]
        return dict(zip(which, zip(logits.split(sizes), routes.split(sizes), strict=True), strict=True))

    def draft(self, which, count, temperature=0.0, seed=0):
        """Drafts after the tokens run, the next token of each text being known."""
        recent = np.full((len(which), RECENT), -1, np.int32)
        for row, i in enumerate(which):
            known = self.texts[i][: self.at[i] + 1][-RECENT:]
            recent[row, RECENT - len(known) :] = known
        noise = DraftNoise(np.full(len(which), temperature, np.float32), np.full(len(which), seed, np.uint64))
        slots = np.array([self.slots[i] for i in which], np.int32)
        positions = np.array([self.at[i] - 1 for i in which], np.int32)
        return self.runner.draft(slots, positions, recent, count, noise).tolist()


def random_text(config, length, seed=0):
    return torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def by_the_model(model, text):
    """Logits and sets of experts of a text in float64."""
    exact = make_copy(model).double()
    out = exact.trunk(torch.tensor([text]))
    return exact.logits(out.hidden)[0], out


def make_copy(model):
    copy = Transformer(model.config).eval()  # float32, whatever the model is
    copy.load_state_dict(model.state_dict())
    return copy


def is_sure(model, out):
    """(T,) whether no router's choice in the text so far was a near tie, so that rounding cannot have changed it."""
    sure = torch.ones(out.hidden.shape[1], dtype=torch.bool)
    moes = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for moe, routing in zip(moes, out.routings, strict=True):
        biased = (routing.scores + moe.gate.e_score_correction_bias).sort(descending=True).values
        k = model.config.num_experts_per_tok
        if k < biased.shape[1]:
            sure &= (biased[:, k - 1] - biased[:, k]) > 1e-4
    return sure.cummin(0).values


@settings(max_examples=20)
@given(configs(), st.integers(0, 1000))
def test_logits_and_routes_are_the_models(config, seed):
    model = make_model(config, seed)
    text = random_text(config, LENGTH, seed)
    want, out = by_the_model(model, text)
    logits, routes = Texts(model, [text]).run({0: LENGTH})[0]
    sure = is_sure(model, out)
    assert_close(logits[sure].double(), want[sure], atol=1e-4 * float(want.std()) + 1e-6, rtol=1e-4)
    assert routes.shape == (LENGTH, len(config.moe_layers), config.num_experts_per_tok)
    if config.moe_layers:
        assert torch.equal(routes[sure].long().sort(-1).values, out.routes[0][sure].sort(-1).values)


CONFIG = ModelConfig.tiny(num_nextn_predict_layers=3, initializer_range=0.3)


@st.composite
def schedules(draw):
    """Three texts of 40 to 150 tokens and, pass by pass, how many tokens of which are run."""
    lengths = draw(st.lists(st.integers(40, LENGTH), min_size=3, max_size=3))
    left, passes = dict(enumerate(lengths)), []
    while left:
        which = draw(st.lists(st.sampled_from(sorted(left)), min_size=1, max_size=3, unique=True))
        counts = {i: min(left[i], draw(st.sampled_from([1, 2, 3, 4, 5, 17, 60, 130]))) for i in which}
        passes.append(counts)
        left = {i: n - counts.get(i, 0) for i, n in left.items() if n > counts.get(i, 0)}
    return lengths, passes


@settings(max_examples=8)
@given(schedules(), st.sampled_from(["float32", "bf16", "int8", "int4"]), st.sampled_from([0, 3]), st.booleans())
def test_a_row_is_the_same_in_whatever_pass_on_however_many_threads(schedule, weights, drafts, narrow):
    lengths, passes = schedule
    model = make_model(CONFIG)
    texts = [random_text(CONFIG, n, i) for i, n in enumerate(lengths)]
    options = dict(weights=weights, drafts=drafts, dtype=torch.bfloat16 if narrow else torch.float32)
    many = Texts(model, texts, threads=2, **options)
    pieces = [many.run(counts) for counts in passes]
    for i, text in enumerate(texts):
        logits, routes = Texts(model, [text], threads=1, **options).run({0: len(text)})[0]
        assert torch.equal(torch.cat([piece[i][0] for piece in pieces if i in piece]), logits)
        assert torch.equal(torch.cat([piece[i][1] for piece in pieces if i in piece]), routes)


def test_long_texts_are_the_same_in_pieces():
    """Over several spans of a global layer, by decoding, verification and chunks."""
    config = ModelConfig.tiny(max_position_embeddings=4096)
    model, text = make_model(config), random_text(config, 2600)
    whole = Texts(model, [text], threads=1).run({0: 2600})[0][0]
    pieces = Texts(model, [text], threads=2)
    logits = [pieces.run({0: n})[0][0] for n in (1000, 23, 1, 1, 512, 511, 1, 4, 547)]
    assert torch.equal(torch.cat(logits), whole)
    want, _ = by_the_model(model, text)
    assert_close(whole.double(), want, atol=1e-4 * float(want.std()), rtol=1e-4)


@pytest.mark.parametrize("name", kernels.instruction_sets() if kernels.available() else [])
def test_instruction_sets_agree_up_to_rounding(name):
    model, text = make_model(CONFIG), random_text(CONFIG, 100)
    want, _ = by_the_model(model, text)
    logits = Texts(model, [text], kernels=kernels.load(name)).run({0: 100})[0][0]
    assert_close(logits.double(), want, atol=1e-4 * float(want.std()), rtol=1e-4)


# without experts, whose choice may flip
DENSE_CONFIG = ModelConfig.tiny(mlp_layer_types=(DENSE,) * 4, hidden_size=96, initializer_range=0.1)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_narrow_weights_are_what_they_stand_for(weights):
    """With int8 and int4 the activations are int8 too, each 32 neighbours by their largest."""
    model, text = make_model(DENSE_CONFIG), random_text(DENSE_CONFIG, 100)
    rounded = make_copy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            if weights == "bf16":
                module.weight.data = weight.bfloat16().float()
            else:
                kind = "int8" if module is rounded.lm_head else weights
                module.weight.data = dequantise(quantise(weight, kind))
                module.register_forward_pre_hook(lambda _, inputs: (quantised_activations(inputs[0]),))
    with torch.no_grad():
        want = rounded.double()(torch.tensor([text]))[0]
    logits = Texts(model, [text], weights=weights).run({0: 100})[0][0].double()
    error = (logits - want).square().mean().sqrt() / want.std()
    assert error < (1e-5 if weights == "bf16" else 5e-3)  # a rounding that falls the other way spreads


def quantised_activations(x):
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).flatten(-2)


def test_bf16_models_and_caches():
    model = make_model(DENSE_CONFIG).bfloat16()
    text = random_text(DENSE_CONFIG, 60)
    want, _ = by_the_model(model, text)
    logits = Texts(model, [text], weights="bf16").run({0: 60})[0][0].double()
    assert_close(logits, want, atol=1e-4 * float(want.std()), rtol=1e-4)
    narrow = Texts(model, [text], weights="bf16", dtype=torch.bfloat16).run({0: 60})[0][0].double()
    assert 1e-5 < (narrow - want).square().mean().sqrt() / want.std() < 0.01


def test_a_model_like_smol():
    heads = dict(num_attention_heads=9, num_key_value_heads=3, swa_num_attention_heads=9, swa_num_key_value_heads=3)
    config = ModelConfig.tiny(
        **heads, layer_types=(GLOBAL,) * 3, mlp_layer_types=(DENSE,) * 3, head_dim=64, v_head_dim=64,
        partial_rotary_factor=1.0, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    model, text = make_model(config), random_text(config, LENGTH)
    want, _ = by_the_model(model, text)
    assert_close(Texts(model, [text]).run({0: LENGTH})[0][0].double(), want, atol=1e-4 * float(want.std()), rtol=1e-4)


# -- drafts -----------------------------------------------------------------------------------------------------------


class Oracle:
    """What the MTP layers draft over a text in float64, the trunk having run it."""

    @torch.no_grad()
    def __init__(self, model, text):
        self.exact, self.text = make_copy(model).double(), text
        self.hidden = self.exact.trunk(torch.tensor([text])).hidden

    @torch.no_grad()
    def drafts(self, position, count, ids=None, start=0):
        """After `position`, whose next token is known: each layer over the text and the drafts before it. `start`: no
        entry before it is there."""
        known, hidden = self.text[: position + 2], self.hidden[:, start : position + 1]
        positions = torch.arange(start, position + 1)[None]
        drafts = []
        for k in range(count):
            tokens = torch.tensor([[*known, *drafts][start + 1 + k : position + 2 + k]])
            logits = self.exact.lm_head(self.exact.mtp(k, hidden, tokens, positions)[0, -1])
            drafts.append(int(logits.argmax()) if ids is None else int(ids[logits[ids].argmax()]))
        return drafts


@settings(max_examples=6)
@given(st.data())
def test_drafts_are_the_mtp_layers_after_prefill_and_every_verification(data):
    """Prefill in chunks with lookahead, then passes of 1 to 4 tokens that stand for drafts, right or wrong."""
    model, text = make_model(CONFIG), random_text(CONFIG, 60)
    texts, oracle = Texts(model, [text], drafts=3), Oracle(model, text)
    prompt = data.draw(st.integers(1, 40))
    while texts.at[0] < prompt:
        count = min(prompt - texts.at[0], data.draw(st.sampled_from([1, 3, 20, 60])))
        texts.run({0: count}, ahead=min(3, prompt - texts.at[0] - count) or -1)
    while texts.at[0] < 55:
        position, count = texts.at[0] - 1, data.draw(st.integers(1, 3))
        assert texts.draft([0], count) == [oracle.drafts(position, count)]
        right = data.draw(st.integers(0, 3))  # of a pass of 4 tokens, drafts that came true
        wrong = [(token + 1) % CONFIG.vocab_size for token in text[position + 2 + right :]]
        texts.texts[0] = text[: position + 2 + right] + wrong
        texts.run({0: min(4, len(text) - texts.at[0])})
        texts.texts[0], texts.at[0] = text, position + 2 + right


def test_drafts_after_a_pause_and_in_a_slot_used_before():
    model, text = make_model(CONFIG), random_text(CONFIG, 90)
    texts, oracle = Texts(model, [text], drafts=3), Oracle(model, text)
    texts.run({0: 30}, ahead=-1)
    for pause in (1, 2, 4, 5):  # passes without a draft, which the kept hidden states make good
        for _ in range(pause):
            texts.run({0: 1})
        assert texts.draft([0], 3) == [oracle.drafts(texts.at[0] - 1, 3)]
    for _ in range(20):
        texts.run({0: 1})
    position = texts.at[0] - 1
    assert texts.draft([0], 3) == [oracle.drafts(position, 3, start=position - RECENT + 1)]
    texts.run({0: 10}, ahead=-1)  # the next turn's prompt goes on from where drafts were
    assert texts.draft([0], 3) == [oracle.drafts(position + 10, 3, start=position - RECENT + 1)]
    other = random_text(CONFIG, 40, 1)
    texts.cache.free_slot(texts.slots[0])
    texts.slots[0] = texts.cache.take_slot()
    assert texts.cache.reserve(texts.slots[0], 40)
    texts.texts[0], texts.at[0] = other, 0
    texts.run({0: 20})
    assert texts.draft([0], 3) == [Oracle(model, other).drafts(19, 3, start=20 - RECENT)]


def test_drafts_do_not_depend_on_the_batch_and_keep_to_their_vocabulary():
    model = make_model(CONFIG)
    ids = torch.arange(3, 128, 5)
    all_texts = [random_text(CONFIG, n, n) for n in (12, 40, 77)]
    together = Texts(model, all_texts, drafts=2, draft_tokens=ids, threads=2)
    together.run({i: len(text) - 1 for i, text in enumerate(all_texts)}, ahead=-1)
    got = together.draft([2, 0, 1], 2)
    for i, drafts in zip([2, 0, 1], got, strict=True):
        assert drafts == Oracle(model, all_texts[i]).drafts(len(all_texts[i]) - 2, 2, ids)
        assert set(drafts) <= set(ids.tolist())


def test_sampled_drafts_take_the_noise_of_sampling():
    model, text = make_model(CONFIG), random_text(CONFIG, 40)
    texts = Texts(model, [text], drafts=1)
    texts.run({0: 39}, ahead=-1)
    with torch.no_grad():
        logits = make_copy(model).double().mtp_logits(torch.tensor([text]))[0][0, 38]
    seen = set()
    for seed in range(20):
        race = exponential_noise(torch.tensor([seed]), torch.tensor([40]), torch.arange(128))[0]
        (drafts,) = texts.draft([0], 1, temperature=2.0, seed=seed)
        assert drafts == [int((logits / 2.0 - race.log()).argmax())]
        seen.add(drafts[0])
    assert len(seen) > 5


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_refresh_takes_weights_changed_in_place():
    for weights in ("float32", "bf16", "int8"):
        model, text = make_model(CONFIG), random_text(CONFIG, 30)
        texts = Texts(model, [text], weights=weights)
        before = texts.run({0: 30})[0][0]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        texts.runner.refresh()
        texts.at[0] = 0
        after = texts.run({0: 30})[0][0]
        assert not torch.equal(before, after)
        assert torch.equal(after, Texts(model, [text], weights=weights).run({0: 30})[0][0])


def test_no_logits_wanted_and_errors():
    model = make_model(CONFIG)
    texts = Texts(model, [random_text(CONFIG, 70)])
    one = np.ones(1, np.int32)
    step = Step(np.array(texts.slots, np.int32), one * 0, one, one, one[:0])
    logits, routes = texts.runner.forward(step)
    assert logits.shape == (0, 128)
    assert routes.shape == (1, 3, 2)
    for token in (-1, 128):
        step.tokens = one * token
        with pytest.raises(ValueError, match="outside the vocabulary of 128"):
            texts.runner.forward(step)
    with pytest.raises(AssertionError, match="no pages"):
        texts.runner.forward(Step(one * texts.slots[0], one * 128, one, one, one * 0))
    with pytest.raises(ValueError, match="float32, bf16, int8, int4"):
        NativeRunner(model, texts.cache, weights="fp8")


def test_a_team_smaller_than_asked_for_does_not_hang():
    """As inside another parallel region or under a limit: OpenMP gives one thread where two are asked for."""
    (path,) = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    openmp = ctypes.CDLL(path)
    model, text = make_model(CONFIG), random_text(CONFIG, 30)
    want = Texts(model, [text], threads=1).run({0: 30})[0][0]
    levels = openmp.omp_get_max_active_levels()
    openmp.omp_set_max_active_levels(0)
    try:
        assert torch.equal(Texts(model, [text], threads=2).run({0: 30})[0][0], want)
    finally:
        openmp.omp_set_max_active_levels(levels)
    assert torch.equal(Texts(model, [text], threads=3).run({0: 30})[0][0], want)
