"""What a model writes, as it arrives: reasoning, content and tool calls.

A state machine over the text, each character looked at once. Nothing it gives out depends on how the text was cut into
pieces, and no text is lost: a call that is malformed or breaks off becomes content, as written.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mimoflash.text.arguments import strict_json, typed_argument

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER = "<function=", "</function>", "<parameter=", "</parameter>"


_SPACE, _END_OF_NAME = re.compile(r"\s*"), re.compile(r"[<>\n]")
_TAGS = {tags: re.compile("|".join(tags)) for tags in [(CALL,), (END_CALL,), (END_PARAMETER,), (END_THINK, CALL)]}


@dataclass(frozen=True)
class Event:
    """A piece of reasoning or content (`text`), or a whole tool call (`call`, OpenAI style, with its `index`)."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    call: Mapping[str, Any] | None = None


class ChatParser:
    """Splits an assistant's turn into reasoning, content and calls while it is written.

    The state at the start is read off the prompt's end: an open `<think>`, a closed `<think></think>`, or a bare header
    after which the model may open `<think>` itself. A call inside think tags ends the reasoning. Argument values get
    the types of the tools' schemas (strings are verbatim); a function that is not among the tools is still a call, its
    values strings. Calls as JSON in `<tool_call>` tags are read too. A call is given out when its closing tag has come.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None, prompt: str = "") -> None:
        functions = [tool.get("function", tool) for tool in tools or []]
        self._schemas = {function["name"]: function.get("parameters") for function in functions}
        self._call_prefix = "call_" + hashlib.blake2s(prompt.encode("utf-8", "replace"), digest_size=6).hexdigest()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._events: list[Event] = []
        self._buffer, self._at = "", 0  # text not yet understood starts at _at
        self._raw: list[str] = []  # of the call being read, for the case that it is none
        self._function, self._parameter = "", ""
        self._arguments: dict[str, Any] = {}
        self._text: list[str] = []  # of the name, value or JSON being read
        self._gap: list[str] = []  # space after a call: dropped before another call and at the end
        self._interrupted = False  # a call broke into the reasoning, whose end tag may still come
        self._state: Callable[[], bool] = self._start
        end = prompt.rstrip()
        if end.endswith(THINK):
            self._state = self._in_reasoning
        elif end.endswith(END_THINK):
            self._state = self._in_content

    def feed(self, text: str) -> list[Event]:
        """The events that this text completes."""
        self._buffer += text
        self._read()
        events, self._events = self._events, []
        return events

    def _read(self) -> None:
        while self._at < len(self._buffer) and self._state():
            pass
        self._buffer, self._at = self._buffer[self._at :], 0

    def finish(self) -> list[Event]:
        """The events of the text held back, at the end of the turn."""
        while self._raw and self._interrupted and not self._calls:  # a call that broke off within the reasoning
            self._give_up()
            self._read()
        rest, self._buffer = self._buffer, ""
        if self._state == self._in_reasoning:
            self._emit("reasoning", rest)
        elif self._state == self._after_call:
            self._emit("content", "".join(self._gap) + rest if rest.strip() else "")
        else:
            self._emit("content", "".join(self._raw) + rest)
        self._raw, self._gap = [], []
        self._state = self._in_content
        events, self._events = self._events, []
        return events

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message so far, OpenAI style, with all of its keys."""
        return {
            "role": "assistant",
            "content": "".join(self._content),
            "reasoning_content": "".join(self._reasoning),
            "tool_calls": list(self._calls),
        }

    @property
    def is_reasoning(self) -> bool:
        """Whether what has come so far ends within the reasoning."""
        return self._state in (self._in_reasoning, self._in_call_of_reasoning)

    # States. Each takes what it understands off the buffer; False: it needs more text.

    def _start(self) -> bool:
        if self._buffer.startswith(THINK, self._at):
            self._at += len(THINK)
            self._state = self._in_reasoning
        elif THINK.startswith(self._buffer[self._at :]):
            return False
        else:
            self._state = self._in_content
        return True

    def _in_reasoning(self) -> bool:
        text, tag = self._until(END_THINK, CALL)
        self._emit("reasoning", text)
        if tag == END_THINK:
            self._state = self._in_content
        elif tag == CALL:
            self._interrupted = True
            self._raw = [tag]
            self._state = self._in_call_of_reasoning
        return bool(tag)

    def _in_content(self) -> bool:
        text, tag = self._until(END_THINK, CALL) if self._interrupted else self._until(CALL)
        self._emit("content", text)
        if tag == END_THINK:
            self._interrupted = False
            self._state = self._after_call if self._calls else self._in_content
        elif tag == CALL:
            self._raw = [tag]
            self._state = self._in_call
        return bool(tag)

    def _after_call(self) -> bool:
        self._gap.append(self._space())
        rest = self._buffer[self._at : self._at + len(CALL)]
        tags = (CALL, END_THINK) if self._interrupted else (CALL,)
        if any(tag.startswith(rest) and tag != rest for tag in tags):
            return False
        if not rest.startswith(tags):
            self._emit("content", "".join(self._gap))
        self._gap = []
        self._state = self._in_content
        return True

    def _in_call_of_reasoning(self) -> bool:
        """After `<tool_call>` in reasoning: if no call follows, it was only mentioned and reasoning goes on."""
        tag = self._expect(FUNCTION, "{")
        return self._give_up() if tag == "" else self._open_call(tag)

    def _in_call(self) -> bool:
        tag = self._expect(FUNCTION, "{")
        return self._give_up() if tag == "" else self._open_call(tag)

    def _open_call(self, tag: str | None) -> bool:
        if tag == FUNCTION:
            self._text, self._state = [], self._in_function_name
        elif tag:
            self._text, self._state = [tag], self._in_json
        return bool(tag)

    def _in_function_name(self) -> bool:
        name = self._name()
        if name == "":
            return self._give_up()
        if name:
            self._function, self._arguments, self._state = name, {}, self._in_function
        return bool(name)

    def _in_function(self) -> bool:
        tag = self._expect(PARAMETER, END_FUNCTION)
        if tag == "":
            return self._give_up()
        if tag:
            self._text = []
            self._state = self._in_parameter_name if tag == PARAMETER else self._at_end_of_call
        return bool(tag)

    def _in_parameter_name(self) -> bool:
        name = self._name()
        if name == "":
            return self._give_up()
        if name:
            self._parameter, self._text, self._state = name, [], self._in_value
        return bool(name)

    def _in_value(self) -> bool:
        text, tag = self._until(END_PARAMETER)
        self._raw += [text, tag]
        self._text.append(text)
        if tag:
            schema = self._schemas.get(self._function)
            self._arguments[self._parameter] = typed_argument("".join(self._text), schema, self._parameter)
            self._state = self._in_function
        return bool(tag)

    def _at_end_of_call(self) -> bool:
        tag = self._expect(END_CALL)
        if tag == "":
            return self._give_up()
        if tag:
            self._finish_call(self._function, self._arguments)
        return bool(tag)

    def _in_json(self) -> bool:
        text, tag = self._until(END_CALL)
        self._raw += [text, tag]
        self._text.append(text)
        if tag:
            call = strict_json("".join(self._text)) or {}
            name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = strict_json(arguments)
            if not isinstance(name, str) or not isinstance(arguments, dict):
                return self._give_up()
            self._finish_call(name, arguments)
        return bool(tag)

    # What the states share.

    def _emit(self, kind: Literal["reasoning", "content"], text: str) -> None:
        if text:
            (self._reasoning if kind == "reasoning" else self._content).append(text)
            self._events.append(Event(kind, text))

    def _finish_call(self, name: str, arguments: dict[str, Any]) -> None:
        index = len(self._calls)
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        self._calls.append({"id": f"{self._call_prefix}_{index}", "type": "function", "function": function})
        self._events.append(Event("tool_call", call={"index": index, **self._calls[-1]}))
        self._raw = []
        self._state = self._after_call

    def _give_up(self) -> bool:
        """It is no call: what was read of it is content, and reading goes on after it. In reasoning the tag was only
        mentioned, and what follows it is read again as reasoning."""
        if self._interrupted and not self._calls:
            self._emit("reasoning", CALL)
            self._buffer, self._at = "".join(self._raw)[len(CALL) :] + self._buffer[self._at :], 0
            self._raw, self._interrupted, self._state = [], False, self._in_reasoning
            return True
        self._emit("content", "".join(self._raw))
        self._raw = []
        self._state = self._in_content
        return True

    def _until(self, *tags: str) -> tuple[str, str]:
        """Takes the text up to the first tag, and the tag; without one, all but what may begin a tag, and ""."""
        if found := _TAGS[tags].search(self._buffer, self._at):
            text, self._at = self._buffer[self._at : found.start()], found.end()
            return text, found.group()
        end = self._buffer.rfind("<", self._at)  # tags hold one "<", at their start
        if end < 0 or not any(tag.startswith(self._buffer[end:]) for tag in tags):
            end = len(self._buffer)
        text, self._at = self._buffer[self._at : end], end
        return text, ""

    def _expect(self, *tags: str) -> str | None:
        """Takes space and one of the tags: the tag, "" where something else stands, None where more text must tell."""
        self._raw.append(self._space())
        for tag in tags:
            if self._buffer.startswith(tag, self._at):
                self._at += len(tag)
                self._raw.append(tag)
                return tag
        rest = self._buffer[self._at : self._at + len(END_CALL)]
        return None if any(tag.startswith(rest) for tag in tags) else ""

    def _name(self) -> str | None:
        """Takes a name and the `>` after it: the name, "" where it is none, None where more text must tell."""
        found = _END_OF_NAME.search(self._buffer, self._at)
        end = found.start() if found else len(self._buffer)
        text, self._at = self._buffer[self._at : end], end
        self._raw.append(text)
        self._text.append(text)
        if not found:
            return None
        if found.group() != ">":
            return ""
        self._at += 1
        self._raw.append(">")
        return "".join(self._text)

    def _space(self) -> str:
        start = self._at
        self._at = _SPACE.match(self._buffer, start).end()  # type: ignore[union-attr]
        return self._buffer[start : self._at]


def parse_chat(text: str, tools: Sequence[Mapping[str, Any]] | None = None, prompt: str = "") -> dict[str, Any]:
    """The message of a whole assistant's turn: `ChatParser` fed at once."""
    parser = ChatParser(tools, prompt)
    parser.feed(text)
    parser.finish()
    return parser.message
