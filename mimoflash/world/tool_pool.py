"""The pool that tools are generated from: quantities of things, looked up with parameters of several types.

A tool is named after what it looks up ("get_ticket_price"); its parameters are drawn from twenty names of five kinds.
Values are words made of syllables, and numbers, so that a request asks for values that nobody has seen before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from mimoflash.world.protocol import Tool

VERBS = ("get", "find", "check", "read")
THINGS = (
    "ticket", "room", "house", "car", "boat", "train", "river", "road", "tower", "garden",
    "shop", "phone", "battery", "engine", "ship", "bridge", "field", "forest", "lake", "tank",
)
QUANTITIES = (
    "price", "weight", "height", "length", "depth", "speed", "age", "score", "stock", "delay",
    "load", "rating", "tax", "discount", "distance", "pressure", "capacity", "width", "level", "demand",
)

# A parameter's name and how a request says its value.
PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "string": {
        "city": ("in {}", "city {}"),
        "owner": ("owned by {}", "owner {}"),
        "brand": ("made by {}", "brand {}"),
        "code": ("with code {}", "code {}"),
    },
    "integer": {
        "year": ("for the year {}", "year {}"),
        "days": ("over {} days", "days {}"),
        "floor": ("on floor {}", "floor {}"),
        "limit": ("up to {}", "limit {}"),
    },
    "boolean": {
        "exact": ("exact: {}",),
        "public": ("public: {}",),
        "urgent": ("urgent: {}",),
        "cached": ("cached: {}",),
    },
    "array": {
        "tags": ("tagged {}", "tags {}"),
        "names": ("named {}", "names {}"),
        "groups": ("from groups {}", "groups {}"),
        "rows": ("from rows {}", "rows {}"),
    },
    "enum": {
        "unit": ("in unit {}", "unit {}"),
        "mode": ("in {} mode", "mode {}"),
        "color": ("colored {}", "color {}"),
        "size": ("of size {}", "size {}"),
    },
}
CHOICES = {
    "unit": ("metric", "imperial", "nautical", "custom"),
    "mode": ("fast", "careful", "silent", "dry"),
    "color": ("red", "green", "blue", "black"),
    "size": ("small", "medium", "large", "huge"),
}
_YES, _NO = ("yes", "on", "true"), ("no", "off", "false")
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str  # a key of PARAMETERS
    choices: tuple[str, ...] = ()  # of an enum

    def schema(self) -> dict[str, Any]:
        if self.kind == "enum":
            return {"type": "string", "enum": list(self.choices)}
        return {"type": self.kind}

    def draw(self, rng: Random) -> Any:
        """A value of the parameter's type."""
        if self.kind == "string":
            return made_up_word(rng)
        if self.kind == "integer":
            return rng.randint(2, 99)
        if self.kind == "boolean":
            return rng.random() < 0.5
        if self.kind == "enum":
            return rng.choice(self.choices)
        return [made_up_word(rng) for _ in range(rng.randint(1, 3))]

    def say(self, value: Any, rng: Random) -> str:
        """The value as a request says it."""
        if self.kind == "boolean":
            value = rng.choice(_YES if value else _NO)
        elif self.kind == "array":
            value = ", ".join(value[:-1]) + " and " + value[-1] if len(value) > 1 else value[0]
        return rng.choice(PARAMETERS[self.kind][self.name]).format(value)


@dataclass(frozen=True)
class Lookup:
    """A tool that looks up one quantity of one thing. The schema is terse: small models have short contexts."""

    verb: str
    thing: str
    quantity: str
    parameters: tuple[Parameter, ...]

    @property
    def name(self) -> str:
        return f"{self.verb}_{self.thing}_{self.quantity}"

    def tool(self) -> Tool:
        properties = {parameter.name: parameter.schema() for parameter in self.parameters}
        parameters = {"type": "object", "properties": properties}
        description = f"{self.thing.capitalize()} {self.quantity}."
        return {
            "type": "function",
            "function": {"name": self.name, "description": description, "parameters": parameters},
        }


def made_up_word(rng: Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3)))


def draw_lookups(rng: Random, count: int, parameters: int, kinds: Sequence[str]) -> list[Lookup]:
    """`count` different tools, the first of them the one to ask for, with one to `parameters` parameters each, of
    different `kinds`.

    Every other tool shares the thing or the quantity with the first, so that both words have to be read.
    """
    things, quantities = rng.sample(THINGS, count), rng.sample(QUANTITIES, count)
    pairs = [(things[0], quantities[0])]
    for thing, quantity in zip(things[1:], quantities[1:], strict=True):
        pairs.append((things[0], quantity) if rng.random() < 0.5 else (thing, quantities[0]))
    return [
        Lookup(rng.choice(VERBS), thing, quantity, _draw_parameters(rng, rng.randint(1, parameters), kinds))
        for thing, quantity in pairs
    ]


def _draw_parameters(rng: Random, count: int, kinds: Sequence[str]) -> tuple[Parameter, ...]:
    drawn = []
    for kind in rng.sample(list(kinds), count):
        name = rng.choice(list(PARAMETERS[kind]))
        choices = tuple(rng.sample(CHOICES[name], 2)) if kind == "enum" else ()
        drawn.append(Parameter(name, kind, choices))
    return tuple(drawn)
