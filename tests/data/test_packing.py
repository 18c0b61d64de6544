"""Packing: every token once an epoch, conversations whole, little padding, and best fit as its definition says."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.data.packing import Packing, fill_rows, fullest
from mimoflash.data.shards import ShardReader, ShardWriter


def shard_of(path, lengths, conversation) -> ShardReader:
    """Token n of the shard is n, so that every token can be told from the others."""
    with ShardWriter(path, 1 << 20) as writer:
        for number, (length, chat) in enumerate(zip(lengths, conversation, strict=True)):
            tokens = np.arange(writer.tokens, writer.tokens + length)
            writer.add(tokens, tokens % 3 == 0, identity=number, conversation=chat)
    return ShardReader(path)


def all_sums(sizes: dict[int, int]) -> set[int]:
    pieces = [size for size, count in sizes.items() for _ in range(count)]
    return {sum(some) for n in range(len(pieces) + 1) for some in itertools.combinations(pieces, n)}


@given(st.dictionaries(st.integers(1, 30), st.integers(0, 3), max_size=4), st.integers(0, 60))
def test_fullest_leaves_the_least_room_that_any_choice_leaves(left, room):
    chosen = fullest(left, room)
    assert all(0 < number <= left[size] for size, number in chosen.items())
    assert sum(size * number for size, number in chosen.items()) == max(s for s in all_sums(left) if s <= room)


@pytest.mark.parametrize("capacity", [24, 20_001])  # the latter in units of four tokens
@given(data=st.data())
def test_every_piece_has_a_row_and_no_row_overflows(capacity, data):
    longest = st.sampled_from([24, capacity // 3, capacity])
    lengths = data.draw(st.lists(longest.flatmap(lambda most: st.integers(1, most)), min_size=1, max_size=60))
    lengths = sorted(lengths, reverse=True)
    used = np.bincount(fill_rows(np.array(lengths), capacity), weights=lengths)
    assert used.min() > 0
    assert used.max() <= capacity
    assert used.sum() == sum(lengths)


documents = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=30)


@settings(deadline=None)
@given(documents, st.integers(2, 17), st.integers(0, 3))
def test_every_token_exactly_once_an_epoch(tmp_path_factory, docs, sequence_length, number):
    lengths, chats = zip(*docs, strict=True)
    shard = shard_of(tmp_path_factory.mktemp("p") / "s", lengths, chats)
    packing = Packing(shard, sequence_length)
    epoch = packing.epoch((7, number))
    rows = [
        [range(s, s + n) for s, n in zip(epoch.start[a:b].tolist(), epoch.length[a:b].tolist(), strict=True)]
        for a, b in itertools.pairwise(epoch.first)
    ]
    assert len(rows) == packing.rows
    assert all(0 < sum(map(len, row)) <= sequence_length for row in rows)
    pieces = sorted((piece.start, piece.stop) for row in rows for piece in row)

    expected, begin = [], 0
    for length, chat in docs:
        stop = begin + (min(length, sequence_length) if chat else length)
        expected += [(a, min(a + sequence_length, stop)) for a in range(begin, stop, sequence_length)]
        begin += length
    assert pieces == expected
    assert packing.tokens == sum(b - a for a, b in expected)
    assert packing.padding == pytest.approx(1 - packing.tokens / (packing.rows * sequence_length))
    assert packing.truncated_conversations == sum(chat and length > sequence_length for length, chat in docs)
    assert packing.truncated_tokens == sum(lengths) - packing.tokens


RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    "lengths",
    [
        RANDOM.lognormal(np.log(40), 0.4, 3000),
        RANDOM.lognormal(np.log(150), 0.8, 3000),
        RANDOM.lognormal(np.log(600), 1.5, 3000),
        RANDOM.normal(100, 10, 3000),  # five to a row: best-fit decreasing leaves 7 % of it empty
    ],
)
def test_little_padding_and_rows_that_change_between_epochs(tmp_path, lengths):
    lengths = lengths.astype(int) + 1
    packing = Packing(shard_of(tmp_path / "s", lengths, [True] * len(lengths)), 512)
    assert packing.padding < 0.03

    def rows(seed: int) -> list[tuple[int, ...]]:
        epoch = packing.epoch((seed,))
        return [tuple(epoch.start[a:b].tolist()) for a, b in itertools.pairwise(epoch.first)]

    assert rows(0) == rows(0)
    shared = {row for row in rows(0) if len(row) > 1} & set(rows(1))
    assert len(shared) < 0.1 * packing.rows


@pytest.mark.parametrize("capacity", [512, 32_768])
def test_a_plan_of_100_000_documents_takes_less_than_two_seconds(capacity):
    lengths = np.sort(RANDOM.lognormal(np.log(capacity / 4), 0.8, 100_000).clip(1, capacity).astype(int))[::-1]
    start = time.thread_time()
    row = fill_rows(lengths, capacity)
    assert time.thread_time() - start < 2
    assert lengths.sum() / (capacity * (row.max() + 1)) > 0.99


def test_an_empty_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave the source out"):
        Packing(shard_of(tmp_path / "s", [], []), 8)
