"""The adapter for gymnasium: players that read the text alone, an oracle for MiniGrid's maps, and odd environments."""

import random
import re
import sys

import numpy as np
import pytest

from mimoflash.world import domain, play, seeds


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install -e"):
        domain("gymnasium", id="FrozenLake-v1")


gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("minigrid")


def says(*words):
    said = iter(words)
    return lambda messages, tools: {"role": "assistant", "content": next(said)}


def map_of(text):
    return [line.split(" ") for line in text.splitlines() if re.fullmatch(r"[#.?~^A-Za-z]( [#.?~^A-Za-z])+", line)]


def walk_to_the_goal(messages, tools):
    """Reads the last map: forward while the goal is ahead, else turn to it, or about."""
    rows = map_of(messages[-1]["content"])
    [(down, right)] = [(r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "^"]
    goals = [(r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "G"]
    if not goals:
        return {"role": "assistant", "content": "Nothing here: **left**."}
    if goals[0][0] < down:
        return {"role": "assistant", "content": "It is ahead.\n\nforward"}
    return {"role": "assistant", "content": "Turn. Right!" if goals[0][1] > right else "left"}


def test_a_player_that_reads_the_map_walks_to_the_goal():
    world = domain("gymnasium", id="MiniGrid-Empty-Random-6x6-v0")
    for seed in range(20):
        episode = play(world.environment(), seed, walk_to_the_goal, max_turns=40)
        assert (episode.reward, episode.done, episode.info["illegal"]) == (1.0, True, 0)
        assert 0 < episode.info["return"] <= 1
        assert episode.info["messages"] == episode.turns
    assert 0 < world.chance < 0.5


@pytest.mark.parametrize("name", ["MiniGrid-DoorKey-8x8-v0", "BabyAI-GoTo-v0", "MiniGrid-LavaCrossingS9N1-v0"])
def test_the_map_is_what_stands_in_the_grid(name):
    """MiniGrid's own coordinates of every cell against the symbol drawn for it, over a random game."""
    rng, checked = random.Random(name), set()
    world = domain("gymnasium", id=name)
    game = world.environment()
    text = game.reset(3)[0][0]["content"]
    for _ in range(40):
        grid = game._environment.unwrapped
        rows = map_of(text)
        legend = dict(item.split(" is ") for item in re.search(r"^.* is you.*$", text, re.M)[0].split(", "))
        assert len(rows) == len(rows[0]) == 7
        for x in range(grid.width):
            for y in range(grid.height):
                column, row = grid.get_view_coords(x, y)
                if not (0 <= column < 7 and 0 <= row < 7) or rows[row][column] in "?^":
                    continue
                thing = grid.grid.get(x, y)
                kind = "free" if thing is None or thing.type == "floor" else thing.type
                if kind in ("door", "key", "ball", "box"):
                    kind = f"{thing.color} {kind}"
                if thing is not None and thing.type == "door":
                    kind = ("open " if thing.is_open else "locked " if thing.is_locked else "closed ") + kind
                assert legend[rows[row][column]] == kind
                checked.add(kind)
        facing = "east south west north".split()[grid.agent_dir]
        assert f"You look {facing}." in text
        carried = f"a {grid.carrying.color} {grid.carrying.type}" if grid.carrying else "nothing"
        assert f"You carry {carried}." in text
        assert f"Mission: {grid.mission}" in text
        step = game.step({"content": rng.choice(["left", "right", "forward", "forward", "pickup", "drop", "toggle"])})
        if step.done:
            break
        text = step.observation[0]["content"]
    assert len(checked) >= 2


def test_what_is_picked_up_is_said():
    world = domain("gymnasium", id="MiniGrid-DoorKey-5x5-v0")
    game = world.environment()
    assert "You carry nothing." in game.reset(3)[0][0]["content"]  # the key is at the agent's right
    game.step({"content": "right"})
    assert "You carry a yellow key." in game.step({"content": "pickup"}).observation[0]["content"]


def test_frozen_lake_is_drawn_and_walked():
    world = domain("gymnasium", id="FrozenLake-v1", is_slippery=False)
    path = ["down", "down", "right", "right", "down", "right"]
    episode = play(world.environment(), 5, says(*path), max_turns=10)
    assert (episode.reward, episode.turns, episode.info["return"]) == (1.0, 6, 1.0)
    assert "@FFF\nFHFH\nFFFH\nHFFG" in episode.messages[0]["content"]
    assert "SFFF\n@HFH" in episode.messages[2]["content"]
    assert "\x1b" not in str(episode.messages)
    fell = play(world.environment(), 5, says("right", "down"), max_turns=10)
    assert (fell.reward, fell.done, fell.turns) == (0.0, True, 2)


def test_games_that_open_alike_are_numbered_and_in_both_splits():
    world = domain("gymnasium", id="FrozenLake-v1")
    openings = [world.environment().reset(seed)[0][0]["content"] for seed in (3, 4)]
    assert [opening.splitlines()[0] for opening in openings] == ["Game 3.", "Game 4."]
    assert next(seeds(world, "held_out")) != next(seeds(world, "train"))
    assert "Game" not in domain("gymnasium", id="Taxi-v4").environment().reset(3)[0][0]["content"]


def taxi_player(messages, tools):
    """Drives by the drawing: to the blue letter, then to the magenta one, around walls by a search."""
    text = messages[-1]["content"]
    lines = text[text.index("+---") :].splitlines()[1:6]
    listed = re.search(r"^.* is (?:yellow|green).*$", text, re.M)[0].split(", ")
    colors = dict(reversed(item.split(" is ")) for item in listed)
    letters = {"R": (0, 0), "G": (0, 4), "Y": (4, 0), "B": (4, 3)}
    [at] = [(r, c) for r in range(5) for c in range(5) if lines[r][2 * c + 1] == "@"]
    aboard = colors.get("green") == "@"
    target = letters[colors["magenta" if aboard else "blue"]]
    ways = {at: ""}
    queue = [at]
    for r, c in queue:
        walls = {"east": lines[r][2 * c + 2] == "|", "west": lines[r][2 * c] == "|"}
        for move, (dr, dc) in {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}.items():
            to = r + dr, c + dc
            if not walls.get(move) and 0 <= to[0] < 5 and to not in ways:
                ways[to] = ways[r, c] or move
                queue.append(to)
    return {"role": "assistant", "content": ways[target] or ("dropoff" if aboard else "pickup")}


def test_a_player_that_reads_the_drawing_drives_the_taxi():
    world = domain("gymnasium", id="Taxi-v4")
    for seed in range(15):
        episode = play(world.environment(), seed, taxi_player, max_turns=40)
        assert episode.reward == 1.0, episode.messages


class Odd(gymnasium.Env):
    """Adds the numbers 0, 1 and 2 and a random one to a total that is to be above `goal`; breaks at 50."""

    action_space = gymnasium.spaces.Discrete(3)
    observation_space = gymnasium.spaces.Dict({"total": gymnasium.spaces.Discrete(100)})

    def __init__(self, goal=3, picture=False):
        self.goal, self.picture = goal, picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.total = random.randint(0, 1000) + np.random.randint(1000)
        return self._observed(), {}

    def _observed(self):
        pair = (np.array([0.123456, 2]), np.int64(3))
        return {"total": np.zeros((9, 9, 3)) if self.picture else self.total, "pair": pair, "words": "left or right"}

    def step(self, action):
        self.total += random.randint(0, 1000)
        if action == 2:
            raise RuntimeError("broken")
        return self._observed(), float(action) - 0.5, False, False, {}


@pytest.fixture(autouse=True)
def _register():
    gymnasium.register("Odd-v0", entry_point=Odd)
    yield
    gymnasium.registry.pop("Odd-v0")


def test_observations_without_a_drawing_are_numbers_and_actions_have_names():
    world = domain("gymnasium", id="Odd-v0", actions=["less", "more", "break it"], about="Add up.")
    text = world.environment().reset(1)[0][0]["content"]
    assert re.fullmatch(
        r"Add up.\ntotal: \d+\npair: 0.1235 2, 3\nwords: left or right\n.*last word: less, more, break it.", text
    )
    assert domain("gymnasium", id="Odd-v0").actions == ["0", "1", "2"]
    few = domain("gymnasium", id="MiniGrid-Dynamic-Obstacles-5x5-v0")  # MiniGrid's first three
    assert few.actions == ["left", "right", "forward"]


@pytest.mark.parametrize(
    ("content", "action"),
    [
        ("more", 1), ("I do MORE.", 1), ("less or **more**\n", 1), ("(less)", 0), ("more or less", 0),
        ("less is more!", 1),
        ("break it", 2), ("Let us break it...", 2), ("it", None), ("anymore", None), ("more then", None), ("", None),
        ("more" + "." * 1000, None), ("- " * 100_000 + "more", 1),
    ],
)
def test_the_last_words_are_the_action(content, action):
    assert domain("gymnasium", id="Odd-v0", actions=["less", "more", "break it"]).action_in(content) == action


def test_the_longest_name_that_fits_is_the_action():
    world = domain("gymnasium", id="Odd-v0", actions=["left", "turn left", "stay"])
    assert [world.action_in(text) for text in ("left", "turn left", "return left")] == [0, 1, 0]


def test_a_message_without_an_action_is_told_so_and_counts():
    world = domain("gymnasium", id="Odd-v0", max_messages=3, actions=["less", "more", "break"])
    episode = play(world.environment(), 1, says("hm", None, "more"), max_turns=9)
    assert (episode.done, episode.turns) == (True, 3)
    assert episode.info == {"return": 0.5, "messages": 3, "illegal": 2}
    assert episode.messages[2]["content"].startswith("That is no action. Answer with one of")
    assert episode.messages[2]["content"] == episode.messages[4]["content"]
    assert play(world.environment(), 1, says("hm", "hm", "hm"), max_turns=9).done


@pytest.mark.parametrize(("above", "reward"), [(0, 1.0), (0.99, 1.0), (1.0, 0.0), (-5, 1.0)])
def test_a_return_above_the_mark_passes(above, reward):
    world = domain("gymnasium", id="Odd-v0", max_messages=2, above=above)
    episode = play(world.environment(), 1, says("1", "1"), max_turns=9)
    assert (episode.reward, episode.info["return"]) == (reward, 1.0)
    assert play(world.environment(), 1, says("0", "0"), max_turns=9).reward == float(above < -1)


def test_chance_is_the_share_of_random_games_above_the_mark():
    """Of two actions one gains and one loses half, over five messages: three or more of five gain."""
    gymnasium.register("Coin-v0", entry_point=Coin)
    world = domain("gymnasium", id="Coin-v0", max_messages=5)
    assert abs(world.chance - 0.5) < 4.5 * 0.05
    assert domain("gymnasium", id="Coin-v0", max_messages=1, above=0.5).chance == 0
    assert domain("gymnasium", id="Coin-v0", max_messages=1, above=-1).chance == 1
    gymnasium.registry.pop("Coin-v0")


class Coin(Odd):
    action_space = gymnasium.spaces.Discrete(2)


def test_a_broken_environment_costs_its_own_sample_only():
    world = domain("gymnasium", id="Odd-v0")
    game = world.environment()
    episode = play(game, 1, says("1", "2"), max_turns=9)
    assert (episode.reward, episode.done, episode.info["error"]) == (0.0, True, "RuntimeError: broken")
    assert play(game, 2, says("1", "1"), max_turns=2).info["return"] == 1.0


def test_a_game_is_a_function_of_its_seed_whatever_runs_beside_it():
    world = domain("gymnasium", id="Odd-v0")
    state, numpys = random.getstate(), np.random.get_state()[1].tolist()
    alone = play(world.environment(), 7, says(*"101"), max_turns=3)
    first, second = world.environment(), world.environment()
    messages = [*first.reset(7)[0]]
    second.reset(8)
    for word in "101":
        messages += [{"role": "assistant", "content": word}, *first.step({"content": word}).observation]
        second.step({"content": word})
    assert messages == alone.messages
    assert play(world.environment(), 8, says(*"101"), max_turns=3).messages != alone.messages
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (state, numpys)


def test_a_closed_or_unopened_game_asks_for_reset():
    game = domain("gymnasium", id="Odd-v0").environment()
    for _ in range(2):
        with pytest.raises(ValueError, match="reset"):
            game.step({"content": "1"})
        game.reset(1)
        game.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "FrozenLak-v1"}, r"did you mean FrozenLake-v1"),
        ({"id": "FrozenLake-v9"}, r"FrozenLake-v9: .*v9"),
        ({"id": "FrozenLake-v1", "colour": 1}, r"configuration .*colour.* is refused"),
        ({"id": "Pendulum-v1"}, r"only Discrete\(n\) can be played"),
        ({"id": "Odd-v0", "picture": True}, r"no game of it can be opened: the observation is an array"),
        ({"id": "Odd-v0", "actions": ["a", "b"]}, r"actions is \['a', 'b'\]; it needs 3 different names"),
        ({"id": "Odd-v0", "actions": ["a", "b", "A"]}, r"it needs 3 different names"),
        ({"id": "Odd-v0", "actions": ["a", "b", "c", "A"]}, r"it needs 3 different names"),
        ({"id": "Odd-v0", "max_messages": 0}, r"max_messages is 0"),
        ({}, "id"),
    ],
)
def test_what_cannot_be_played_is_a_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        domain("gymnasium", **options)


def test_there_are_no_demonstrations():
    with pytest.raises(ValueError, match="cannot be demonstrated"):
        domain("gymnasium", id="Odd-v0").demonstration(0)
