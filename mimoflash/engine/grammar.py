"""Grammars: which tokens may come next so that the text follows a JSON schema, a regex, a grammar, or calls a tool.

llguidance does the parsing. Here are its grammars for the family's tool calls, and the masks over a model's vocabulary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mimoflash.text import Tokenizer
from mimoflash.text.parser import (
    CALL,
    END_CALL,
    END_FUNCTION,
    END_PARAMETER,
    END_THINK,
    FUNCTION,
    PARAMETER,
    THINK,
)

_MOST_PARAMETERS = 64  # of a function: llguidance tells which are given by the bits of one number
_KEPT_GRAMMARS = 64  # compiled, for each tokenizer


@dataclass(frozen=True)
class Grammar:
    """What generated text must look like, as llguidance's own source. Make one by `json_schema`, `regex`, `lark` or
    `tools`; all raise ValueError for what llguidance refuses, with its reason."""

    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str, prompt: str | None = None) -> "Grammar":
        """JSON that fits the schema. `prompt`: that of a chat: reasoning may come before (see `tools`)."""
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            start = "answer" if prompt is None else _answer_after_reasoning(prompt)
            rules = [f"start: {start}", _THOUGHT, _answer_rule(schema)]
            return cls(_checked("\n".join(rules)))
        except (TypeError, ValueError) as error:
            reason = str(error).split("compile JSON schema: ")[-1].split("\n")[0]
            raise ValueError(f"this JSON schema cannot be followed: {reason}") from error

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Text that matches the pattern as a whole (the syntax is that of Rust's regex crate, without lookaround)."""
        return cls(_checked(_llguidance().LLMatcher.grammar_from_regex(pattern)))

    @classmethod
    def lark(cls, source: str) -> "Grammar":
        """Text of a context-free grammar in llguidance's variant of Lark; its rule `start` is the whole text.
        Special tokens that it names are looked up when a request starts."""
        _llguidance()
        return cls(source)

    @classmethod
    def tools(
        cls, tools: Sequence[Mapping[str, Any]], choice: str = "auto", prompt: str = "", *, parallel: bool = True,
        schema: Mapping[str, Any] | None = None,
    ) -> "Grammar":
        """Tool calls as the family writes them, `tools` as in OpenAI's API.

        `choice`: "auto" leaves free whether and where in the text calls come, "required" wants one or more and nothing
        else, a tool's name one or more of that tool. Names, types, enums and the JSON of containers are enforced,
        required parameters come once, others at most once, in any order; a string is any text. Without `parallel` a
        call that has to come is the only one. With `schema`, "auto" wants either calls or JSON that fits it. `prompt`
        says by its end, as for `ChatParser`, whether reasoning is open (it must be closed), closed, or may be opened
        first.
        """
        functions = {tool.get("function", tool)["name"]: tool.get("function", tool) for tool in tools}
        if choice not in ("auto", "required", *functions):
            raise ValueError(f"tool choice {choice!r}: it must be auto, required, or one of {', '.join(functions)}")
        if not functions:
            raise ValueError("tools is empty: a grammar of tool calls needs one")
        chosen = [function for name, function in functions.items() if choice in ("auto", "required", name)]
        first = _after_reasoning(prompt, "thought GAP? call | opening body", "call")  # a call ends reasoning as well
        required = f"({first}) (GAP? call)* GAP?" if parallel else first
        if choice != "auto":
            start = required
        elif schema is None:
            start = "(opening body)* text"
        else:
            start = f"{required} | {_answer_after_reasoning(prompt)}"
        options = " | ".join(f"function_{i}" for i in range(len(chosen)))
        rules = [f"start: {start}", f"body: NEWLINE? ({options}) NEWLINE? {_quote(END_CALL)}", _CALLS, _THOUGHT]
        for i, function in enumerate(chosen):
            try:
                rules += _function_rules(f"function_{i}", function)
            except (TypeError, AttributeError, KeyError, RecursionError) as error:
                reason = "it contains itself" if isinstance(error, RecursionError) else "it is no JSON schema"
                raise ValueError(f"the parameters of {function['name']} cannot be enforced: {reason}") from error
        if schema is not None:
            rules.append(_answer_rule(schema))
        return cls(_checked("\n".join(rules)))

    def start(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> "GrammarState":
        """The state before the first token, for a model of `vocab_size` tokens whose text ends at `stop_ids`."""
        vocabulary = _vocabularies.get(tokenizer)
        if vocabulary is None:
            vocabulary = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
        return GrammarState(vocabulary.matcher(self.source), vocabulary.size, vocab_size, stop_ids)


class GrammarState:
    """How far a request's text has come in its grammar. It only goes forward, by the tokens that were taken."""

    def __init__(self, matcher: Any, known: int, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._known, self._vocab_size = matcher, min(known, vocab_size), vocab_size
        self._stop_ids = list(stop_ids)
        self._has_ended = False

    def mask(self) -> Tensor:
        """Which tokens may come next, (V,) bool. An end token may where the text can end, and must where it can only
        end; ids that the tokenizer does not know never. Raises ValueError where llguidance gives up."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed further: {self._matcher.get_error()}")
        mask = np.zeros(self._vocab_size, bool)
        mask[: self._known] = np.unpackbits(bits, count=self._known, bitorder="little")
        mask[self._stop_ids] = self._matcher.is_accepting()
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """`token`, which the mask allows, has been taken."""
        if token in self._stop_ids:
            self._has_ended = True
        else:
            self._matcher.consume_token(token)

    @property
    def is_finished(self) -> bool:
        """An end token was taken, or nothing can follow and there is no end token to say so."""
        stopped = self._matcher.is_stopped() and not self._matcher.is_error()
        return self._has_ended or (stopped and not self._stop_ids)


class _Vocabulary:
    """A tokenizer as llguidance sees it, with the grammars compiled for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.size = tokenizer.vocab_size
        # llguidance's end token is one that no model has: end tokens differ by request, `GrammarState` masks them
        self._tokenizer = _llguidance().LLTokenizer(_Tokens(tokenizer), n_vocab=self.size + 1, eos_token=self.size)
        self._matchers: dict[str, Any] = {}

    def matcher(self, source: str) -> Any:
        matcher = self._matchers.pop(source, None)
        if matcher is None:
            matcher = _llguidance().LLMatcher(self._tokenizer, source)
            if matcher.is_error():
                raise ValueError(f"this grammar cannot be followed: {matcher.get_error().strip()}")
        self._matchers[source] = matcher  # the latest stand last
        if len(self._matchers) > _KEPT_GRAMMARS:
            self._matchers.pop(next(iter(self._matchers)))
        return matcher.deep_copy()


_vocabularies: WeakKeyDictionary[Tokenizer, _Vocabulary] = WeakKeyDictionary()


class _Tokens:
    """The interface of llguidance.TokenizerWrapper: bytes by id. Control tokens are no text to a grammar, the tags of
    reasoning and calls are."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.tokens = [*(tokenizer.decode_bytes([i]) for i in ids), b"<end of grammar>"]
        controls = [i for i in ids if self.tokens[i] != tokenizer.decode_bytes([i], skip_special=True)]
        self.eos_token_id = tokenizer.vocab_size
        self.special_token_ids = [*controls, self.eos_token_id]
        self._core = tokenizer.core  # not the tokenizer: the cache holds it weakly

    def __call__(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids


@cache
def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError("grammars need the package llguidance: pip install llguidance") from error
    return llguidance


def _checked(source: str) -> str:
    if reason := _llguidance().LLMatcher.validate_grammar(source):
        raise ValueError(f"this grammar cannot be followed: {reason.strip()}")
    return source


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_THOUGHT = """
thought[lazy]: /(.|\\n)*<\\/think>/
GAP: /\\n{1,2}/"""
_CALLS = f"""
call: "{CALL}" body
text: /(.|\\n)*/
opening[lazy]: /(.|\\n)*{CALL}/
text_value[lazy]: /(.|\\n)*<\\/parameter>/
NEWLINE: "\\n\""""


def _after_reasoning(prompt: str, thought: str, answer: str) -> str:
    """What is to come by how the prompt ends: within reasoning, after it, or where it may be opened."""
    end = prompt.rstrip()
    maybe = f'"{THINK}" ({thought}) | {answer}'
    return thought if end.endswith(THINK) else answer if end.endswith(END_THINK) else maybe


def _answer_after_reasoning(prompt: str) -> str:
    return _after_reasoning(prompt, "thought GAP? answer", "answer")


def _answer_rule(schema: Any) -> str:
    return f"answer: %json {json.dumps(schema)}"


def _function_rules(rule: str, function: Mapping[str, Any]) -> Iterator[str]:
    """A function with its parameters in any order: bit i of a number tells that the i-th has been given."""
    root = function.get("parameters") or {}
    required = [name for name in root.get("required", ()) if name in root.get("properties", {})]
    names = [*required, *(name for name in root.get("properties", {}) if name not in required)]
    for name in (function["name"], *names):
        if not name or any(char in name for char in "<>\n"):
            raise ValueError(f"{name!r} cannot stand in a tool call: a name must be without <, > and line ends")
    if len(names) > _MOST_PARAMETERS:
        raise ValueError(f"{function['name']} has {len(names)} parameters: {_MOST_PARAMETERS} at most can be enforced")
    rest = f"{rule}_from::0x0" if names else _quote(END_FUNCTION)
    yield f"{rule}: {_quote(FUNCTION + function['name'] + '>')} NEWLINE? {rest}"
    if not names:
        return
    given = f"%if is_ones([0:{len(required)}])" if required else ""
    yield f'{rule}_from::_: "{END_FUNCTION}" {given}'
    for bit in range(len(names)):
        yield f"  | {rule}_{bit} {rule}_from::set_bit({bit}) %if bit_clear({bit})"
    for bit, name in enumerate(names):
        value = " | ".join(_values(root["properties"][name], root))
        yield f"{rule}_{bit}: {_quote(PARAMETER + name + '>')} ({value}) NEWLINE?"


def _values(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """The alternatives of a value and its closing tag, as `typed_argument` reads them: strings verbatim, else JSON."""
    schema = _resolved(schema, root)
    literals = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if literals is not None:
        return [_quote(spelling + END_PARAMETER) for literal in literals for spelling in _spellings(literal)]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            found = dict.fromkeys(value for other in schema[key] for value in _values(other, root))
            return ["text_value"] if "text_value" in found else list(found)
    types = schema.get("type", "string")
    types = [types] if isinstance(types, str) else types
    if "string" in types:
        return ["text_value"]
    plain = [x for x in types if x not in ("boolean", "null")]
    literals = [True, False] * ("boolean" in types) + [None] * ("null" in types)
    values = [_quote(spelling + END_PARAMETER) for literal in literals for spelling in _spellings(literal)]
    if plain:
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        values.append(f'%json {json.dumps({**definitions, **schema, "type": plain})} "{END_PARAMETER}"')
    return values


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema behind its references into the same document (and behind an `allOf` of one); {} allows anything."""
    for _ in range(16):
        if not isinstance(schema, Mapping):
            return {}
        if len(alone := schema.get("allOf", ())) == 1:
            schema = alone[0]
        elif isinstance(schema.get("$ref"), str):
            target: Any = root
            for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
                target = target.get(part) if isinstance(target, Mapping) else None
            if target is None:
                raise ValueError(f"the schema's $ref {schema['$ref']} leads nowhere: it must point into the parameters")
            schema = target
        else:
            return schema
    raise ValueError("the schema's references go round in a circle")


def _spellings(literal: Any) -> list[str]:
    """How a call may write it: JSON, and as Python does what the chat template renders by `str`."""
    if isinstance(literal, str):
        return [literal]
    return list(dict.fromkeys([json.dumps(literal, ensure_ascii=False), str(literal)]))
