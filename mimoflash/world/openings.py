"""How games open: a game whose opening tells it apart from no other one is given a number."""

from collections.abc import Callable

_LOOKED_AT = 32


def open_alike(opening: Callable[[int], str]) -> bool:
    """Whether most of the first openings have been seen before, so that text cannot say which games are held out."""
    return len({opening(seed) for seed in range(_LOOKED_AT)}) < _LOOKED_AT / 2


def numbered(seed: int, opening: str) -> str:
    """The opening of a game with its number; what is held out is then what the seed hides or leaves to chance."""
    return f"Game {seed}.\n{opening}"
