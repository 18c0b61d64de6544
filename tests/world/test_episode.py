"""Playing: games over many turns, the turn limit, and environments that break."""

import math

import pytest

from mimoflash.world import Step, play


class Countdown:
    """A game over several turns: say the number on the board less one, until it is zero."""

    def __init__(self, fails_at=None, step=None):
        self.fails_at, self.odd_step = fails_at, step

    def reset(self, seed):
        if self.fails_at == "reset":
            raise OSError("no room")
        self.left = seed
        return [{"role": "user", "content": str(seed)}], []

    def step(self, message):
        if self.fails_at == self.left:
            raise RuntimeError("the board fell down")
        if self.odd_step and self.left == 2:
            return self.odd_step
        right = message["content"] == str(self.left - 1)
        self.left -= 1
        return Step([{"role": "user", "content": str(self.left)}], 0.25 * right, self.left == 0, {"left": self.left})

    def close(self):
        pass


def subtract(messages, tools):
    return {"role": "assistant", "content": str(int(messages[-1]["content"]) - 1)}


def test_a_game_is_played_turn_by_turn_and_its_rewards_add_up():
    episode = play(Countdown(), 4, subtract)
    assert (episode.reward, episode.turns, episode.done, episode.info) == (1.0, 4, True, {"left": 0})
    assert [message["content"] for message in episode.messages] == ["4", "3", "3", "2", "2", "1", "1", "0", "0"]


def test_the_turn_limit_ends_an_episode_that_the_environment_did_not():
    episode = play(Countdown(), 4, subtract, max_turns=3)
    assert (episode.reward, episode.turns, episode.done) == (0.75, 3, False)


@pytest.mark.parametrize(
    ("environment", "turns", "error"),
    [
        (Countdown(fails_at="reset"), 0, "OSError: no room"),
        (Countdown(fails_at=3), 2, "RuntimeError: the board fell down"),
        (Countdown(step=Step([], math.nan, False, {})), 3, "ValueError: reward is nan"),
        (Countdown(step=Step([], math.inf, True, {})), 3, "ValueError: reward is inf"),
        (Countdown(step=Step(None, 1.0, True, {})), 3, "TypeError"),
        (Countdown(step={"reward": 1.0}), 3, "AttributeError"),
    ],
)
def test_a_broken_environment_costs_its_own_episode_only(environment, turns, error):
    episode = play(environment, 4, subtract)
    assert (episode.reward, episode.turns, episode.done) == (0.0, turns, True)
    assert episode.info["error"].startswith(error)
    assert len(episode.messages) == (2 * turns if turns else 0)


def test_what_the_caller_raises_is_the_callers():
    with pytest.raises(ZeroDivisionError):
        play(Countdown(), 4, lambda messages, tools: {"content": str(1 // 0)})
