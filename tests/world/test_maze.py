"""Mazes against a breadth-first search and a walker of the test's own, both reading the question's text."""

import math
import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.world import domain
from mimoflash.world.maze import random_walk_pass_rate

SEEDS = st.integers(0, 2**40)
WORLDS = st.sampled_from([{}, {"sizes": [3]}, {"sizes": [3, 6, 9]}])
STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def read_maze(question: str):
    """(square -> symbol of the open squares, start, goal, limit) from the text."""
    lines = question.splitlines()
    top = next(i for i, line in enumerate(lines) if re.fullmatch(r"  1( \d)+", line))
    size = len(lines[top].split())
    cells = {}
    for row in range(size):
        label, *symbols = lines[top + 1 + row].split(" ")
        assert label == "abcdefghi"[row]
        assert len(symbols) == size
        cells |= {(row, column): symbol for column, symbol in enumerate(symbols) if symbol != "#"}
    where = {symbol: square for square, symbol in cells.items()}
    return cells, where["S"], where["G"], int(re.search(r"most (\d+)", question)[1])


def shortest(cells, start, goal) -> int:
    reached, steps = {start}, 0
    while goal not in reached:
        wider = reached | {(r + a, c + b) for r, c in reached for a, b in STEPS.values() if (r + a, c + b) in cells}
        assert wider != reached, "the goal cannot be reached"
        reached, steps = wider, steps + 1
    return steps


def walk(cells, start, moves):
    """Every square of the walk, or None if it runs into something."""
    squares = [start]
    for move in moves:
        row, column = squares[-1]
        squares.append((row + STEPS[move][0], column + STEPS[move][1]))
        if squares[-1] not in cells:
            return None
    return squares


@settings(deadline=None)
@given(WORLDS, SEEDS)
def test_demonstrations_are_shortest_paths_and_the_reasoning_names_their_squares(options, seed):
    question, answer = domain("maze", **options).demonstration(seed).messages
    cells, start, goal, limit = read_maze(question["content"])
    moves = answer["content"].split(" ")
    squares = walk(cells, start, moves)
    assert squares[-1] == goal
    assert len(moves) == shortest(cells, start, goal) == limit - 2 >= 2
    names = [f"{'abcdefghi'[row]}{column + 1}" for row, column in squares]
    steps = [f"{move} {name}" for move, name in zip(moves, names[1:], strict=True)]
    assert answer["reasoning_content"].split("\n") == [f"S={names[0]} G={names[-1]}", *steps]


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 50), st.text("UDLR", max_size=12), st.booleans())
def test_the_verifier_agrees_with_a_walk(seed, moves, from_the_answer):
    world = domain("maze", sizes=[3])
    environment = world.environment()
    messages, _ = environment.reset(seed)
    if from_the_answer:  # random walks seldom arrive
        moves = world.demonstration(seed).messages[1]["content"].replace(" ", "") + moves[:2]
    cells, start, goal, limit = read_maze(messages[0]["content"])
    squares = walk(cells, start, moves)
    passes = squares is not None and squares[-1] == goal and len(moves) <= limit
    assert environment.step({"content": " ".join(moves)}).reward == float(passes)
    environment.reset(seed)
    assert environment.step({"content": f"Right, Down it is: {moves}, Done."}).reward == float(passes)


@settings(deadline=None)
@given(SEEDS, st.data())
def test_a_corrupted_path_fails(seed, data):
    world = domain("maze")
    environment = world.environment()
    moves = world.demonstration(seed).messages[1]["content"].split()

    def reward(path):
        environment.reset(seed)
        return environment.step({"content": " ".join(path)}).reward

    at = data.draw(st.integers(0, len(moves) - 1))
    assert reward(moves) == 1.0
    assert reward(moves[:at] + moves[at + 1 :]) == 0.0
    back = {"U": "D", "D": "U", "L": "R", "R": "L"}[moves[0]]
    assert reward([moves[0], back, *moves]) == 1.0  # one detour is allowed
    assert reward([moves[0], back] * 2 + moves) == 0.0  # two are too long
    assert reward(moves + [back] * 50) == reward([]) == 0.0


def test_levels_are_mixed_evenly():
    world = domain("maze", sizes=[3, 5, 5])
    sizes = [world.grid(seed).size for seed in range(3000)]
    assert abs(sizes.count(3) - 1000) < 130
    assert set(sizes) == {3, 5}


def test_chance_is_the_pass_rate_of_the_guesser_it_describes():
    world, rng, rounds = domain("maze"), random.Random(1), 10
    environment, passed, variance = world.environment(), 0.0, 0.0
    for seed in range(500):
        rate = random_walk_pass_rate(world.grid(seed))
        variance += rounds * rate * (1 - rate)
        for _ in range(rounds):
            cells, square, goal, limit = read_maze(environment.reset(seed)[0][0]["content"])
            moves = ""
            while square != goal and len(moves) < limit:
                legal = {m: (square[0] + a, square[1] + b) for m, (a, b) in STEPS.items()}
                move = rng.choice([m for m, to in legal.items() if to in cells])
                moves, square = moves + move, legal[move]
            passed += environment.step({"content": moves}).reward
    assert abs(passed - world.chance * 500 * rounds) < 4.5 * math.sqrt(variance)
