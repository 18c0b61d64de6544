"""Argument values by JSON schema."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.text import typed_argument

ROOT = {"properties": {"x": None}, "$defs": {"Point": {"properties": {"a": {}}}, "Loop": {"$ref": "#/$defs/Loop"}}}


def typed(text: str, schema: Any) -> Any:
    return typed_argument(text, {**ROOT, "properties": {"x": schema}}, "x")


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " -5\n", -5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "integer"}, "1_000", "1_000"),
        ({"type": "integer"}, "٣", "٣"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "integer"}, "1" * 5000, "1" * 5000),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "1e-7", 1e-7),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "five", "five"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "null"}, "null", None),
        ({"type": "array"}, '[1, {"a": null}]', [1, {"a": None}]),
        ({"type": "array"}, "{}", "{}"),
        ({"type": "array"}, "[1, NaN]", "[1, NaN]"),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"type": "object"}, '{"a": "\\ud800"}', '{"a": "\\ud800"}'),  # no UTF-8 for it
        ({"type": "object"}, "{'a': 1}", "{'a': 1}"),
        ({"properties": {}}, "{}", {}),
        ({"items": {}}, "[]", []),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "nullable", "nullable"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "7", 7),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "seven", "seven"),
        ({"oneOf": [{"type": "array"}, {"type": "null"}]}, "None", None),
        ({"allOf": [{"$ref": "#/$defs/Point"}]}, '{"a": 1}', {"a": 1}),
        ({"$ref": "#/$defs/Point"}, '{"a": 1}', {"a": 1}),
        ({"$ref": "#/$defs/Loop"}, "1", "1"),
        ({"$ref": "#/nowhere"}, "1", "1"),
        ({"enum": ["1", 1, 2, None]}, "1", "1"),
        ({"enum": ["1", 1, 2, None]}, "2", 2),
        ({"enum": ["1", 1, 2, None]}, "null", None),
        ({"enum": ["a", "b"]}, "c", "c"),
        ({"const": True}, "True", True),
        ({}, "1", "1"),
        (True, "1", "1"),
        (None, "1", "1"),
        ({"type": 3, "enum": "x", "anyOf": 5}, "1", "1"),
    ],
)
def test_value(schema: Any, text: str, value: Any):
    result = typed(text, schema)
    assert result == value
    assert type(result) is type(value)


def test_parameters_without_a_declaration():
    assert typed_argument("1", None, "x") == "1"
    assert typed_argument("1", {"properties": []}, "x") == "1"
    assert typed_argument("1", {"additionalProperties": {"type": "integer"}}, "x") == 1
    assert typed_argument("1", {"additionalProperties": False}, "x") == "1"


@given(st.text(), st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"]))
def test_a_value_has_its_type_or_is_the_text(text: str, kind: str):
    python = {
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    value = typed(text, {"type": kind})
    assert value == text if isinstance(value, str) else isinstance(value, python[kind])
    json.dumps(value, ensure_ascii=False).encode()
