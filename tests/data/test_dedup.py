"""Duplicates against brute force: Jaccard similarities of sets of word tuples, computed pair by pair."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.data.dedup import NearDuplicates, identity_hash, minhash, shingles

texts = st.lists(st.text("abc é\u2003", min_size=1, max_size=4), max_size=30).map(" ".join)


def shingle_set(text: str) -> set[tuple[str, ...]]:
    words = [word for word in text.replace("\n", " ").replace("\t", " ").split(" ") if word]
    width = min(5, len(words))
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)} if words else set()


@given(texts, texts)
def test_shingle_hashes_are_equal_exactly_where_the_words_are(a, b):
    x, y = set(shingles(a).tolist()), set(shingles(b).tolist())
    assert len(x) == len(shingle_set(a))
    assert len(x & y) == len(shingle_set(a) & shingle_set(b))


@given(texts, st.integers(0, 2**32))
def test_identity_ignores_white_space_and_nothing_else(text, seed):
    spaced = "".join(random.Random(seed).choice([" ", "\n\n", "\t "]) if c == " " else c for c in f" {text} ")
    assert identity_hash(text) == identity_hash(spaced)
    assert 0 <= identity_hash(text) < 2**64
    assert identity_hash(text + "x") != identity_hash(text)


def edited(rng: random.Random, words: list[str], share: float) -> list[str]:
    return [f"w{rng.randrange(5000)}" if rng.random() < share else word for word in words]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """40 families of originals, each with five copies in which 0 to 20 % of the words are changed."""
    rng = random.Random(0)
    documents = []
    for _ in range(40):
        original = [f"w{rng.randrange(5000)}" for _ in range(rng.randrange(30, 400))]
        documents += [" ".join(edited(rng, original, share)) for share in (0.0, 0.0, 0.005, 0.02, 0.06, 0.2)]
    rng.shuffle(documents)
    return documents


@pytest.fixture(scope="module")
def similarity(corpus) -> np.ndarray:
    sets = [shingle_set(text) for text in corpus]
    return np.array([[len(x & y) / len(x | y) for y in sets] for x in sets])


def test_estimated_similarity_is_jaccard(corpus, similarity):
    signatures = np.stack([minhash(shingles(text)) for text in corpus])
    error = (signatures[:, None] == signatures[None]).mean(2) - similarity
    related = (similarity > 0.1) & (similarity < 1)
    assert related.sum() > 300
    assert abs(error[related].mean()) < 0.02
    assert abs(error).max() < 0.2  # over four standard deviations, sqrt(1/4 / 120) each


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_duplicates_against_brute_force(corpus, similarity, threshold):
    near, kept = NearDuplicates(threshold), []
    correct = wrong = missed = 0
    for number, text in enumerate(corpus):
        match = near.find_or_add(minhash(shingles(text)))
        if match is None:
            missed += similarity[number, kept].max(initial=0) >= threshold
            kept.append(number)
        elif similarity[number, kept[match]] >= threshold:
            correct += 1
        else:
            wrong += 1
            assert similarity[number, kept[match]] > threshold - 0.15
    assert correct > 50
    assert correct / (correct + wrong) > 0.9, "precision"
    assert correct / (correct + missed) > 0.9, "recall"


def test_different_texts_are_kept_and_a_threshold_is_a_similarity():
    near = NearDuplicates(0.8)
    assert [near.find_or_add(minhash(shingles(text))) for text in ("a b c d e f", "g h i j k l", "a b c d e f")] == [
        None,
        None,
        0,
    ]
    with pytest.raises(ValueError, match=r"between 0\.3 and 1"):
        NearDuplicates(1.5)
