"""Sampling by the compiled kernels against its definition, written in NumPy with loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


def exponential(seed, position, token):
    """Of rate 1, by the hash of the three: splitmix64 into two keys, murmur3's finaliser over the token."""
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    h = mix(mix((token * 0x9E3779B9 + z % 2**32) % 2**32) ^ z >> 32)
    return -math.log1p(-(h + 0.5) / 2**32)


def kept(logits, temperature, top_p, top_k, min_p):
    """{token: weight} that sampling chooses from."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or None]
    total, mass, nucleus = weights[order].sum(), 0.0, []
    for token in order:
        if top_p < 1 and mass >= top_p * total:
            break
        nucleus.append(token)
        mass += weights[token]
    return {token: weights[token] for token in nucleus if weights[token] >= min_p}


def sample_one(logits, raw, temperature, top_p, top_k, min_p, seed, position, **options):
    tensors = [torch.from_numpy(x)[None] for x in (logits, raw)]
    columns = [torch.tensor([x]) for x in (temperature, top_p, top_k, min_p)]
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    results = native.sample(*tensors, *columns, signed, torch.tensor([position]), **options)
    return [x.item() for x in results]


@st.composite
def rows(draw):
    size = draw(st.sampled_from([1, 2, 7, 16, 63, 64, 65, 300, 1025, 2500]))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = (random.standard_normal(size) * draw(st.sampled_from([0.01, 1.0, 5.0, 40.0]))).astype(np.float32)
    if draw(st.booleans()):  # many ties
        logits = np.round(logits)
    raw = logits
    if draw(st.booleans()):  # a mask
        raw = logits.copy()
        logits = np.where(random.random(size) < 0.5, np.float32(-np.inf), logits)
        logits[random.integers(size)] = raw[0] = 1.0
    return logits, raw


@settings(max_examples=150)
@given(
    rows(), st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.7]), st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    st.sampled_from([0, 1, 2, 5, 40, 1000, 5000]), st.sampled_from([0.0, 0.05, 1.0]), st.integers(0, 2**64 - 1),
    st.integers(0, 10**6),
)  # fmt: skip
def test_a_row_is_sampled_as_defined(row, temperature, top_p, top_k, min_p, seed, position):
    logits, raw = row
    top_p, min_p = float(np.float32(top_p)), float(np.float32(min_p))
    token, logprob, sampling_logprob = sample_one(logits, raw, temperature, top_p, top_k, min_p, seed, position)
    if temperature == 0:
        assert token == logits.argmax()
        assert sampling_logprob == 0
    else:
        weights = kept(logits, float(np.float32(temperature)), top_p, top_k, min_p)
        race = {i: exponential(seed, position, i) / w for i, w in weights.items() if w > 0}
        first = min(race.values())
        # a mass or a weight within rounding of a limit may fall to the other side
        if token != min(race, key=race.get):
            near = kept(logits, float(np.float32(temperature)), min(1.0, top_p * (1 + 1e-5)), top_k, min_p * (1 - 1e-5))
            assert token in near
            assert exponential(seed, position, token) / near[token] <= first * (1 + 1e-12)
        else:
            assert sampling_logprob == pytest.approx(math.log(weights[token] / sum(weights.values())), abs=2e-5)
    exact = raw.astype(np.float64)
    log_sum = np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    assert logprob == pytest.approx(exact[token] - log_sum, abs=1e-5 * (1 + abs(exact[token] - log_sum)))


def test_frequencies_are_the_distributions():
    """Chi-square over 20,000 positions of one seed, cut by top_k, top_p and min_p."""
    random = np.random.default_rng(0)
    logits, count = random.standard_normal(12).astype(np.float32) * 2, 20_000
    temperature, top_p, top_k, min_p = 0.8, 0.97, 9, 0.02
    weights = kept(logits, np.float32(temperature), np.float32(top_p), top_k, np.float32(min_p))
    assert 4 < len(weights) < 9
    one = torch.ones(count)
    tokens, _, _ = native.sample(
        *[torch.from_numpy(logits).expand(count, -1)] * 2, one * temperature, one * top_p, one.int() * top_k,
        one * min_p, one.long() * 5, torch.arange(count),
    )  # fmt: skip
    seen = np.bincount(tokens.numpy(), minlength=12)
    want = {i: count * w / sum(weights.values()) for i, w in weights.items()}
    assert seen.sum() == sum(seen[i] for i in want)
    chi2 = sum((seen[i] - n) ** 2 / n for i, n in want.items())
    assert chi2 < 3 * len(want) + 15  # far beyond p = 0.001 for so few degrees of freedom


def test_rows_do_not_depend_on_each_other_nor_on_threads():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 5000, generator=random) * 3
    columns = (
        torch.linspace(0, 2, 9), torch.linspace(0.1, 1, 9), torch.arange(9, dtype=torch.int32) * 7,
        torch.linspace(0, 0.1, 9), torch.arange(9), torch.arange(9) * 100,
    )  # fmt: skip
    together = native.sample(logits, logits, *columns, threads=2)
    for i in range(9):
        alone = native.sample(logits[i : i + 1], logits[i : i + 1], *(x[i : i + 1] for x in columns), threads=1)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", native.instruction_sets() if native.available() else [])
def test_all_instruction_sets_sample_the_same(name):
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 3000, generator=random) * 2
    one = torch.ones(40)
    columns = (one, one * 0.9, one.int() * 0, one * 0, torch.arange(40), torch.arange(40))
    tokens, logprobs, _ = native.sample(logits, logits, *columns, kernels=native.load(name))
    for i in range(40):
        weights = kept(logits[i].numpy(), 1.0, np.float32(0.9), 0, 0.0)
        assert tokens[i] == min(weights, key=lambda t: exponential(i, i, t) / weights[t])
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], atol=1e-4)


def test_logits_that_are_not_numbers_end_in_a_token_and_say_so():
    logits = np.full(100, np.nan, np.float32)
    for temperature in (0.0, 1.0):
        token, logprob, _ = sample_one(logits, logits, temperature, 0.9, 3, 0.1, 0, 0)
        assert 0 <= token < 100
        assert math.isnan(logprob)
