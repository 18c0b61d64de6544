"""Rows with hidden states: each token's own ones, documents apart, a function of the sample's number alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.data import HiddenRows, ShardReader, ShardWriter

LENGTH = 8


def shard(folder, name, lengths, first=0):
    """Documents of these lengths: token i is i, every third is the assistant's, and its hidden state is (i, i + 1)."""
    with ShardWriter(folder / name, 1000) as writer:
        for number, length in enumerate(lengths):
            tokens = np.arange(first, first + length)
            writer.add(tokens, tokens % 3 == 0, identity=number, conversation=True)
            first += length
    reader = ShardReader(folder / name)
    return reader, np.stack([reader.tokens, reader.tokens + 1], 1).astype(np.float16)


@pytest.fixture
def rows(tmp_path):
    shards = [shard(tmp_path, "a", [5, 20, 1, 9]), shard(tmp_path, "b", [3], 40), shard(tmp_path, "c", [30], 60)]
    return HiddenRows([s for s, _ in shards], [h for _, h in shards], LENGTH, seed=3, prompt_weight=0.25)


def test_each_token_has_its_own_hidden_state_document_and_weight(rows):
    ends = np.cumsum([5, 20, 1, 9])
    for sample in range(3 * rows.rows):
        item = rows.batch(sample, 1)
        tokens, documents = item.batch.tokens[0], item.batch.document_ids[0]
        assert torch.equal(item.hidden[0], torch.stack([tokens, tokens + 1], 1).float())
        assert torch.equal(tokens, torch.arange(LENGTH) + tokens[0])  # a shard's documents are one row of numbers
        own = np.where(tokens < 40, np.searchsorted(ends, tokens, side="right"), 0)
        assert documents.tolist() == (own - own[0]).tolist()
        assert item.batch.loss_weight[0, 0] == 0
        assert item.batch.loss_weight[0, 1:].tolist() == [1.0 if t % 3 == 0 else 0.25 for t in tokens[1:].tolist()]


def test_an_epoch_takes_every_row_once_and_the_next_cuts_elsewhere(rows):
    assert rows.rows == 3 + 2  # (35 - 7) // 8 and (30 - 7) // 8; the shard of 3 tokens has none
    epochs = [sorted(rows.batch(e * rows.rows, rows.rows).batch.tokens[:, 0].tolist()) for e in range(6)]
    for starts in epochs:
        assert len(set(starts)) == rows.rows
        assert len({start % LENGTH for start in starts if start < 40}) == 1
    assert len({tuple(starts) for starts in epochs}) > 1


@given(first=st.integers(0, 40), count=st.integers(1, 6))
def test_a_batch_does_not_depend_on_what_was_asked_before(tmp_path_factory, first, count):
    folder = tmp_path_factory.mktemp("shards")
    reader, hidden = shard(folder, "a", [50])
    whole = HiddenRows([reader], [hidden], LENGTH).batch(0, 50)
    part = HiddenRows([reader], [hidden], LENGTH).batch(first, count)
    assert torch.equal(part.batch.tokens, whole.batch.tokens[first : first + count])
    assert torch.equal(part.hidden, whole.hidden[first : first + count])


def test_too_little_text_is_refused(tmp_path):
    reader, hidden = shard(tmp_path, "a", [14])
    with pytest.raises(ValueError, match="shorter than two rows of 8 tokens"):
        HiddenRows([reader], [hidden], LENGTH)
