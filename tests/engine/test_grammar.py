import gc
import json
import re
import sys
import weakref
from enum import Enum
from random import Random
from typing import Literal

import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimoflash.engine import grammar as grammar_module
from mimoflash.engine.grammar import Grammar
from mimoflash.engine.sampling import RowState, Sampler, SamplingParams
from mimoflash.text import parse_chat, render_chat, train_tokenizer

PADDING = 23  # tokens of the model that the tokenizer does not know


@pytest.fixture(scope="module")
def tokenizer():
    texts = ['{"name": "the quick brown fox", "count": 12}', "<tool_call>\n<function=add>\n<parameter=a>3</parameter>"]
    return train_tokenizer(texts * 30, 400)


def verdict(grammar, tokenizer, text, stop_ids=None):
    """Whether a text is one of the grammar's ("whole"), can become one ("part"), or neither ("wrong")."""
    stop_ids = tokenizer.stop_ids if stop_ids is None else stop_ids
    state = grammar.start(tokenizer, tokenizer.vocab_size + PADDING, stop_ids)
    for token in tokenizer.encode(text):
        mask = state.mask()
        assert not mask[tokenizer.vocab_size :].any()
        if not mask[token]:
            return "wrong"
        state.accept(token)
    ends = state.mask()[list(stop_ids)]
    assert ends.all() == ends.any()
    return "whole" if ends.all() else "part"


def wander(grammar, tokenizer, seed, longest=400):
    """A text of the grammar, token by token at random, ended where it may be more often than not."""
    random = Random(seed)
    state = grammar.start(tokenizer, tokenizer.vocab_size + PADDING, tokenizer.stop_ids)
    tokens: list[int] = []
    while not state.is_finished:
        assert len(tokens) < longest
        allowed = state.mask().nonzero()[:, 0].tolist()
        ends = [token for token in allowed if token in tokenizer.stop_ids]
        token = random.choice(ends if ends and random.random() < 0.6 else allowed)
        state.accept(token)
        tokens.append(token)
    assert tokens[-1] in tokenizer.stop_ids
    return tokenizer.decode(tokens[:-1])


# JSON -------------------------------------------------------------------------------------------------------------


class Colour(Enum):
    red = "red"
    blue = "blue"


class Point(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    x: int = pydantic.Field(ge=-5, le=70)
    y: float | None = None


class Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=4)
    kind: Literal["a", "b"] | bool
    colour: Colour
    points: list[Point] = pydantic.Field(max_length=2)


def test_what_a_schema_allows_is_what_pydantic_reads(tokenizer):
    schema = Answer.model_json_schema() | {"x-guidance": {"whitespace_flexible": False}}
    grammar = Grammar.json_schema(schema)
    seen = [Answer.model_validate_json(wander(grammar, tokenizer, seed), strict=True) for seed in range(25)]
    assert len({answer.model_dump_json() for answer in seen}) > 20


@given(
    st.builds(
        Answer,
        name=st.text(max_size=4),
        kind=st.sampled_from(["a", "b", True]),
        colour=st.sampled_from(Colour),
        points=st.lists(st.builds(Point, x=st.integers(-5, 70), y=st.none() | st.floats(-9, 9)), max_size=2),
    ),
    st.sampled_from([None, 1]),
)
def test_what_pydantic_writes_is_what_a_schema_allows(tokenizer, answer, indent):
    grammar = Grammar.json_schema(json.dumps(Answer.model_json_schema()))
    text = answer.model_dump_json(indent=indent)
    assert verdict(grammar, tokenizer, text) == "whole"
    assert verdict(grammar, tokenizer, text[:-1]) == "part"
    assert verdict(grammar, tokenizer, text.replace('"colour"', '"color"')) == "wrong"


@pytest.mark.parametrize(
    ("prompt", "whole", "wrong"),
    [
        (None, ["7"], ["<think>a</think>7", "a"]),
        ("assistant\n", ["7", "<think>Five\nor so</think>7", "<think></think>\n\n7"], ["a</think>7", "so 7"]),
        ("assistant\n<think>", ["Well</think>7"], []),
        ("assistant\n<think></think>", ["7"], ["<think></think>7"]),
    ],
)
def test_reasoning_may_come_before_an_answer_where_the_prompt_leaves_it_open(tokenizer, prompt, whole, wrong):
    grammar = Grammar.json_schema({"type": "integer"}, prompt)
    assert {text: verdict(grammar, tokenizer, text) for text in whole} == dict.fromkeys(whole, "whole")
    assert {text: verdict(grammar, tokenizer, text) for text in wrong} == dict.fromkeys(wrong, "wrong")


# Regex and Lark ---------------------------------------------------------------------------------------------------

PATTERNS = [r"[0-9]{2,4}(\.[a-f]+)?", r"(ab|c/d)*\n", r'"[^"]{0,5}"', "fox|the quick( brown)? fox"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regex_allows_what_it_matches(tokenizer, pattern):
    grammar = Grammar.regex(pattern)
    texts = [wander(grammar, tokenizer, seed) for seed in range(10)]
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert len(set(texts)) > 1
    for text in texts:
        assert verdict(grammar, tokenizer, text) == "whole"
        broken = text[: len(text) // 2] + "~" + text[len(text) // 2 :]
        is_match = re.fullmatch(pattern, broken) is not None
        assert (verdict(grammar, tokenizer, broken) == "whole") == is_match


def test_a_grammar_may_name_control_tokens_and_text_may_not_hold_them(tokenizer):
    grammar = Grammar.lark("start: PAIR <|im_start|> rest\nPAIR: /[(][)]/\nrest: /.*/")
    assert verdict(grammar, tokenizer, "()<|im_start|>a<think>b") == "whole"
    assert verdict(grammar, tokenizer, "()<|im_start|>a<|im_start|>") == "wrong"
    nested = Grammar.lark('start: "(" start ")" | "x"')
    assert [verdict(nested, tokenizer, text) for text in ("((x))", "((x)", "(x))")] == ["whole", "part", "wrong"]


# Tool calls -------------------------------------------------------------------------------------------------------

ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {
            "note": {"type": "string"},
            "a": {"type": "integer", "minimum": 0, "maximum": 50},
            "unit": {"enum": ["C", "F", None, 3]},
            "where": {"$ref": "#/$defs/Place"},
            "loud": {"type": ["boolean", "null"]},
            "either": {"anyOf": [{"type": "number"}, {"const": "none"}]},
        },
        "required": ["a", "note"],
        "$defs": {
            "Place": {"type": "object", "properties": {"at": {"$ref": "#/$defs/At"}}, "additionalProperties": False},
            "At": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        },
    },
}
TOOLS = [{"type": "function", "function": ADD}, {"name": "stop"}]
ARGUMENTS = st.fixed_dictionaries(
    {"a": st.integers(0, 50), "note": st.text(st.characters(codec="utf-8"), max_size=12)},
    optional={
        "unit": st.sampled_from(["C", "F", None, 3]),
        "where": st.fixed_dictionaries({}, optional={"at": st.lists(st.integers(-99, 99), max_size=2)}),
        "loud": st.sampled_from([True, False, None]),
        "either": st.just("none") | st.integers(-5, 5) | st.sampled_from([0.5, -2.25, 1e-7]),
    },
)


@given(calls=st.lists(st.tuples(st.permutations(range(6)), ARGUMENTS), max_size=2), text=st.booleans())
def test_the_calls_that_the_chat_template_writes_are_allowed(tokenizer, calls, text):
    asked = []
    for order, arguments in calls:
        arguments = dict(sorted(arguments.items(), key=lambda item: order[list(arguments).index(item[0])]))
        asked.append({"function": {"name": "add", "arguments": arguments}})
    asked.append({"function": {"name": "stop", "arguments": {}}})
    content = "Let me see < here > " if text else ""
    prompt = [{"role": "user", "content": "x"}]
    answer = {"role": "assistant", "content": content, "tool_calls": asked}
    before = render_chat(tokenizer, prompt)
    written = render_chat(tokenizer, [*prompt, answer], generation_prompt=False)
    written = written.removeprefix(before).removesuffix("<|im_end|>")
    assert verdict(Grammar.tools(TOOLS, "auto", before), tokenizer, written) == "whole"
    required = verdict(Grammar.tools(TOOLS, "required", before), tokenizer, written)
    assert (required == "whole") == (not text)


@pytest.mark.parametrize("choice", ["auto", "required", "add"])
def test_allowed_calls_are_read_back_whole_and_typed(tokenizer, choice):
    bounded = {  # at random, free text goes on for ever and a number's exponent beyond what is a number
        "note": {"enum": ["x", "y\n<z"]},
        "where": {"type": "array", "items": {"const": 1}, "maxItems": 1},
        "either": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 9}, {"const": "none"}]},
    }
    properties = {**ADD["parameters"]["properties"], **bounded}
    tools = [{**ADD, "parameters": {**ADD["parameters"], "properties": properties}}, {"name": "stop"}]
    grammar = Grammar.tools(tools, choice, "<think></think>")
    start = "<tool_call>" if choice == "auto" else ""
    seen = set()
    for seed in range(12):
        random, tokens = Random(seed), tokenizer.encode(start)
        state = grammar.start(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
        for token in tokens:
            state.accept(token)
        while "</tool_call>" not in tokenizer.decode(tokens) and len(tokens) < 600:
            tokens.append(random.choice(state.mask().nonzero()[:, 0].tolist()))
            state.accept(tokens[-1])
        assert state.mask()[list(tokenizer.stop_ids)].all()
        message = parse_chat(tokenizer.decode(tokens), tools, "<think></think>")
        assert message["content"] == ""
        (call,) = message["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        seen.add(call["function"]["name"])
        if call["function"]["name"] == "add":
            assert set(arguments) >= {"a", "note"}
            assert arguments["a"] in range(51)
            assert type(arguments["a"]) is int
            assert arguments["note"] in ("x", "y\n<z")
            assert arguments.get("unit", 3) in ("C", "F", None, 3)
            assert arguments.get("loud") in (True, False, None)
            assert arguments.get("where", []) in ([], [1])
            assert arguments.get("either") == "none" or type(arguments.get("either", 1)) in (int, float)
        else:
            assert arguments == {}
    assert seen == ({"add"} if choice == "add" else {"add", "stop"})


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("<tool_call>\n<function=", "sub>"),
        ("<tool_call>\n<function=add>\n", "</function>"),  # required ones are missing
        ("<tool_call>\n<function=add>\n<parameter=a>5", "1"),
        ("<tool_call>\n<function=add>\n<parameter=a>5</parameter>\n<parameter=", "a>"),
        ("<tool_call>\n<function=add>\n<parameter=", "b>"),
        ("<tool_call>\n<function=add>\n<parameter=unit>", "K"),
        ('<tool_call>\n<function=add>\n<parameter=where>{"', "of"),
        ("<tool_call>\n<function=add>\n<parameter=loud>", "yes"),
        ("<tool_call>\n<function=stop></function>", "</function>"),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_wrong_calls_are_not_allowed(tokenizer, choice, good, bad):
    grammar = Grammar.tools(TOOLS, choice)
    assert (verdict(grammar, tokenizer, good), verdict(grammar, tokenizer, good + bad)) == ("part", "wrong")


@pytest.mark.parametrize(
    ("choice", "prompt", "text", "expected"),
    [
        ("auto", "", "No call < at all", "whole"),
        ("auto", "", "<think>Hm.</think>Yes <tool_call><function=stop></function></tool_call> done.", "whole"),
        ("auto", "", "<tool_call>hello", "wrong"),
        ("required", "", "Hello", "wrong"),
        ("required", "", "<think>Hm.</think><tool_call><function=stop></function></tool_call>", "whole"),
        ("required", "", "<think>Hm.</think>Hello", "wrong"),
        ("required", "", "<tool_call><function=stop></function></tool_call>", "whole"),
        ("required", "", "<tool_call><function=stop></function></tool_call> done.", "wrong"),
        ("required", "<think>", "Hm.</think>\n\n<tool_call><function=stop></function></tool_call>", "whole"),
        ("required", "<think>", "Hm. <tool_call><function=stop></function></tool_call>", "whole"),  # it ends reasoning
        ("required", "<think>", "Hm. <tool_call><function=st</think>", "wrong"),
        ("stop", "<think></think>", "<tool_call><function=stop>", "part"),
        ("stop", "<think></think>", "<tool_call><function=add>", "wrong"),
    ],
)
def test_text_around_calls(tokenizer, choice, prompt, text, expected):
    assert verdict(Grammar.tools(TOOLS, choice, prompt), tokenizer, text) == expected


@pytest.mark.parametrize(("prompt", "text", "expected"), [
    ("", '{"degrees": 3}', "whole"),
    ("", "<think>Hm.</think>\n\n{\"degrees\": 3}", "whole"),
    ("", "<tool_call><function=stop></function></tool_call>", "whole"),
    ("", "<think>Hm.</think><tool_call><function=stop></function></tool_call>\n<tool_call>", "part"),
    ("", "Three", "wrong"),
    ("", '{"degrees": "3"', "wrong"),
    ("", '{"degrees": 3}<tool_call>', "wrong"),
    ("<think>", 'Hm.</think>{"degrees": 3}', "whole"),
    ("<think></think>", '{"degrees": 3}', "whole"),
    ("<think></think>", "<think>", "wrong"),
])
def test_an_answer_by_a_schema_or_calls(tokenizer, prompt, text, expected):
    schema = {"type": "object", "properties": {"degrees": {"type": "integer"}}, "required": ["degrees"]}
    assert verdict(Grammar.tools(TOOLS, "auto", prompt, schema=schema), tokenizer, text) == expected


# The engine's side ------------------------------------------------------------------------------------------------


def test_an_end_token_is_allowed_where_the_text_may_end_and_alone_where_it_must(tokenizer):
    comma = tokenizer.encode(",")[0]
    state = Grammar.regex("a|ab,?").start(tokenizer, tokenizer.vocab_size, frozenset([comma]))
    a, b = (tokenizer.encode(char)[0] for char in "ab")
    assert not state.mask()[comma]
    state.accept(a)
    assert state.mask()[[comma, b]].all()
    state.accept(b)
    assert state.mask().nonzero()[:, 0].tolist() == [comma]  # here it ends the text, whatever it says
    assert not state.is_finished
    state.accept(comma)
    assert state.is_finished


def test_without_end_tokens_a_text_ends_where_nothing_can_follow(tokenizer):
    row = RowState(SamplingParams(grammar=Grammar.regex("ab?")), [1], tokenizer.vocab_size, tokenizer=tokenizer)
    a, b = (tokenizer.encode(char)[0] for char in "ab")
    logits = torch.zeros(3, tokenizer.vocab_size)
    logits[:, tokenizer.special.im_end] = 9.0
    (taken,) = Sampler().pick(logits, [row], [[a, b]])
    assert [one.token for one in taken] == [a, b]
    assert row.is_finished
    assert row.error is None


def test_requests_of_one_grammar_do_not_share_their_place(tokenizer):
    grammar = Grammar.regex("ab")
    first, second = (grammar.start(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids) for _ in range(2))
    first.accept(tokenizer.encode("a")[0])
    assert second.mask()[tokenizer.encode("a")].all()
    assert not first.mask()[tokenizer.encode("a")].any()


def test_a_tokenizer_is_not_kept_alive():
    short_lived = train_tokenizer(["abc"], 265)
    Grammar.regex("a").start(short_lived, 300, short_lived.stop_ids)
    seen = weakref.ref(short_lived)
    del short_lived
    gc.collect()
    assert seen() is None


def test_a_grammar_that_meets_the_logit_bias_costs_only_its_request(tokenizer):
    (a,) = tokenizer.encode("a")
    params = [SamplingParams(grammar=Grammar.regex("a"), logit_bias={a: bias}) for bias in (0.0, float("-inf"))]
    rows = [
        RowState(p, [1], tokenizer.vocab_size, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer) for p in params
    ]  # fmt: skip
    taken = Sampler().pick(torch.zeros(2, tokenizer.vocab_size), rows)
    assert [[one.token for one in each] for each in taken] == [[a], []]
    assert rows[0].error is None
    assert "no token is allowed" in rows[1].error


def with_properties(properties):
    return Grammar.tools([{"name": "f", "parameters": {"type": "object", "properties": properties}}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.regex("(a"), "unclosed group"),
        (lambda: Grammar.json_schema({"type": "strin"}), "JSON schema.*strin"),
        (lambda: Grammar.json_schema({"propertyNames": {"pattern": "a"}}), "propertyNames"),
        (lambda: Grammar.json_schema("{"), "JSON schema"),
        (lambda: Grammar.tools([]), "needs one"),
        (lambda: Grammar.tools(TOOLS, "sub"), "'sub'.*add, stop"),
        (lambda: Grammar.tools([{"name": "a>b"}]), "'a>b'"),
        (lambda: with_properties({"x": {"$ref": "#/a"}}), "#/a leads"),
        (lambda: with_properties({"x": {"type": "strin"}}), "strin"),
        (lambda: with_properties({"x": {"$ref": "#/properties/x"}}), "circle"),
        (lambda: with_properties(dict.fromkeys(map(str, range(65)))), "65 parameters"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make()


def test_a_bad_lark_grammar_is_refused_when_a_request_brings_it(tokenizer):
    with pytest.raises(ValueError, match='unknown name: "b"'):
        RowState(SamplingParams(grammar=Grammar.lark("start: b")), [1], tokenizer.vocab_size, tokenizer=tokenizer)


def test_without_llguidance_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammar_module._llguidance.cache_clear()
    with pytest.raises(ImportError, match="pip install llguidance"):
        Grammar.regex("a")
    grammar_module._llguidance.cache_clear()
