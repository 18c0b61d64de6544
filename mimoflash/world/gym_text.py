"""What a gymnasium environment shows, in words and characters."""

import re
from typing import Any

import numpy as np

# By the environment's class: its actions in order, and what the game is.
KNOWN: dict[str, tuple[tuple[str, ...], str]] = {
    "FrozenLakeEnv": (
        ("left", "down", "right", "up"),
        "Walk over a frozen lake from S to G. H are holes to keep out of; the ice may be slippery. You are @.",
    ),
    "CliffWalkingEnv": (
        ("up", "right", "down", "left"),
        "Walk from the lower left corner to T, and not over the cliff C. You are at x.",
    ),
    "TaxiEnv": (
        ("south", "north", "east", "west", "pickup", "dropoff"),
        "Drive a taxi to the passenger, at the blue letter, pick them up and drop them off at the magenta one. You are "
        "@, yellow while free and green with the passenger aboard. | are walls.",
    ),
    "BlackjackEnv": (
        ("stick", "hit"),
        "Blackjack. You see your sum, the dealer's card, and whether you have a usable ace.",
    ),
    "CartPoleEnv": (
        ("left", "right"),
        "Keep the pole on the cart upright. You see the cart's position and velocity, the pole's angle (right is "
        "positive) and its angular velocity.",
    ),
    "MountainCarEnv": (
        ("left", "stay", "right"),
        "Swing a weak car up the hill on its right, to position 0.5. You see its position and velocity.",
    ),
    "MiniGridEnv": (
        ("left", "right", "forward", "pickup", "drop", "toggle", "done"),
        "You walk through rooms and see the map before you: you are ^ and look up it. left and right turn you, forward "
        "walks; pickup, drop and toggle (open) are for what is right before you.",
    ),
    "AcrobotEnv": (
        ("left", "none", "right"),
        "Swing two linked arms above the bar by torque on their joint. You see cosine and sine of the first angle, of "
        "the second one, and their angular velocities.",
    ),
}
_LARGEST_BOX = 64  # numbers; more are a picture

_ANSI = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")  # the terminal's colours

# MiniGrid's numbers of objects, colours and states of doors.
_OBJECTS = ("unseen", "free", "wall", "free", "door", "key", "ball", "box", "goal", "lava", "agent")
_COLORS = ("red", "green", "blue", "purple", "yellow", "grey")
_DOORS = ("open", "closed", "locked")
_SYMBOLS = {"unseen": "?", "free": ".", "wall": "#", "goal": "G", "lava": "~"}
_LETTERS = "ABCDEFHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # of things; G is the goal
_DIRECTIONS = ("east", "south", "west", "north")


def observed(environment: Any, observation: Any) -> str:
    """The observation as text: MiniGrid's as a map, another environment's own drawing in text, or its numbers.

    Raises ValueError where it is a picture.
    """
    if isinstance(observation, dict) and {"mission", "image", "direction"} <= observation.keys():
        return _minigrid(observation)
    if environment.render_mode == "ansi":
        return _plain(environment.render())
    return _numbers(observation)


def _plain(drawing: str) -> str:
    """A drawing for the terminal without its colours: what has a background colour is @, and colours are listed."""
    text = ""
    colors: list[int] = []
    named: dict[str, str] = {}
    for part in re.split(r"(\x1b\[[0-9;]*m)", drawing):
        if part.startswith("\x1b"):
            codes = [int(code) for code in re.findall(r"\d+", part)]
            colors = [] if 0 in codes or not codes else colors + [code for code in codes if 31 <= code <= 47]
            continue
        text += "@" * len(part) if any(code > 40 for code in colors) else part
        named |= {("@" if code > 40 else part): _ANSI[code % 10] for code in colors}
    legend = ", ".join(f"{what} is {color}" for what, color in named.items())
    return "\n".join(filter(None, [text.strip("\n"), legend]))


def _numbers(observation: Any) -> str:
    if isinstance(observation, dict):
        return "\n".join(f"{key}: {_numbers(value)}" for key, value in observation.items())
    if isinstance(observation, tuple | list):
        return ", ".join(map(_numbers, observation))
    if isinstance(observation, str):
        return observation
    array = np.asarray(observation)
    if array.size > _LARGEST_BOX:
        raise ValueError(f"the observation is an array of {array.shape}: a picture, and not text that a model can read")
    if array.ndim > 1:
        return "\n".join(map(_numbers, array))
    return " ".join(f"{number:.4g}" if array.dtype.kind == "f" else str(number) for number in array.reshape(-1))


def _minigrid(observation: dict[str, Any]) -> str:
    """The agent's view as a map, with a legend of what is in it."""
    cells = np.asarray(observation["image"])  # column, row, (object, colour, state)
    columns, rows = cells.shape[:2]
    agent = columns // 2, rows - 1
    carried = _thing(cells[agent])  # what the agent carries is drawn where it stands
    things = [[_thing(cells[column, row]) for column in range(columns)] for row in range(rows)]
    things[agent[1]][agent[0]] = "you"
    symbols = {**_SYMBOLS, "you": "^"}
    seen = dict.fromkeys(thing for row in things for thing in row)
    letters = iter(_LETTERS)
    symbols |= {thing: next(letters) for thing in seen if thing not in symbols}
    return "\n".join(
        [
            f"Mission: {observation['mission']}",
            f"You look {_DIRECTIONS[int(observation['direction'])]}.",
            *(" ".join(symbols[thing] for thing in row) for row in things),
            ", ".join(f"{symbols[thing]} is {thing}" for thing in seen),
            f"You carry {'nothing' if carried == 'free' else f'a {carried}'}.",
        ]
    )


def _thing(cell: Any) -> str:
    """A cell in words: "wall", "yellow key", "locked red door"."""
    kind, color, state = (int(number) for number in cell)
    if _OBJECTS[kind] in _SYMBOLS:
        return _OBJECTS[kind]
    name = f"{_COLORS[color]} {_OBJECTS[kind]}"
    return f"{_DOORS[state]} {name}" if _OBJECTS[kind] == "door" else name
