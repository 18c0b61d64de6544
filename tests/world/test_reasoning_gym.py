"""The adapter for reasoning-gym: against the library where it is installed, its message where it is not."""

import sys

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
