"""The adapter for reasoning-gym: against the library where it is installed, its message where it is not."""

import random
import re
import sys

import numpy as np
import pytest

from mimoflash.world import domain, play


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ImportError, match=r"pip install -e"):
        domain("reasoning_gym", dataset="chain_sum")


@pytest.mark.parametrize("dataset", ["chain_sum", "leg_counting", "maze"])
def test_the_datasets_own_answers_pass_and_others_do_not(dataset):
    pytest.importorskip("reasoning_gym")
    world = domain("reasoning_gym", dataset=dataset)
    environment = world.environment()
    assert 0 <= world.chance < 0.5
    for seed in range(20):
        question, answer = world.demonstration(seed).messages
        episode = play(environment, seed, lambda messages, tools, answer=answer: answer)
        assert (episode.reward, episode.messages) == (1.0, [question, answer])
        assert play(environment, seed, lambda messages, tools: {"content": "no idea"}).reward < 1
        assert world.demonstration(seed) == world.demonstration(seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "chain_sums"}, "did you mean chain_sum"),
        ({"dataset": "chain_sum", "seed": 3}, "seed cannot be set"),
        ({"dataset": "chain_sum", "min_terms": -3}, "configuration of chain_sum is refused"),
        ({"dataset": "chain_sum", "colour": 1}, "configuration of chain_sum is refused"),
        ({}, "dataset"),
    ],
)
def test_a_wrong_dataset_or_configuration_is_a_value_error(options, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        domain("reasoning_gym", **options)


def every_dataset():
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return ["chain_sum"]
    return sorted(set(DATASETS) - {"composite"})


WITHOUT_ANSWERS = {"boxnet", "rush_hour"}  # the library has none
EXAMPLES_ONLY = ["graph_color", "propositional_logic", "rubiks_cube"]  # of several answers, one is in the metadata


@pytest.mark.long
@pytest.mark.parametrize("dataset", every_dataset())
def test_every_dataset_is_played(dataset):
    pytest.importorskip("reasoning_gym")
    world = domain("reasoning_gym", dataset=dataset)
    states = random.getstate(), np.random.get_state()[1].tolist()
    for content in ("", "x", "-1 [", "{}", "[[1, 2]]", "9" * 30):
        episode = play(world.environment(), 3, lambda messages, tools, content=content: {"content": content})
        assert "error" not in episode.info
        assert 0 <= episode.reward <= 1
    if dataset in WITHOUT_ANSWERS:
        with pytest.raises(ValueError, match="cannot be demonstrated"):
            world.demonstration(3)
    else:
        question, answer = world.demonstration(3).messages
        episode = play(world.environment(), 3, lambda messages, tools: answer)
        assert (episode.reward, episode.messages) == (1.0, [question, answer])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.parametrize("dataset", ["prime_factorization", "list_functions", "pool_matrix", *EXAMPLES_ONLY])
def test_datasets_that_need_care_are_played(dataset):
    """A verifier that raises, two that draw from everybody's generators, and answers in the metadata."""
    test_every_dataset_is_played(dataset)


def test_composite_takes_its_datasets_as_plain_data():
    pytest.importorskip("reasoning_gym")
    datasets = [{"name": "chain_sum", "config": {"min_terms": 9, "max_terms": 9}}, {"name": "maze", "weight": 2}]
    world = domain("reasoning_gym", dataset="composite", datasets=datasets)
    mazes = 0
    for seed in range(12):
        question, answer = world.demonstration(seed).messages
        assert play(world.environment(), seed, lambda messages, tools, answer=answer: answer).reward == 1.0
        is_sum = re.search(r"\d+( [+-] \d+){8} =", question["content"])
        mazes += "```" in question["content"]
        assert bool(is_sum) != ("```" in question["content"])
    assert 6 <= mazes < 12
    for wrong in (None, "maze", ["maze"], [{"weight": 1}], [{"name": "mazes"}], [{"name": "maze", "wait": 1}], []):
        with pytest.raises(ValueError, match="configuration of composite is refused"):
            domain("reasoning_gym", dataset="composite", datasets=wrong)
