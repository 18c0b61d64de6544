"""Python functions as tools: their schemas from signatures, and calls of them by a model that may call them wrongly."""

import inspect
import json
import typing
from collections.abc import Callable, Sequence
from typing import Any

from mimoflash.world.answers import calls_of
from mimoflash.world.protocol import Message, Tool

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


class Toolbox:
    """Functions that a model may call. A parameter named `seed` is the task's own and no part of the schema.

    Raises ValueError for what is no function, and for a parameter whose type is not said (str, int, float, bool, list
    or dict, or list[int] and the like).
    """

    def __init__(self, functions: Sequence[Callable[..., Any]] = ()) -> None:
        if not isinstance(functions, list | tuple) or not all(map(inspect.isfunction, functions)):
            raise ValueError(f"TOOLS is {functions!r}; give a list of functions")
        self._functions = {function.__name__: function for function in functions}
        self.tools: list[Tool] = [_schema(function) for function in functions]

    def answer(self, message: Message, seed: int) -> list[Message]:
        """A tool message for each call in the message. What a function raises is its result, for the model to read."""
        given = message["tool_calls"] if calls_of(message) else []
        answers = []
        for call, (name, arguments) in zip(given, calls_of(message), strict=True):
            answer: Message = {"role": "tool", "content": self._run(name, arguments, seed)}
            if isinstance(call, dict) and isinstance(call.get("id"), str):
                answer["tool_call_id"] = call["id"]
            answers.append(answer)
        return answers

    def _run(self, name: str, arguments: dict[str, Any], seed: int) -> str:
        function = self._functions.get(name)
        if function is None:
            return f"error: there is no tool {name!r}; the tools are {', '.join(self._functions)}"
        parameters = inspect.signature(function).parameters
        try:
            result = function(**{**arguments, "seed": seed} if "seed" in parameters else arguments)
            return result if isinstance(result, str) else json.dumps(result, default=str)
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"


def _schema(function: Callable[..., Any]) -> Tool:
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "seed":
            continue
        properties[parameter.name] = _type(hints.get(parameter.name), f"{function.__name__}({parameter.name})")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    description = inspect.getdoc(function) or function.__name__.replace("_", " ")
    return {
        "type": "function",
        "function": {"name": function.__name__, "description": description, "parameters": parameters},
    }


def _type(hint: Any, where: str) -> dict[str, Any]:
    plain = typing.get_origin(hint) or hint
    if plain not in _TYPES:
        raise ValueError(f"TOOLS: the type of {where} is not one of str, int, float, bool, list and dict; write it so")
    inner = typing.get_args(hint)
    if plain is list and inner:
        return {"type": "array", "items": _type(inner[0], where)}
    return {"type": _TYPES[plain]}
