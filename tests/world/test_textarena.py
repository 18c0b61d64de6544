"""The adapter for textarena: a player that reads what the games say, games of the test's own, and what is refused."""

import random
import re
import sys

import pytest

from mimoflash.world import domain, play, seeds
from mimoflash.world.textarena import _another


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    monkeypatch.setitem(sys.modules, "textarena.envs.registration", None)
    with pytest.raises(ImportError, match=r"pip install -e"):
        domain("textarena", id="GuessTheNumber-v0")


textarena = pytest.importorskip("textarena")


def says(*words):
    said = iter(words)
    return lambda messages, tools: {"role": "assistant", "content": next(said)}


def halve(messages, tools):
    """Guesses the middle of what the hints leave of 1 to 20."""
    low, high, guess = 1, 20, None
    for message in messages[1:]:
        if message["role"] == "assistant":
            guess = int(re.search(r"\d+", message["content"])[0])
        elif "higher" in message["content"]:
            low = guess + 1
        elif "lower" in message["content"]:
            high = guess - 1
    return {"role": "assistant", "content": f"I say [{(low + high) // 2}]."}


def test_a_player_that_reads_the_hints_wins():
    world = domain("textarena", id="GuessTheNumber-v0")
    numbers = set()
    for seed in range(30):
        episode = play(world.environment(), seed, halve, max_turns=5)
        assert (episode.reward, episode.done) == (1.0, True)
        numbers.add(episode.messages[-1]["content"])
        assert play(world.environment(), seed, halve, max_turns=5) == episode
    assert len(numbers) > 8
    assert 0.1 < world.chance < 0.9


def test_each_observation_is_news_only():
    world = domain("textarena", id="GuessTheNumber-v0")
    messages = play(world.environment(), 3, says("[20]", "19"), max_turns=2).messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[2]["content"] == messages[4]["content"] == "The target number is lower."


def test_games_that_open_alike_are_numbered_and_in_both_splits():
    world = domain("textarena", id="GuessTheNumber-v0")
    assert world.environment().reset(7)[0][0]["content"].startswith("Game 7.\nYou are Player 0")
    assert next(seeds(world, "held_out")) != next(seeds(world, "train"))
    lights = domain("textarena", id="LightsOut-v0")
    assert not lights.environment().reset(7)[0][0]["content"].startswith("Game")


class Sums(textarena.Env):
    """Ends at [end] and pays `pay`; each move draws a number from Python's generator."""

    def __init__(self, pay=1.0, state="SinglePlayerState"):
        self.pay, self.kind = pay, state

    def reset(self, num_players, seed=None):
        self.state = getattr(textarena, self.kind)(num_players=num_players, seed=seed)
        self.state.reset(game_state={}, player_prompt_function=lambda player_id, game_state: "Say [1] or [end].")
        self.drawn = []

    def step(self, action):
        self.state.add_observation(0, action, textarena.ObservationType.PLAYER_ACTION)  # as some games do: in disorder
        self.drawn.append(random.randint(0, 10**6))
        if action == "[break]":
            raise RuntimeError("broken")
        if action == "[end]":
            self.state.set_outcome(reward=self.pay, reason=str(self.drawn))
        self.state.add_observation(
            message=f"Drawn: {self.drawn[-1]}", observation_type=textarena.ObservationType.GAME_MESSAGE
        )
        return self.state.step()


@pytest.fixture(autouse=True)
def _register():
    from textarena.envs.registration import ENV_REGISTRY

    textarena.register(id="Sums-v0", entry_point=Sums, default_wrappers=[textarena.wrappers.LLMObservationWrapper])
    yield
    del ENV_REGISTRY["Sums-v0"]


@pytest.mark.parametrize(("pay", "reward"), [(1, 1.0), (0.25, 0.25), (0, 0.0), (-1, 0.0), (3, 1.0), ("no move", 0.0)])
def test_the_reward_is_the_games_between_none_and_one(pay, reward):
    episode = play(domain("textarena", id="Sums-v0", pay=pay).environment(), 1, says("[1]", "[end]"))
    assert (episode.reward, episode.done, episode.turns) == (reward, True, 2)
    assert "reason" in episode.info["game"]


def test_a_game_is_a_function_of_its_seed_whatever_runs_beside_it():
    world = domain("textarena", id="Sums-v0")
    state = random.getstate()
    alone = play(world.environment(), 7, says("[1]", "[1]", "[end]"))
    first, second = world.environment(), world.environment()
    first.reset(7)
    second.reset(8)
    for _ in range(2):
        first.step({"content": "[1]"})
        second.step({"content": "[1]"})
    assert first.step({"content": "[end]"}).info == alone.info
    assert second.step({"content": "[end]"}).info != alone.info
    assert random.getstate() == state


def test_a_broken_game_costs_its_own_sample_only():
    game = domain("textarena", id="Sums-v0").environment()
    episode = play(game, 1, says("[1]", "[break]"))
    assert (episode.reward, episode.done, episode.info["error"]) == (0.0, True, "RuntimeError: broken")
    assert play(game, 2, says("[end]")).reward == 1.0


def test_chance_is_the_pass_rate_of_who_repeats_forms():
    """[1] becomes another number, which goes on, and [end] ends the game."""
    assert domain("textarena", id="Sums-v0").chance == 1.0
    assert domain("textarena", id="Sums-v0", pay=0.9).chance == 0.0


def test_the_guesser_draws_numbers_and_letters_anew():
    forms = {_another("[L]", random.Random(seed)) for seed in range(300)}
    assert forms == {f"[{letter}]" for letter in "abcdefghijklmnopqrstuvwxyz"}
    assert {_another("[5]", random.Random(seed)) for seed in range(300)} == {f"[{number}]" for number in range(21)}
    assert _another("[up]", random.Random(0)) == "[up]"


def test_a_game_of_words_is_played_where_its_lists_are(tmp_path, monkeypatch):
    import nltk

    folder = tmp_path / "corpora" / "words"
    folder.mkdir(parents=True)
    for name in ("README", "en", "en-basic"):
        (folder / name).write_text("apple\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *names, **options: True)
    world = domain("textarena", id="Hangman-v0")
    episode = play(world.environment(), 3, says("[p]", "apple"))
    assert "_   p   p   _   _" in episode.messages[2]["content"].lower()
    assert (episode.reward, episode.turns) == (1.0, 2)


def test_messages_without_text_are_moves_too():
    game = domain("textarena", id="GuessTheNumber-v0").environment()
    game.reset(1)
    assert "invalid" in game.step({"content": None}).observation[0]["content"]
    assert game.step({}).done  # textarena forgives one


def test_a_game_that_is_over_or_closed_asks_for_reset():
    game = domain("textarena", id="Sums-v0").environment()
    for end in (lambda: game.step({"content": "[end]"}), game.close):
        with pytest.raises(ValueError, match="reset"):
            game.step({"content": "[1]"})
        game.reset(1)
        end()
    with pytest.raises(ValueError, match="reset"):
        game.step({"content": "[1]"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "GuessNumber-v0"}, "there is no game 'GuessNumber-v0'; did you mean GuessTheNumber-v0"),
        ({"id": "TicTacToe-v0"}, "TicTacToe-v0: only games of a single player can be played"),
        ({"id": "QuantumTicTacToe-v0"}, "QuantumTicTacToe-v0: only games of a single player"),
        ({"id": "GuessTheNumber-v0", "colour": 1}, "cannot be played with .*colour"),
        ({"id": "Sums-v0", "state": "Nothing"}, "Sums-v0: cannot be played with"),
        ({}, "id"),
    ],
)
def test_what_cannot_be_played_is_a_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        domain("textarena", **options)


def test_missing_word_lists_are_named(monkeypatch):
    monkeypatch.setattr(Sums, "reset", lambda self, num_players, seed: {}["words"])
    with pytest.raises(ValueError, match=r"python -m nltk.downloader words"):
        domain("textarena", id="Sums-v0")


def test_there_are_no_demonstrations():
    with pytest.raises(ValueError, match="cannot be demonstrated"):
        domain("textarena", id="Sums-v0").demonstration(0)
