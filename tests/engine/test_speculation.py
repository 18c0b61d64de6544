import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from distributions import assert_matches, final_distribution
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.config import ModelConfig
from mimoflash.engine import sampling
from mimoflash.engine.grammar import Grammar
from mimoflash.engine.sampling import RowState, Sampler, SamplingParams, sample
from mimoflash.engine.speculation import RETRY, TRIAL, Acceptance, DraftLength, Seconds, replay_speculation
from mimoflash.model import Transformer
from mimoflash.text import train_tokenizer

# Drafts change no token -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setattr(sampling, "_implementation", lambda device: sample)


VOCABULARY = 6
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 1.5  # next logits by token


def generate(rows, length, draft, first=0, table=TABLE):
    """Texts of at least `length` tokens by a model of one token's memory, all rows together; `draft(i, place, token)`
    gives request i's drafts after a token at a place."""
    texts = [[first] for _ in rows]
    while going := [i for i, text in enumerate(texts) if len(text) <= length and not rows[i].is_finished]:
        drafts = [draft(i, len(texts[i]), texts[i][-1]) for i in going]
        seen = torch.tensor([t for i, d in zip(going, drafts, strict=True) for t in (texts[i][-1], *d)])
        for i, taken in zip(going, Sampler().pick(table[seen], [rows[i] for i in going], drafts), strict=True):
            assert taken
            texts[i] += [one.token for one in taken]
    return [text[1:] for text in texts]


def nothing(i, place, token):
    return []


def wrong_often(i, place, token):
    """Up to three drafts that the chain would take about as often as not."""
    count = (i + place) % 4
    return [(token + (i * 7 + place + n) % 3) % len(TABLE) for n in range(count)]


VARIANTS = [
    {"temperature": 0.7}, {"temperature": 1.4, "top_p": 0.8}, {"temperature": 1.2, "top_k": 3},
    {"temperature": 1.6, "min_p": 0.25}, {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("params", VARIANTS)
def test_speculation_has_the_models_distribution(params):
    """Over requests of different seeds, all texts of three tokens have the probability that the model gives them."""
    rows = [RowState(SamplingParams(seed=1000 + i, **params), [0], VOCABULARY) for i in range(6000)]
    texts = torch.tensor([text[:3] for text in generate(rows, 3, wrong_often)])
    full = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **params}
    q = torch.tensor(np.array([final_distribution(x.double().numpy(), *full.values())[0] for x in TABLE]))
    joint = torch.einsum("a,ab,bc->abc", q[0], q, q).flatten()
    codes = (texts * torch.tensor([36, 6, 1])).sum(1)
    assert_matches(codes.bincount(minlength=216), joint)


@pytest.mark.parametrize(
    "params",
    [
        *VARIANTS, {}, {"temperature": 1.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 1.0, "logit_bias": {1: 2.0}}, {"presence_penalty": 0.5},
    ],
)  # fmt: skip
def test_the_same_seed_gives_the_same_tokens_with_and_without_drafts(params):
    def rows():
        return [RowState(SamplingParams(seed=i, **params), [0, 1], VOCABULARY) for i in range(50)]

    without = generate(rows(), 12, nothing)
    assert [text[:12] for text in generate(rows(), 12, wrong_often)] == without
    right = {(i, place): text[place - 1 : place + 2] for i, text in enumerate(without) for place in range(1, 13)}
    assert [text[:12] for text in generate(rows(), 12, lambda i, place, _: right[i, place])] == without


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["abc"], 265)


def test_speculation_under_a_grammar_has_the_masked_distribution(tokenizer):
    grammar, size = Grammar.regex("[abc]{2}|a|bx"), tokenizer.vocab_size
    (end,) = tokenizer.encode("<|im_end|>")
    a, b, c, x = (tokenizer.encode(char)[0] for char in "abcx")
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(2))
    table[:, [a, b, c, x, end]] += 3
    params = SamplingParams(temperature=1.3, top_p=0.95, grammar=grammar)

    def rows(count):
        each = [dataclasses.replace(params, seed=i) for i in range(count)]
        return [RowState(p, [0], size, stop_ids=frozenset([end]), tokenizer=tokenizer) for p in each]

    def drafts(i, place, token):
        return [[a, end], [b, c, end], [c], [x, x], []][(i + place) % 5]

    requests = rows(1500)
    texts = generate(requests, 3, drafts, table=table)
    assert all(row.is_finished for row in requests)
    assert texts[:100] == generate(rows(100), 3, nothing, table=table)
    q: dict[tuple[int, ...], float] = {}

    def walk(text, allowed, chance):
        masked = np.full(size, -np.inf)
        masked[allowed] = table[text[-1] if text else 0].double().numpy()[allowed]
        p, _ = final_distribution(masked, 1.3, 0.95, 0, 0.0)
        for token in np.flatnonzero(p):
            after = (*text, int(token))
            if token == end:
                q[after] = chance * p[token]
            else:
                nexts = {a: [a, b, c, end], b: [a, b, c, x], c: [a, b, c]}.get(token) if len(after) == 1 else [end]
                walk(after, nexts, chance * p[token])

    walk((), [a, b, c], 1.0)
    keys = list(q)
    assert len(keys) > 8
    counts = torch.tensor([texts.count(list(key)) for key in keys])
    assert counts.sum() == len(texts)
    assert_matches(counts, torch.tensor(list(q.values()), dtype=torch.float64))


def test_nothing_is_taken_after_a_stop_token():
    row = RowState(SamplingParams(), [0], 4, stop_ids=frozenset([2]))
    logits = torch.eye(4)[[1, 2, 3]]
    assert [one.token for one in Sampler().pick(logits, [row], [[1, 2]])[0]] == [1, 2]
    assert row.is_finished
    assert row.position == 3


# How many to draft ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class World:
    """A machine and a model: the first row of a pass takes a second, each further one `row`, each draft `draft` and a
    fiftieth of it for each sequence. Timings are up to 20 % too long, one in twenty is two to five times as long."""

    chances: tuple[float, ...]  # that a draft is right, if those before it were
    row: float
    draft: float
    disturbed: bool = True

    def seconds(self, sequences, drafts):
        return 1 + self.row * (sequences * (1 + drafts) - 1), self.draft * drafts * (1 + 0.02 * sequences)

    def tokens(self, drafts):
        return sum(itertools.accumulate(self.chances[:drafts], lambda a, b: a * b, initial=1.0))

    def rate(self, sequences, drafts):
        return sequences * self.tokens(drafts) / sum(self.seconds(sequences, drafts))

    def best(self, sequences):
        return max(self.rate(sequences, n) for n in range(4))

    def live(self, chooser, sequences, steps, rng):
        """Runs steps: the lengths chosen, and the share of the best fixed length's tokens a second that was reached."""

        def measured(seconds):
            if not self.disturbed:
                return seconds
            return seconds * (1 + 0.2 * rng.random()) * (rng.choice([2, 3, 5]) if rng.random() < 0.05 else 1)

        chosen, expected, spent = [], 0.0, 0.0
        for _ in range(steps):
            drafts = chooser.choose(sequences)
            verifying, drafting = self.seconds(sequences, drafts)
            chooser.record_drafting(sequences, drafts, measured(drafting))
            chooser.record_step(sequences * (1 + drafts), measured(verifying))
            for _ in range(sequences):
                accepted = sum(1 for _ in itertools.takewhile(lambda p: rng.random() < p, self.chances[:drafts]))
                chooser.acceptance.record(drafts, accepted)
            chosen.append(drafts)
            spent += verifying + drafting
            expected += self.rate(sequences, drafts) * (verifying + drafting)
        return chosen, expected / spent / self.best(sequences)


GOOD, MIDDLING, BAD = (0.85, 0.8, 0.75), (0.6, 0.5, 0.4), (0.1, 0.1, 0.1)
WORLDS = [
    World(GOOD, 0.05, 0.05), World(MIDDLING, 0.05, 0.05), World(BAD, 0.05, 0.05), World(MIDDLING, 0.15, 0.05),
    World(GOOD, 0.8, 0.1), World(MIDDLING, 0.4, 0.1), World(BAD, 0.5, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("sequences", [1, 16])
@pytest.mark.parametrize("world", WORLDS)
def test_the_best_length_is_found(world, sequences):
    for seed in range(3):
        chosen, share = world.live(DraftLength(3), sequences, 2000, random.Random(seed))
        assert share > 0.95
        late = chosen[500:]
        usual = max(range(4), key=late.count)
        assert world.rate(sequences, usual) > 0.97 * world.best(sequences)


def test_the_first_steps_are_not_wasted():
    for world, sequences in itertools.product(WORLDS, (1, 16)):
        shares = [world.live(DraftLength(3), sequences, 100, random.Random(seed))[1] for seed in range(5)]
        assert sum(shares) / 5 > 0.8, world


def test_it_switches_off_where_it_does_not_pay_and_on_where_it_does_again():
    rng, chooser = random.Random(0), DraftLength(3)
    paying, not_paying = World(GOOD, 0.1, 0.05), World(BAD, 0.5, 0.1)
    for _ in range(3):
        chosen, share = paying.live(chooser, 1, 2000, rng)
        assert chosen[-1000:].count(3) > 800
        assert share > 0.85
        chosen, share = not_paying.live(chooser, 1, 2000, rng)
        assert chosen[-1000:].count(0) > 900
        assert share > 0.85


def test_it_follows_the_load():
    rng, chooser, world = random.Random(0), DraftLength(3), World(GOOD, 0.1, 0.03)
    for sequences in (1, 32, 2, 64, 1):
        _, share = world.live(chooser, sequences, 600, rng)
        assert share > 0.94
    assert world.rate(64, 1) < world.rate(64, 0)  # so that it must have changed


@pytest.mark.parametrize("world", WORLDS)
def test_looking_around_costs_what_it_may(world):
    """Where nothing is disturbed, what is lost is the price of trying: for each length TRIAL steps' tokens in RETRY."""
    calm = dataclasses.replace(world, disturbed=False)
    for sequences in (1, 16):
        rng, chooser = random.Random(0), DraftLength(3)
        calm.live(chooser, sequences, 200, rng)
        _, share = calm.live(chooser, sequences, 4000, rng)
        assert share > 1 - sum(calm.tokens(n) for n in range(4)) * TRIAL / RETRY


def test_without_drafts_there_is_nothing_to_choose():
    chooser = DraftLength(0)
    assert [chooser.choose(n) for n in (1, 5)] == [0, 0]
    assert chooser.acceptance.mean_length == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda x: (max(x), min(x))), max_size=30))
def test_acceptance_is_counted_by_position(verifications):
    acceptance = Acceptance(3)
    for drafted, accepted in verifications:
        acceptance.record(drafted, accepted)
    real = [(d, a) for d, a in verifications if d]
    assert acceptance.verifications == len(real)
    assert acceptance.drafted == [sum(d > i for d, _ in real) for i in range(3)]
    assert acceptance.accepted == [sum(a > i for _, a in real) for i in range(3)]
    gained = [1 + a for _, a in real]
    assert acceptance.mean_length == pytest.approx(sum(gained) / len(gained) if gained else 1.0)


def test_expected_tokens_come_to_what_is_seen_and_stay_while_nothing_is():
    acceptance, rng = Acceptance(2), random.Random(0)
    for _ in range(3000):
        acceptance.forget()
        for _ in range(20):
            acceptance.record(2, 0 if rng.random() > 0.6 else 1 + (rng.random() < 0.5))
    assert acceptance.expected_tokens(2) == pytest.approx(1 + 0.6 + 0.6 * 0.5, abs=0.05)
    known = acceptance.expected_tokens(2)
    for _ in range(5000):
        acceptance.forget()
    assert acceptance.expected_tokens(2) == pytest.approx(known)
    for _ in range(20):  # now it may change at once
        acceptance.record(2, 2)
    assert acceptance.expected_tokens(2) > 2.4


def test_seconds_are_the_medians_joined_by_lines():
    seconds = Seconds()
    assert seconds(3) == 0
    for size, taken in [(2, 10.0), (2, 11.0), (2, 500.0), (6, 14.0)]:
        seconds.record(size, taken, step=1)
    assert [seconds(size) for size in (1, 2, 4, 6, 100)] == [5.5, 11.0, 12.5, 14.0, 14.0]
    seconds.record(2, 3.0, step=5000)  # a measurement of long ago says nothing
    assert seconds(2) == 3.0


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_replayed_speculation_is_what_a_draft_and_verify_loop_gains(layers, reduced):
    torch.manual_seed(4)
    config = ModelConfig.tiny(num_nextn_predict_layers=layers, vocab_size=4, initializer_range=0.3)
    model, prompt = Transformer(config).eval(), [1, 0, 1, 1]
    ids = torch.tensor([0, 2]) if reduced else torch.arange(4)
    text = list(prompt)
    with torch.no_grad():
        for _ in range(60):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        place, gains = len(prompt) - 1, []
        while place + 1 < len(text):  # the loop itself: draft a chain, verify, keep what agrees
            hidden = model.trunk(torch.tensor([text[: place + 2]])).hidden
            drafted = text[: place + 2]
            for k in range(layers):
                nexts = torch.tensor([drafted[1 + k : 2 + k + place]])
                out = model.mtp(k, hidden[:, : place + 1], nexts, torch.arange(place + 1)[None])
                drafted.append(int(ids[model.lm_head(out)[0, -1, ids].argmax()]))
            agree = [a == b for a, b in zip(drafted[place + 2 :], text[place + 2 :], strict=False)]
            gains.append(1 + len(list(itertools.takewhile(bool, agree))))
            place += gains[-1]
    replayed = replay_speculation(model, prompt, text[len(prompt) :], ids if reduced else None)
    assert replayed == gains
    assert not layers or max(gains) > 1
