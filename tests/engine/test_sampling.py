import dataclasses
import math

import numpy as np
import pytest
import torch
from distributions import U64, assert_matches, final_distribution, noise_by_whole_numbers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.engine import sampling
from mimoflash.engine.grammar import Grammar
from mimoflash.engine.sampling import RowState, Sampler, SamplingParams, exponential_noise, sample


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """These are tests of the reference; the C++ one is held against it elsewhere."""
    monkeypatch.setattr(sampling, "_implementation", lambda device: sample)


def bits(seeds):
    return torch.from_numpy(np.array(seeds, np.uint64).view(np.int64))


# Noise ------------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, U64 - 1), position=st.integers(0, 2**40),
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
)  # fmt: skip
def test_noise_is_the_hash(seed, position, tokens):
    noise = exponential_noise(bits([seed]), torch.tensor([position]), torch.tensor(tokens))[0]
    want = [noise_by_whole_numbers(seed, position, token) for token in tokens]
    assert_close(noise.tolist(), want, rtol=1e-14, atol=0)


def grid(by):
    """Noise of one (seed, position, token) after the other along one of the three."""
    numbers = torch.arange(2**16)
    if by == "token":
        return exponential_noise(bits([7]), torch.tensor([12]), numbers)[0]
    seed, position = (numbers, torch.full_like(numbers, 12)) if by == "seed" else (numbers * 0 + 7, numbers)
    return exponential_noise(seed, position, torch.tensor([5]))[:, 0]


@pytest.mark.parametrize("by", ["token", "position", "seed"])
def test_noise_is_uniform_and_independent(by):
    u = torch.exp(-grid(by))
    cells = (u * 256).long()
    chi2 = ((cells.bincount(minlength=256) - 256.0) ** 2 / 256).sum()
    assert chi2 < 331  # 255 degrees of freedom, p = 0.001
    for lag in (1, 2, 7, 256):  # a cell and a later one: independent
        pairs = (u[:-lag] * 16).long() * 16 + (u[lag:] * 16).long()
        expected = len(pairs) / 256
        assert ((pairs.bincount(minlength=256) - expected) ** 2 / expected).sum() < 331


def test_noise_of_different_tokens_is_independent_over_positions_and_seeds():
    for numbers in ((bits([3] * 2**15), torch.arange(2**15)), (torch.arange(2**15), torch.zeros(2**15).long())):
        a, b = (torch.exp(-exponential_noise(*numbers, torch.tensor([4, 5]))) * 16).long().unbind(1)
        counts = (a * 16 + b).bincount(minlength=256)
        assert ((counts - 128.0) ** 2 / 128).sum() < 331


# The reference ----------------------------------------------------------------------------------------------------


def as_columns(rows):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "temperature": torch.tensor(columns["temperature"], dtype=torch.float32),
        "top_p": torch.tensor(columns["top_p"], dtype=torch.float32),
        "top_k": torch.tensor(columns["top_k"], dtype=torch.int32),
        "min_p": torch.tensor(columns["min_p"], dtype=torch.float32),
        "seed": bits(columns["seed"]),
        "position": torch.tensor(columns["position"]),
    }


ROWS = st.fixed_dictionaries(
    {
        "temperature": st.one_of(st.just(0.0), st.floats(0.05, 5)),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 1)),
        "top_k": st.integers(0, 12),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1)),
        "seed": st.integers(0, U64 - 1),
        "position": st.integers(0, 10**6),
    }
)
LOGIT = st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20, width=32), st.just(-math.inf))  # with ties


@settings(max_examples=100)
@given(data=st.data(), rows=st.lists(ROWS, min_size=1, max_size=4), vocabulary=st.integers(1, 30))
def test_sample_is_its_definition(data, rows, vocabulary):
    numbers = st.lists(LOGIT, min_size=vocabulary, max_size=vocabulary).filter(lambda x: max(x) > -math.inf)
    logits = torch.tensor([data.draw(numbers) for _ in rows])
    raw = torch.tensor([data.draw(st.lists(st.floats(-9, 9), min_size=vocabulary, max_size=vocabulary)) for _ in rows])
    tokens, logprobs, sampling_logprobs = sample(logits, raw, **as_columns(rows))
    for i, row in enumerate(rows):
        x, token = logits[i].double().numpy(), int(tokens[i])
        if row["temperature"] == 0:
            want, logq = int(np.flatnonzero(x == x.max())[0]), 0.0
        else:
            q, margin = final_distribution(x, *(row[name] for name in ("temperature", "top_p", "top_k", "min_p")))
            noise = [noise_by_whole_numbers(row["seed"], row["position"], t) for t in range(vocabulary)]
            race = [e / w if w else math.inf for e, w in zip(noise, q, strict=True)]
            assume(margin > 1e-9)
            assume(sum(r < min(race) * (1 + 1e-9) for r in race) == 1)
            want = int(np.argmin(race))
            logq = math.log(q[want])
        assert token == want
        assert float(sampling_logprobs[i]) == pytest.approx(logq, abs=1e-5)
        logp = raw[i].double() - raw[i].double().logsumexp(0)
        assert float(logprobs[i]) == pytest.approx(float(logp[token]), abs=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "min_p": 0.1}, {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.08},
    ],
)  # fmt: skip
def test_the_distribution_is_the_one_of_transformers(params):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    chain = [warpers.TemperatureLogitsWarper(params["temperature"])]
    chain += [warpers.TopKLogitsWarper(params["top_k"])] if "top_k" in params else []
    chain += [warpers.TopPLogitsWarper(params["top_p"])] if "top_p" in params else []
    chain += [warpers.MinPLogitsWarper(params["min_p"])] if "min_p" in params else []
    theirs = logits[None]
    for warper in chain:
        theirs = warper(None, theirs)
    p = theirs[0].double().softmax(-1)
    count = 20_000
    row = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 11, "position": 0, **params}
    columns = as_columns([row]) | {"position": torch.arange(count)}
    columns = {name: x.expand(count) for name, x in columns.items()}
    tokens, _, logq = sample(logits.expand(count, -1), logits.expand(count, -1), **columns)
    assert_close(logq, p.log().float()[tokens], atol=1e-5, rtol=0)
    assert_matches(tokens.bincount(minlength=40), p)


@given(rows=st.lists(ROWS, min_size=2, max_size=6), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_the_others(rows, seed):
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(seed)) * 3
    columns = as_columns(rows)
    together = sample(logits, logits, **columns)
    for i in range(len(rows)):
        alone = sample(logits[i : i + 1], logits[i : i + 1], **{name: x[i : i + 1] for name, x in columns.items()})
        assert [x[i].item() for x in together] == [x[0].item() for x in alone]


# What a request changes -------------------------------------------------------------------------------------------


def test_penalties_and_bias_are_those_of_transformers_and_openai():
    process = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    vocabulary, prompt = 30, [3, 3, 7, 9]
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.25, logit_bias={2: 1.5, 9: -2.0, 4: -math.inf}
    )
    row, text = RowState(params, prompt, vocabulary), list(prompt)
    for _ in range(40):
        raw = torch.randn(vocabulary)
        want = raw.clone()
        want[[2, 9]] += torch.tensor([1.5, -2.0])
        want[4] = -math.inf
        want = process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([text]), want[None])[0]
        for token in set(text[len(prompt) :]):
            want[token] -= 0.4 + 0.25 * text[len(prompt) :].count(token)
        (((token, logprob, _, _),),) = Sampler().pick(raw[None], [row])
        assert token == int(want.argmax())
        assert logprob == pytest.approx(float(raw.log_softmax(0)[token]), abs=1e-5)
        text.append(token)
    assert len(set(text)) > 20  # the penalties show


def test_counts_outgrow_their_arrays():
    row = RowState(SamplingParams(frequency_penalty=1.0), [0], 500)
    for token in [*range(300), *range(0, 300, 2)]:
        row.take(token)
    logits = torch.zeros(500)
    row.adjust(logits)
    want = torch.zeros(500)
    want[:300] = -1
    want[:300:2] = -2
    assert torch.equal(logits, want)


def test_likeliest_tokens_are_reported_where_wanted():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    rows = [RowState(SamplingParams(top_logprobs=n, temperature=1.0, seed=n), [1], 20) for n in (0, 3, 50)]
    first = int(logits[1].argmax())
    plain = [RowState(SamplingParams(top_logprobs=3, logit_bias={first: 50.0}), [1], 20)]
    taken = [*Sampler().pick(logits[[0, 1, 2]], rows), *Sampler().pick(logits[1:3], plain, [[first]])]
    assert [len(x[0].top_logprobs) for x in taken] == [0, 3, 20, 3]
    values, ids = logits[1].log_softmax(0).topk(3)
    for likeliest in (taken[1][0].top_logprobs, taken[3][0].top_logprobs):  # of the model: without the bias
        assert [token for token, _ in likeliest] == ids.tolist()
        assert_close(torch.tensor([logp for _, logp in likeliest]), values)


def test_a_row_without_a_token_costs_only_its_request():
    logits = torch.zeros(3, 8)
    logits[2] = math.nan
    nothing = SamplingParams(logit_bias=dict.fromkeys(range(8), -math.inf))
    rows = [RowState(params, [1], 8) for params in (SamplingParams(), nothing, SamplingParams())]
    taken = Sampler().pick(logits, rows)
    assert [[one.token for one in each] for each in taken] == [[0], [], []]
    assert rows[0].error is None
    assert "no token is allowed" in rows[1].error
    assert "not finite" in rows[2].error


# Parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": -1}, {"temperature": math.nan},
        {"temperature": math.inf}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0},
        {"presence_penalty": math.nan}, {"frequency_penalty": math.inf}, {"logit_bias": {1: math.nan}},
        {"logit_bias": {-1: 0.0}}, {"seed": -1}, {"seed": U64}, {"seed": "1"}, {"stop": [""]}, {"stop": [1]},
        {"stop": 5}, {"stop_token_ids": 3}, {"logit_bias": [1, 2]}, {"logit_bias": 3},
        {"stop_token_ids": [-1]}, {"stop_token_ids": ["a"]}, {"ignore_stop_tokens": 1}, {"grammar": "a"},
        {"top_logprobs": -1}, {"top_logprobs": True},
    ],
)  # fmt: skip
def test_bad_sampling_parameters_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_parameters_are_values():
    params = SamplingParams(stop="x", logit_bias={3: 1, 1: -math.inf}, stop_token_ids=[4], grammar=Grammar.regex("a"))
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (("x",), ((1, -math.inf), (3, 1)), (4,))
    assert SamplingParams(stop=None, logit_bias=None, stop_token_ids=None) == SamplingParams()
    assert params == dataclasses.replace(params)
    assert hash(params) == hash(dataclasses.replace(params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias={9: 1.0}), "logit_bias names token 9"),
        (SamplingParams(stop_token_ids=[8]), "stop_token_ids names token 8"),
        (SamplingParams(grammar=Grammar.regex("a")), "needs a tokenizer"),
    ],
)
def test_what_does_not_fit_the_vocabulary_is_named(params, message):
    with pytest.raises(ValueError, match=message):
        RowState(params, [1], 8)
