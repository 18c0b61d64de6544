"""The loader: a pure function of the sample's number, with exact proportions and boundaries that nothing crosses."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.data.loader import CYCLE, Batch, Mixture, PackedLoader
from mimoflash.data.shards import ShardReader, ShardWriter

LENGTH = 16


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, ShardReader]:
    """Source 0 (text), 1 (chats), 2 (both): token = 10,000 x source + place in the shard; masked where divisible by
    3.
    """
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for source, name in enumerate(["text", "chats", "both"]):
        with ShardWriter(folder / name, 40_000) as writer:
            for number in range(60):
                tokens = np.arange(
                    writer.tokens, writer.tokens + rng.integers(1, 2 * LENGTH if source != 1 else LENGTH + 1)
                )
                chat = source == 1 or (source == 2 and number % 2 == 0)
                writer.add(10_000 * source + tokens, (tokens % 3 > 0) | (not chat), identity=number, conversation=chat)
    return {name: ShardReader(folder / name) for name in ("text", "chats", "both")}


def loader(shards, weights=None, **options) -> PackedLoader:
    return PackedLoader(shards, weights or {"text": 3, "chats": 1, "both": 0.5}, LENGTH, **options)


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([vars(batch)[name] for batch in batches]) for name in vars(batches[0])))


def assert_same(a: Batch, b: Batch):
    for name in vars(a):
        assert torch.equal(vars(a)[name], vars(b)[name]), name


@settings(deadline=None)
@given(first=st.integers(0, 200_000), parts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_batches_do_not_depend_on_how_they_are_cut(shards, first, parts):
    one, other = loader(shards), loader(shards)
    other.batch(first // 3, 2)  # what was asked before does not matter
    begins = itertools.accumulate(parts[:-1], initial=first)
    assert_same(one.batch(first, sum(parts)), joined([other.batch(b, n) for b, n in zip(begins, parts, strict=True)]))


@pytest.mark.parametrize("prompt_weight", [0.0, 0.2])
@pytest.mark.parametrize("name", ["text", "chats", "both"])
def test_an_epoch_has_every_token_once_in_its_place(shards, name, prompt_weight):
    one, shard = loader(shards, {name: 1}, prompt_weight=prompt_weight), shards[name]
    packing, offset = one.packing[name], 10_000 * ["text", "chats", "both"].index(name)
    for epoch in (0, 5):
        batch = one.batch(epoch * packing.rows, packing.rows)
        seen = Counter()
        for tokens, ids, positions, weights in zip(*(vars(batch)[n].tolist() for n in vars(batch)), strict=True):
            pieces = [
                list(group)
                for _, group in itertools.groupby(zip(ids, tokens, positions, weights, strict=True), lambda t: t[0])
            ]
            padding = pieces.pop() if ids[-1] == -1 else []
            assert set(padding) <= {(-1, 0, 0, 0.0)}
            assert [piece[0][0] for piece in pieces] == list(range(len(pieces)))
            for piece in pieces:
                places = [token - offset for _, token, _, _ in piece]
                assert places == list(range(places[0], places[0] + len(piece)))  # one document's tokens, in order
                document = np.searchsorted(shard.ends, places, side="right")
                assert len(set(document.tolist())) == 1
                assert [position for _, _, position, _ in piece] == list(range(len(piece)))
                chat = shard.conversation[document[0]]
                expected = [1.0 if place % 3 or not chat else np.float32(prompt_weight) for place in places]
                assert [weight for *_, weight in piece] == [
                    0.0,
                    *expected[1:],
                ]  # nothing predicts a piece's first token
                seen.update(places)
        starts = np.concatenate([[0], shard.ends[:-1]])
        lost = {
            p
            for s, e, chat in zip(starts, shard.ends, shard.conversation, strict=True)
            if chat
            for p in range(s + LENGTH, e)
        }
        assert seen == Counter(set(range(len(shard.tokens))) - lost)


weights = st.dictionaries(st.text("ab", min_size=1, max_size=3), st.floats(1e-6, 1e3), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(weights, st.integers(0, 2**32))
def test_proportions_are_exact_in_a_cycle_and_close_in_any_stretch(weights, seed):
    mixture = Mixture(weights, seed)
    source, number = mixture(np.arange(2 * CYCLE))
    shares = np.array(list(weights.values())) / sum(weights.values())
    for s, share in enumerate(shares):
        where = np.flatnonzero(source == s)
        assert np.array_equal(number[where], np.arange(len(where)))  # each source's rows one after the other
        tolerance = 1 + len(shares)  # the least share of one in a cycle is taken from the others
        assert abs(len(where) / 2 - max(share * CYCLE, 1)) <= tolerance
        assert len(where) == 2 * (where < CYCLE).sum()
        stretch = np.cumsum(source == s)[255::256]
        assert np.abs(stretch - share * np.arange(256, 2 * CYCLE + 1, 256)).max() < 3 + len(shares) + 2 * tolerance


def test_a_source_with_a_tiny_weight_is_not_lost():
    source, _ = Mixture({"much": 1, "little": 1e-9}, 0)(np.arange(CYCLE))
    assert (source == 1).sum() == 1


def test_prefetched_batches_are_the_batches(shards):
    one = loader(shards, seed=3)
    counts = [1, 1, 4, 7, 2, 16, 3, 1, 1]
    prefetched = list(loader(shards, seed=3).batches(100, iter(counts), workers=3))
    begins = itertools.accumulate(counts, initial=100)
    assert len(prefetched) == len(counts)
    for batch, begin, count in zip(prefetched, begins, counts, strict=False):
        assert_same(batch, one.batch(begin, count))


def test_prefetching_an_endless_schedule_can_be_left(shards):
    batches = loader(shards).batches(0, itertools.repeat(4))
    assert len(list(itertools.islice(batches, 3))) == 3
    batches.close()


def test_seeds_and_epochs_differ(shards):
    one, rows = loader(shards, {"text": 1}), loader(shards, {"text": 1}).packing["text"].rows
    assert not torch.equal(one.batch(0, rows).tokens, one.batch(rows, rows).tokens)
    assert not torch.equal(one.batch(0, rows).tokens, loader(shards, {"text": 1}, seed=1).batch(0, rows).tokens)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"txet": 1.0}, r"\['txet'\].*\['both', 'chats', 'text'\]"),
        ({"text": 0}, "positive"),
        ({"text": float("nan")}, "positive"),
        ({}, "at least one"),
    ],
)
def test_wrong_mixtures_are_refused(shards, weights, message):
    with pytest.raises(ValueError, match=message):
        PackedLoader(shards, weights, LENGTH)


def test_batches_start_at_zero_and_are_not_empty(shards):
    for arguments in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="at least one sample"):
            loader(shards).batch(*arguments)
