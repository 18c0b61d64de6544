"""Maze: a small grid with walls, in text; the answer is a path of the moves U, D, L and R from S to G.

Rows have letters and columns have digits, so that the reasoning can name the squares. It walks a shortest path, a move
and the square it leads to a line:

      1 2 3 4        S=a1 G=b3
    a S . # .        D b1
    b . . G .        R b2
    c # . . #        R b3
    d . . . .        and the answer is: D R R
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, ClassVar
from zlib import crc32

from mimoflash.world.episode import Judge, Question
from mimoflash.world.protocol import Demonstration, check_levels

Square = tuple[int, int]  # row, column
MOVES = {"R": (0, 1), "D": (1, 0), "L": (0, -1), "U": (-1, 0)}
SPARE_MOVES = 2  # a path may be this much longer than the shortest: one detour
CHANCE_TASKS = 500  # the tasks over which `chance` is averaged

_MOVE_WORDS = re.compile(r"\b[UDLR]+\b")
_PHRASINGS = (
    "Go from S to G in at most {limit} moves (U, D, L, R).\n{map}",
    "Find a path from S to G with U, D, L and R, at most {limit} moves.\n{map}",
    "{map}\nWhich moves (U, D, L, R) lead from S to G? At most {limit}.",
)


@dataclass(frozen=True)
class Grid:
    """A square grid; `distance` holds every square's steps to the goal, walls and unreachable squares are not in it."""

    size: int
    walls: frozenset[Square]
    start: Square
    goal: Square
    distance: dict[Square, int]

    @property
    def limit(self) -> int:
        return self.distance[self.start] + SPARE_MOVES

    def question(self) -> str:
        """One wording per maze, or the same maze could be in both splits."""
        symbols = dict.fromkeys(self.walls, "#") | {self.start: "S", self.goal: "G"}
        rows = [
            " ".join([chr(97 + row), *(symbols.get((row, column), ".") for column in range(self.size))])
            for row in range(self.size)
        ]
        header = "  " + " ".join(str(column + 1) for column in range(self.size))
        drawn = "\n".join([header, *rows])
        return _PHRASINGS[crc32(drawn.encode()) % len(_PHRASINGS)].format(limit=self.limit, map=drawn)

    def legal_moves(self, square: Square) -> dict[str, Square]:
        neighbours = {move: (square[0] + down, square[1] + right) for move, (down, right) in MOVES.items()}
        return {move: to for move, to in neighbours.items() if to in self.distance}

    def shortest_path(self) -> list[tuple[str, Square]]:
        """Moves and the squares they lead to; where several are as short, R goes before D before L before U."""
        path, square = [], self.start
        while square != self.goal:
            move, square = next(
                (move, to) for move, to in self.legal_moves(square).items() if self.distance[to] < self.distance[square]
            )
            path.append((move, square))
        return path

    def judge(self, content: str) -> tuple[float, dict[str, Any]]:
        """1.0 if the moves, none into a wall, end on G within the limit. Moves are capitals, as "DRR" or "D R, R"."""
        square, taken = self.start, 0
        for word in _MOVE_WORDS.finditer(content):
            for move in word[0]:
                if taken == self.limit:
                    return 0.0, {"failed": "too many moves"}
                if move not in (legal := self.legal_moves(square)):
                    return 0.0, {"failed": f"cannot move {move} from {_name(square)}"}
                square, taken = legal[move], taken + 1
        if square != self.goal:
            return 0.0, {"failed": f"ends on {_name(square)}"}
        return 1.0, {"moves": taken, "shortest": self.distance[self.start]}


def _name(square: Square) -> str:
    return f"{chr(97 + square[0])}{square[1] + 1}"


def _distances(size: int, walls: frozenset[Square], goal: Square) -> dict[Square, int]:
    distance, queue = {goal: 0}, deque([goal])
    while queue:
        row, column = square = queue.popleft()
        for down, right in MOVES.values():
            to = row + down, column + right
            if 0 <= to[0] < size and 0 <= to[1] < size and to not in walls and to not in distance:
                distance[to] = distance[square] + 1
                queue.append(to)
    return distance


@dataclass(frozen=True)
class Maze:
    """Mazes of the given sizes, drawn evenly (a size given twice weighs twice), about three squares in ten walls.

    How far S is from G is drawn evenly from what the maze offers, from 2 steps on.

    The random guesser sees the walls but does not plan: each move is drawn evenly from the legal ones, until G or the
    limit. On one maze he passes with probability sum over t <= limit of P(walk is on G first at step t), computed
    exactly by passing the walk's probability mass on, square by square; chance = its mean over the first 500 seeds.
    """

    sizes: Sequence[int] = (4, 5)
    name: ClassVar[str] = "maze"

    def __post_init__(self) -> None:
        check_levels("maze: sizes", self.sizes, 3, 9)

    @cached_property
    def chance(self) -> float:
        return sum(random_walk_pass_rate(self.grid(seed)) for seed in range(CHANCE_TASKS)) / CHANCE_TASKS

    def grid(self, seed: int) -> Grid:
        rng = Random(seed)
        size = rng.choice(self.sizes)
        squares = [(row, column) for row in range(size) for column in range(size)]
        while True:
            rng.shuffle(squares)
            walls = frozenset(squares[: rng.randint(size * size // 4, size * size // 3)])
            goal = squares[-1]
            distance = _distances(size, walls, goal)
            if (furthest := max(distance.values())) >= 2:
                break
        steps = rng.randint(2, furthest)
        start = rng.choice([square for square, d in distance.items() if d == steps])
        return Grid(size, walls, start, goal, distance)

    def environment(self) -> Question:
        return Question(self._ask)

    def _ask(self, seed: int) -> tuple[str, Judge]:
        grid = self.grid(seed)
        return grid.question(), grid.judge

    def demonstration(self, seed: int) -> Demonstration:
        grid = self.grid(seed)
        path = grid.shortest_path()
        lines = [f"S={_name(grid.start)} G={_name(grid.goal)}", *(f"{move} {_name(square)}" for move, square in path)]
        content = " ".join(move for move, _ in path)
        answer = {"role": "assistant", "reasoning_content": "\n".join(lines), "content": content}
        return Demonstration([{"role": "user", "content": grid.question()}, answer], [])


def random_walk_pass_rate(grid: Grid) -> float:
    """The probability that a walk of evenly drawn legal moves meets the goal within the limit."""
    mass, passed = {grid.start: 1.0}, 0.0
    for _ in range(grid.limit):
        following: dict[Square, float] = {}
        for square, probability in mass.items():
            moves = grid.legal_moves(square)
            for to in moves.values():
                following[to] = following.get(to, 0.0) + probability / len(moves)
        passed += following.pop(grid.goal, 0.0)
        mass = following
    return passed
