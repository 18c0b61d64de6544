"""Tool use over two turns: call the right one of several tools with the right arguments, then say what it returned.

The tools differ from task to task and the values are made up, so that nothing but the tools on offer and the request
says what to call, and nothing but the tool's result says what to answer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, ClassVar

from mimoflash.world.answers import calls_of, content_of, last_number, same_value
from mimoflash.world.protocol import Demonstration, Message, Step, Tool, check_levels
from mimoflash.world.tool_pool import PARAMETERS, Lookup, draw_lookups

CHANCE_TASKS = 500

_OPENINGS = (
    "What is the {quantity} of the {thing}",
    "Tell me the {thing} {quantity}",
    "I need the {quantity} of a {thing}",
    "Please look up the {thing} {quantity}",
)


@dataclass(frozen=True)
class Errand:
    """One task: the tools on offer, which of them is meant, its arguments, the request, and what the tool returns."""

    offered: list[Lookup]
    meant: Lookup
    arguments: dict[str, Any]
    request: str
    returns: int

    def tools(self) -> list[Tool]:
        return [lookup.tool() for lookup in self.offered]

    def result(self) -> str:
        return json.dumps({self.meant.quantity: self.returns})


class ToolUse:
    """The environment: a right call is answered by the tool's result; a wrong one ends the episode.

    Reward 1.0 for the right call and then the returned number as the last number of the content, else 0.0 with the part
    that failed in `info["failed"]`: "call" or "answer".
    """

    def __init__(self, errands: "Tools") -> None:
        self._errands = errands
        self._errand: Errand | None = None
        self._called = False

    def reset(self, seed: int) -> tuple[list[Message], list[Tool]]:
        self._errand, self._called = self._errands.errand(seed), False
        return [{"role": "user", "content": self._errand.request}], self._errand.tools()

    def step(self, message: Message) -> Step:
        if self._errand is None:
            raise ValueError("ToolUse.step: no task is open; call reset(seed) first")
        if self._called:
            return self._take_answer(self._errand, message)
        return self._take_call(self._errand, message)

    def close(self) -> None:
        self._errand = None

    def _take_call(self, errand: Errand, message: Message) -> Step:
        why = _fault(errand, calls_of(message))
        if why:
            self._errand = None
            return Step([], 0.0, True, {"failed": "call", "why": why})
        self._called = True
        result = {"role": "tool", "content": errand.result()}
        call_id = message["tool_calls"][0].get("id")
        if isinstance(call_id, str):
            result["tool_call_id"] = call_id
        return Step([result], 0.0, False, {})

    def _take_answer(self, errand: Errand, message: Message) -> Step:
        self._errand = None
        if calls_of(message):
            return Step([], 0.0, True, {"failed": "answer", "why": "another call"})
        given = last_number(content_of(message))
        if given != str(errand.returns):
            return Step([], 0.0, True, {"failed": "answer", "why": f"says {given}, the tool returned {errand.returns}"})
        return Step([], 1.0, True, {})


def _fault(errand: Errand, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What is wrong with the calls; "" if it is the one right call."""
    if len(calls) != 1:
        return f"{len(calls)} calls instead of one"
    name, arguments = calls[0]
    if name != errand.meant.name:
        return "the wrong tool"
    return "" if same_value(arguments, errand.arguments) else "the wrong arguments"


@dataclass(frozen=True)
class Tools:
    """Requests such as "Tell me the ticket price, in zuri, over 41 days." with a few generated tools on offer.

    `offered` are the levels: how many tools, drawn evenly (a number given twice weighs twice). A tool has from one to
    `parameters` parameters, of the given `kinds` (string, integer, boolean, array, enum).

    The random guesser draws one of the k tools and fills each of its parameters: a boolean and an enum by an even draw
    from their values, a string and an integer by one of the request's W words, an array by a run of words (of which
    there are W (W + 1) / 2). He repeats what the tool returned. On one task he passes with probability
    1/k times the product over the right tool's parameters of 1/2, 1/choices, 1/W or 2/(W (W + 1));
    chance = its mean over the first 500 seeds.
    """

    offered: Sequence[int] = (2, 3)
    parameters: int = 2
    kinds: Sequence[str] = tuple(PARAMETERS)
    name: ClassVar[str] = "tools"

    def __post_init__(self) -> None:
        check_levels("tools: offered", self.offered, 1, 10)
        kinds = list(self.kinds) if isinstance(self.kinds, list | tuple) else []
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= PARAMETERS.keys():
            raise ValueError(f"tools: kinds is {self.kinds!r}; give a list of some of {', '.join(PARAMETERS)}")
        if not 1 <= self.parameters <= len(kinds):
            raise ValueError(f"tools: parameters is {self.parameters}; from 1 to {len(kinds)} are possible")

    @cached_property
    def chance(self) -> float:
        return sum(guess_pass_rate(self.errand(seed)) for seed in range(CHANCE_TASKS)) / CHANCE_TASKS

    def errand(self, seed: int) -> Errand:
        rng = Random(seed)
        offered = draw_lookups(rng, rng.choice(self.offered), self.parameters, self.kinds)
        meant = offered[0]
        rng.shuffle(offered)
        arguments = {parameter.name: parameter.draw(rng) for parameter in meant.parameters}
        said = [parameter.say(arguments[parameter.name], rng) for parameter in meant.parameters]
        rng.shuffle(said)
        opening = rng.choice(_OPENINGS).format(thing=meant.thing, quantity=meant.quantity)
        request = f"{', '.join([opening, *said])}{'?' if opening.startswith('What') else '.'}"
        return Errand(offered, meant, arguments, request, rng.randint(10, 999))

    def environment(self) -> ToolUse:
        return ToolUse(self)

    def demonstration(self, seed: int) -> Demonstration:
        errand = self.errand(seed)
        meant = errand.meant
        call = {"type": "function", "function": {"name": meant.name, "arguments": errand.arguments}}
        messages: list[Message] = [
            {"role": "user", "content": errand.request},
            {
                "role": "assistant",
                "reasoning_content": f"Look up the {meant.thing} {meant.quantity}: {meant.name}.",
                "content": "",
                "tool_calls": [call],
            },
            {"role": "tool", "content": errand.result()},
            {
                "role": "assistant",
                "reasoning_content": f"It returned {errand.returns}.",
                "content": f"The {meant.quantity} of the {meant.thing} is {errand.returns}.",
            },
        ]
        return Demonstration(messages, errand.tools())


def guess_pass_rate(errand: Errand) -> float:
    """The probability that the random guesser makes the right call."""
    words = len(errand.request.split())
    rate = 1 / len(errand.offered)
    for parameter in errand.meant.parameters:
        runs = words * (words + 1) / 2
        rate /= {"boolean": 2, "enum": len(parameter.choices), "array": runs}.get(parameter.kind, words)
    return rate
