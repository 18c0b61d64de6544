"""Generators of one's own: a function of the seed, going on where they ended, and nobody else's disturbed."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.world.randomness import OwnRandomness


def draw():
    return random.random(), float(np.random.random())


@given(st.integers(0, 2**70), st.lists(st.booleans(), max_size=8))
def test_interleaved_owners_draw_what_each_would_alone(seed, turns):
    with OwnRandomness(seed):
        alone = [draw() for _ in range(8)]
    owner, other, drawn = OwnRandomness(seed), OwnRandomness(seed + 1), []
    for mine in turns:
        with owner if mine else other:
            value = draw()
        if mine:
            drawn.append(value)
    assert drawn == alone[: len(drawn)]
    with OwnRandomness(seed + 1):
        assert draw() != alone[0]


def test_what_others_draw_is_not_changed():
    random.seed(1)
    np.random.seed(1)
    expected = [draw() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    drawn = [draw()]
    with OwnRandomness(1):
        draw()
    drawn.append(draw())
    with pytest.raises(IndexError), OwnRandomness(2):
        random.choice([draw()][1:])
    drawn.append(draw())
    assert drawn == expected


def test_owners_in_several_threads_draw_what_each_would_alone():
    """As the members of a group do, that begin the same task side by side."""

    def play(seed):
        owner, drawn = OwnRandomness(seed), []
        for _ in range(200):
            with owner:
                drawn += [draw(), draw()]
        return drawn

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(play, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert together == [play(seed) for seed in range(8)]
