"""The runner for CUDA, here on the CPU: by the references of its kernels, or by the kernels themselves where Python was
started with TRITON_INTERPRET=1. What only a card can show is in `python -m mimoflash.benchmarks.cuda_check`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mimoflash.checkpoint import fp8
from mimoflash.config import ModelConfig
from mimoflash.engine import cuda
from mimoflash.engine.cache import HybridCache
from mimoflash.engine.cuda import CudaRunner
from mimoflash.engine.runner import NO_FILL, RECENT, DraftNoise, Step, TorchRunner
from mimoflash.kernels import paged_attention
from mimoflash.model import Transformer

DRAFTS = 3
DEVICE = "cuda" if torch.cuda.is_available() and not paged_attention.is_interpreted() else "cpu"


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_model(**changes):
    torch.manual_seed(0)
    config = ModelConfig.tiny(num_nextn_predict_layers=DRAFTS, initializer_range=0.3, sliding_window=70, **changes)
    model = Transformer(config).eval().to(DEVICE)
    with torch.no_grad():
        for layer in [*model.model.layers, *model.model.mtp.layers]:
            if layer.self_attn.attention_sink_bias is not None:
                layer.self_attn.attention_sink_bias.normal_()
    return model


def make_cache(model, drafts=DRAFTS):
    cache = HybridCache(model.config, slots=8, pages=40, drafts=drafts, device=DEVICE)
    for layer in cache.layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    return cache


def step(parts, lookahead=None):
    """parts: (slot, start, tokens) a sequence; logits of every token."""
    arrays = [np.array(x, np.int32) for x in ([p[0] for p in parts], [p[1] for p in parts], [len(p[2]) for p in parts])]
    tokens = np.concatenate([p[2] for p in parts]).astype(np.int32)
    return Step(*arrays, tokens, np.arange(len(tokens), dtype=np.int32), lookahead)


class ByKey:
    """What a graph is: the first body of a key, again and again."""

    def __init__(self):
        self.recorded = {}

    def run(self, key, body):
        return self.recorded.setdefault(key, body)()


@torch.no_grad()
def whole(model, tokens):
    """Logits and routes of a text in one pass, without a cache."""
    out = model.trunk(torch.from_numpy(tokens).long()[None].to(DEVICE))
    return model.logits(out.hidden)[0], out.routes[0].cpu()


def run_texts(runner, model, lengths, seed, moves):
    """Prompts first, then `moves` passes of 1 to 1 + drafts tokens a sequence, some of which are run over again; every
    pass is compared with the whole text."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, model.config.vocab_size, 700) for _ in lengths]
    slots = [runner.cache.take_slot() for _ in lengths]
    for slot in slots:
        assert runner.cache.reserve(slot, max(lengths) + 4 * moves + 4)
    rng.shuffle(slots)
    done = [0] * len(lengths)

    def run(counts):
        who = [s for s, count in enumerate(counts) if count]
        parts = [(slots[s], done[s], texts[s][done[s] : done[s] + counts[s]]) for s in who]
        logits, routes = runner.forward(step(parts))
        row = 0
        for s in who:
            end = done[s] + counts[s]
            want, want_routes = whole(model, texts[s][:end])
            assert_close(logits[row : row + counts[s]], want[done[s] :], atol=2e-4, rtol=1e-3)
            assert torch.equal(routes[row : row + counts[s]].long().sort().values, want_routes[done[s] :].sort().values)
            row += counts[s]

    first = [max(1, n // 2) for n in lengths]
    for counts in (first, [n - f for n, f in zip(lengths, first, strict=True)]):
        if any(counts):
            run(counts)
            done = [d + c for d, c in zip(done, counts, strict=True)]
    for _ in range(moves):
        counts = [int(rng.integers(0, 2 + runner.cache.drafts)) for _ in lengths]
        if any(counts):
            run(counts)
            # of what was run one token at least is kept, the others were wrong drafts
            done = [d + int(rng.integers(1, c + 1)) if c else d for d, c in zip(done, counts, strict=True)]


@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4), drafts=st.integers(0, 3), seed=st.integers(0, 99))
def test_any_cut_of_a_text_gives_the_logits_of_the_whole(lengths, drafts, seed):
    model = make_model()
    runner = CudaRunner(model, make_cache(model, drafts))
    if DEVICE == "cpu":
        runner.graphs = ByKey()
    run_texts(runner, model, lengths, seed, moves=4)


def test_more_sequences_than_a_recorded_pass_takes(model, monkeypatch):
    monkeypatch.setattr(cuda, "BATCHES", (1, 2))
    run_texts(CudaRunner(model, make_cache(model)), model, [5, 90, 3, 40, 66], 1, moves=3)


def test_a_model_without_experts():
    dense = make_model(mlp_layer_types=("dense",) * 4, n_routed_experts=0, num_experts_per_tok=0)
    run_texts(CudaRunner(dense, make_cache(dense)), dense, [20, 4], 2, moves=3)


def test_prompts_and_decoding_in_one_step(model):
    runner, rng = CudaRunner(model, make_cache(model)), np.random.default_rng(0)
    texts = [rng.integers(0, 128, n) for n in (30, 90, 12)]
    for slot in range(3):
        runner.cache.take_slot()
        runner.cache.reserve(slot, 100)
    runner.forward(step([(0, 0, texts[0][:28])]))
    ahead = np.full((3, DRAFTS), NO_FILL, np.int32)
    ahead[1] = [1, 2, 3]
    mixed = step([(1, 0, texts[1]), (0, 28, texts[0][28:]), (2, 0, texts[2])], ahead)
    mixed.logits_rows = np.array([91, 3, 103, 90], np.int32)  # in any order
    logits, routes = runner.forward(mixed)
    wants = [whole(model, text) for text in (texts[1], texts[0], texts[2])]
    rows = torch.cat([wants[1][0][29:], wants[0][0][3:4], wants[2][0][11:], wants[1][0][28:29]])
    assert_close(logits, rows, atol=2e-4, rtol=1e-3)
    want = torch.cat([wants[0][1], wants[1][1][28:], wants[2][1]])
    assert torch.equal(routes.long().sort().values, want.sort().values)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 140), min_size=1, max_size=3), count=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.9]), few=st.booleans(), seed=st.integers(0, 99),
)
def test_drafts_are_those_of_the_torch_runner(lengths, count, temperature, few, seed):
    model, rng = make_model(), np.random.default_rng(seed)
    model.model.mtp.draft_tokens = torch.arange(0, 128, 3) if few else None
    runners = [TorchRunner(model, make_cache(model)), CudaRunner(model, make_cache(model))]
    if DEVICE == "cpu":
        runners[1].graphs = ByKey()
    texts = [rng.integers(0, 128, 200).astype(np.int32) for _ in lengths]
    ends = np.array(lengths, np.int32)
    slots = np.arange(len(lengths), dtype=np.int32)
    noise = DraftNoise(
        np.where(slots % 2 == 0, temperature, 0).astype(np.float32), slots.astype(np.uint64) + np.uint64(2**63)
    )
    ahead = np.array([text[n : n + DRAFTS] for text, n in zip(texts, lengths, strict=True)], np.int32)
    ahead[:, seed % 4 :] = -1  # the prompt ends
    for runner in runners:
        for slot, n in zip(slots, lengths, strict=True):
            runner.cache.take_slot()
            runner.cache.reserve(slot, n + 60)
        runner.forward(step([(s, 0, texts[s][: lengths[s]]) for s in slots], ahead))
    for turn in range(5):
        recent = np.array([[texts[s][i] if i >= 0 else -1 for i in range(n - RECENT + 1, n + 1)]
                           for s, n in zip(slots, ends, strict=True)], np.int32)
        drafted = [runner.draft(slots, ends - 1, recent, count, noise) for runner in runners]
        assert (drafted[0] == drafted[1]).all()
        gained = rng.integers(1, count + 2, len(ends)).astype(np.int32)  # some drafts were right
        if turn == 2:
            gained += 8  # decoded for a while without drafts: there is a gap
        for runner in runners:
            for part in range(0, int(gained.max()), count + 1):
                counts = np.clip(gained - part, 0, count + 1)
                ran = [(s, at, texts[s][at : at + counts[s]]) for s, at in zip(slots, ends + part, strict=True)]
                runner.forward(step([part for part in ran if len(part[2])]))
        ends = ends + gained
    assert (runners[0].cache.mtp_start == runners[1].cache.mtp_start).all()


class NoSync(TorchDispatchMode):
    """Operations that make the host wait for a GPU, or copy from its memory that is not pinned: a graph cannot hold
    them."""

    WAITS = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "is_nonzero", "lift_fresh",
             "repeat_interleave.Tensor", "equal", "_sort")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        assert not any(wait in name for wait in self.WAITS), f"{name} waits for the device"
        indices = args[1] if name.startswith(("index.", "index_put")) else []
        assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{name} by a mask is a nonzero"
        return function(*args, **(kwargs or {}))


def test_what_is_recorded_never_waits_for_the_device(model, monkeypatch):
    # the references may: on a card they do not run
    monkeypatch.setattr(cuda, "rotate_and_store", lambda *args: None)
    monkeypatch.setattr(cuda, "paged_attention", lambda q, k, v, *args, **kwargs: q[..., : v.shape[3]].contiguous())
    monkeypatch.setattr(cuda, "decode_experts", lambda x, *args: x)
    runner = CudaRunner(model, make_cache(model))
    with torch.inference_mode(), NoSync():
        runner._decode_pass(runner._inputs(4, 3).device)
        values = dict(recent=RECENT, slots=0, positions=0, firsts=0, ends=0, counts=0, seeds=0, temperatures=0)
        inputs = {name: torch.zeros(2, width or 1).long() for name, width in values.items()}
        runner._draft_pass({name: x if values[name] else x[:, 0] for name, x in inputs.items()}, 3, True)
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.zeros(3).nonzero()


def test_grouping_rows_never_waits_for_the_device():
    from mimoflash.kernels.grouped import group_rows

    with NoSync():
        group_rows(torch.randint(0, 9, (20, 2)), 8)


def test_fp8_is_the_model_with_dequantised_matrices(model):
    runner = CudaRunner(model, make_cache(model), dtype=torch.float32, fp8=True)
    run_texts(runner, dequantised(model), [60, 5], 3, moves=3)
    assert runner.model.model.layers[1].mlp.experts.down_proj.dtype == torch.float8_e4m3fn
    assert runner.model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32


def test_refresh_takes_the_new_weights_over_in_place():
    model = make_model()
    model.model.mtp.draft_tokens = torch.arange(50)
    for options in ({"fp8": True, "dtype": torch.float32}, {"dtype": torch.float64}, {}):
        runner = CudaRunner(model, make_cache(model), **options)
        places = {p.data_ptr() for p in runner.model.state_dict().values()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        runner.refresh()
        assert {p.data_ptr() for p in runner.model.state_dict().values()} == places
        if options != {"dtype": torch.float64}:
            run_texts(runner, dequantised(model) if options else model, [30], 4, moves=1)
        assert torch.equal(runner.draft_head.float(), model.lm_head.weight[:50])


@torch.no_grad()
def dequantised(model):
    """The same model with every matrix that FP8 takes rounded as it rounds."""
    copy = make_model()
    copy.load_state_dict(model.state_dict())
    for name, parameter in copy.named_parameters():
        own = name.split(".")[-2] if name.endswith("weight") else name.split(".")[-1]
        if own in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"):
            matrices = parameter if parameter.dim() == 3 else parameter[None]
            for matrix in matrices:
                matrix.copy_(fp8.dequantise(*fp8.quantise(matrix)))
    return copy
