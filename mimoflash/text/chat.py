"""Conversations as text: OpenAI-style messages through a chat template, for a prompt or for training.

A checkpoint's own template comes first; ours (`chat_template.jinja`) renders the family's format. Templates run in
jinja2's sandbox with the helpers that templates published on the Hugging Face hub expect.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mimoflash.text.tokenizer import FAMILY_TEMPLATE, Tokenizer

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


def render_chat(
    tokenizer_or_template: Tokenizer | str | None,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    *,
    generation_prompt: bool = True,
    enable_thinking: bool = False,
    keep_all_reasoning: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation, by a tokenizer's template, by a template's source, or (None) by ours.

    `generation_prompt` opens the assistant's next turn. `keep_all_reasoning` writes the reasoning of turns before the
    last user message too. `variables`: more that a checkpoint's own template knows. Raises ValueError for what the
    template refuses, for content that is not text, and for arguments that are not an object.
    """
    marked = _render(
        tokenizer_or_template, messages, tools, generation_prompt=generation_prompt,
        **{**(variables or {}), "enable_thinking": enable_thinking, "keep_all_reasoning": keep_all_reasoning},
    )
    return "".join(text for text, _ in _spans(marked))


def encode_training_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    *,
    enable_thinking: bool = False,
    keep_all_reasoning: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether the assistant wrote it.

    The assistant writes from the end of its header to `<|im_end|>` inclusive. An empty `<think></think>` counts as part
    of the header, as the generation prompt writes it; with `enable_thinking` the model writes it itself, unless it
    stands for dropped reasoning. Each span is encoded on its own, so that the ids are those that a prompt and its
    generated answer have. A template without `{% generation %}` tags is rendered turn by turn: ValueError where that
    changes the turns before.
    """
    options: dict[str, Any] = {"enable_thinking": enable_thinking, "keep_all_reasoning": keep_all_reasoning}
    if re.search(r"\{%[-+]?\s*generation\b", tokenizer.template):
        spans = list(_spans(_render(tokenizer, messages, tools, generation_prompt=False, **options)))
    else:
        spans = list(_spans_by_prefix(tokenizer, messages, tools, options))
    ids, mask = [], []
    for text, generated in spans:
        encoded = tokenizer.encode(text)
        ids += encoded
        mask += [generated] * len(encoded)
    return ids, mask


def _spans_by_prefix(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None, options: dict[str, Any]
) -> Iterator[tuple[str, bool]]:
    """(text, written by the assistant) spans of a template without marks: an answer is what its turn adds."""
    done = ""
    ends = [tokenizer.core.id_to_token(index) or "" for index in tokenizer.stop_ids]

    def added(count: int, generation_prompt: bool) -> str:
        nonlocal done
        text = render_chat(tokenizer, messages[:count], tools, generation_prompt=generation_prompt, **options)
        if not text.startswith(done):
            raise ValueError(
                f"the chat template changes earlier turns, once message {count} follows, so that the assistant's part "
                "cannot be told: mark it with {% generation %} tags in the template, or train on one turn at a time"
            )
        new, done = text[len(done) :], text
        return new

    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            yield added(index, True), False
            answer = added(index + 1, False)
            end = max((answer.rfind(text) + len(text) for text in ends if text in answer), default=len(answer))
            yield answer[:end], True
            yield answer[end:], False  # such as the newline after <|im_end|> in many templates
    yield added(len(messages), False), False


def _render(
    source: Tokenizer | str | None,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    *,
    generation_prompt: bool,
    **options: Any,
) -> str:
    """The rendered text with `_OPEN` and `_CLOSE` around what the assistant wrote."""
    tokens = {}
    if isinstance(source, Tokenizer):
        tokens = {name: source.config_token(name) or "" for name in ("bos_token", "eos_token", "pad_token")}
    template = source.template if isinstance(source, Tokenizer) else FAMILY_TEMPLATE if source is None else source
    try:
        return _compile(template).render(
            **{
                **options, **tokens,
                "messages": [_plain_message(message) for message in messages],
                "tools": list(tools) if tools else None,
                "add_generation_prompt": generation_prompt,
            }
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content a string, call arguments an object, no keys without a value."""
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content", "")
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("a message's content has a part that is not text: this model reads text only")
        content = "".join(part["text"] for part in content)
    plain["content"] = content
    if "tool_calls" in plain:
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of the call of {function.get('name')!r} are not a JSON object")
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


# What stands for {% generation %} and {% endgeneration %} in rendered text: no text from outside can contain it.
_OPEN, _CLOSE = (f"\0{secrets.token_hex(16)}\0" for _ in range(2))


def _spans(marked: str) -> Iterator[tuple[str, bool]]:
    """(text, written by the assistant) in order."""
    first, *rest = marked.split(_OPEN)
    yield first, False
    for span in rest:
        written, after = span.split(_CLOSE)
        yield written, True
        yield after, False


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that hub templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as json.dumps writes it; jinja2's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
