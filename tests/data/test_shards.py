"""Shards: what is written is read back, and no damaged file is ever read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.data.shards import ShardReader, ShardWriter


def documents(vocab_size: int):
    token = st.integers(0, vocab_size - 1)
    document = st.tuples(
        st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=20), st.integers(0, 2**64 - 1), st.booleans()
    )
    return st.lists(document, max_size=8)


def write(path, docs, vocab_size):
    with ShardWriter(path, vocab_size) as writer:
        for content, identity, conversation in docs:
            tokens, mask = zip(*content, strict=True)
            writer.add(np.array(tokens), np.array(mask), identity=identity, conversation=conversation)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([300, 2**16, 2**16 + 1, 152_576]).flatmap(lambda size: st.tuples(st.just(size), documents(size)))
)
def test_round_trip(tmp_path_factory, case):
    vocab_size, docs = case
    path = tmp_path_factory.mktemp("shard") / "s"
    write(path, docs, vocab_size)
    shard = ShardReader(path)
    assert shard.tokens.dtype.itemsize == (2 if vocab_size <= 2**16 else 4)
    assert len(shard) == len(docs)
    for i, (content, identity, conversation) in enumerate(docs):
        tokens, mask = shard.document(i)
        assert list(zip(tokens.tolist(), mask.tolist(), strict=True)) == content
        assert (int(shard.identities[i]), bool(shard.conversation[i])) == (identity, conversation)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("shard") / "intact"
    write(path, [([(n, n % 3 == 0) for n in range(40)], 2**64 - 1, True), ([(7, True)] * 13, 5, False)], 60_000)
    return path.read_bytes()


def expect_refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="prepare the data again") as error:
        ShardReader(path)
    assert str(path) in str(error.value)


def test_a_shard_with_any_byte_altered_is_refused(tmp_path, intact):
    for place in range(len(intact)):
        altered = bytearray(intact)
        altered[place] ^= 1 << place % 8
        expect_refusal(tmp_path / "s", bytes(altered))


def test_a_shard_cut_anywhere_or_with_something_added_is_refused(tmp_path, intact):
    for length in range(len(intact)):
        expect_refusal(tmp_path / "s", intact[:length])
    expect_refusal(tmp_path / "s", intact + b"\0")


def test_a_shard_that_was_not_closed_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "s", 100)
    writer.add(np.arange(50), np.ones(50, bool), identity=1, conversation=False)
    writer._file.flush()
    with pytest.raises(ValueError, match="not a shard"):
        ShardReader(tmp_path / "s")
    writer.close()
    assert len(ShardReader(tmp_path / "s")) == 1
