"""Argument values of tool calls: from the text between parameter tags to the type that the JSON schema asks for."""

import json
from collections.abc import Mapping
from typing import Any

_SPELLINGS: dict[str, dict[str, bool | None]] = {
    "null": {"null": None, "None": None},
    "boolean": {"true": True, "True": True, "false": False, "False": False},
}


def typed_argument(text: str, parameters: Any, name: str) -> Any:
    """The value that `text` stands for as parameter `name` of a function whose JSON schema is `parameters`.

    A string is verbatim, and so is text that fits none of the types its schema allows, or has no schema. Where strings
    and other types are allowed, the others come first: `null` of a nullable string is None, while `null` of a string
    stays text. Python's spellings True, False and None are read as well, since calls are rendered with `str`.
    """
    types, literals = _alternatives(_schema_of(parameters, name), parameters, depth=8)
    if text in (literal for literal in literals if isinstance(literal, str)):
        return text
    for literal in literals:
        if text in (str(literal), json.dumps(literal)):
            return literal
    for kind, spellings in _SPELLINGS.items():
        if kind in types and text.strip() in spellings:
            return spellings[text.strip()]
    value = strict_json(text) if types & {"integer", "number", "array", "object"} else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "integer" in types and value == int(value):
            return int(value)
        return value if "number" in types else text
    if (isinstance(value, list) and "array" in types) or (isinstance(value, dict) and "object" in types):
        return value
    return text


def _schema_of(parameters: Any, name: str) -> Any:
    if not isinstance(parameters, Mapping):
        return None
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return parameters.get("additionalProperties")


def _alternatives(schema: Any, root: Any, depth: int) -> tuple[set[str], list[Any]]:
    """All type names and all literal values (enum, const) that a schema allows, through alternatives and references."""
    if not isinstance(schema, Mapping) or depth == 0:
        return set(), []
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {name for name in _list(named) if isinstance(name, str)}
    literals = _list(schema.get("enum")) + ([schema["const"]] if "const" in schema else [])
    if not types:
        types = {"object"} if "properties" in schema else {"array"} if "items" in schema else set()
    others = [other for key in ("anyOf", "oneOf", "allOf") for other in _list(schema.get(key))]
    if isinstance(schema.get("$ref"), str):
        others.append(_resolve(schema["$ref"], root))
    for other in others:
        more_types, more_literals = _alternatives(other, root, depth - 1)
        types |= more_types
        literals += more_literals
    return types, literals


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _resolve(reference: str, root: Any) -> Any:
    """The schema at a local JSON pointer such as `#/$defs/Point`, None where there is none."""
    for part in reference.removeprefix("#").strip("/").split("/"):
        root = root.get(part) if isinstance(root, Mapping) else None
    return root


def strict_json(text: str) -> Any:
    """The JSON value of a text, None where it is not strict JSON whose strings can be written as UTF-8."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogate, no NaN or infinity
    except (ValueError, RecursionError):
        return None
    return value
