"""A chat request becomes a prompt, and the tokens that follow it pieces of an answer. What all chat APIs share."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mimoflash.engine import Grammar, NewTokens, Output, SamplingParams
from mimoflash.serve.errors import ApiError
from mimoflash.serve.observe import note
from mimoflash.serve.registry import Served
from mimoflash.serve.stops import StopTrimmer
from mimoflash.text import ChatParser, StreamDecoder, Tokenizer, render_chat
from mimoflash.text.parser import END_THINK, THINK

FLUSH_SECONDS = 0.05  # what comes within is sent together, but for the first and the last: a third faster
_LONG_TEXT = 20_000  # characters

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What a client asks, in OpenAI's terms.

    `tool_choice`: auto, none, required, or a function's name. `schema`: the answer is JSON that fits it. `template`:
    more variables of the chat template. `continues`: the last message is the assistant's own, to be gone on with.
    `want_logprobs` of content.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    schema: Mapping[str, Any] | None = None
    thinking: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    want_logprobs: bool = False


@dataclass(frozen=True)
class Token:
    """One that was generated: its text as bytes, and the likeliest at its place."""

    id: int
    text: bytes
    logprob: float
    likeliest: list[tuple[bytes, float]]


@dataclass(frozen=True)
class Piece:
    """A part of the answer: reasoning, content, or a whole tool call with its index."""

    kind: Literal["reasoning", "content", "tool_call"]
    text: str = ""
    call: Mapping[str, Any] | None = None
    tokens: Sequence[Token] = ()  # those behind content, where log-probabilities are asked for


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds to the first token and from it to the last one, and the mean tokens gained by a verification."""

    prompt: float
    generation: float
    accept_length: float

    def rate(self, usage: Usage) -> float:
        """Tokens a second after the first one, which comes with the prompt; 0 where there are none."""
        return max(usage.completion_tokens - 1, 0) / self.generation if self.generation > 0 else 0.0


@dataclass(frozen=True)
class Finished:
    """The end of an answer. `stopped_by`: the stop string that ended it."""

    reason: Reason
    usage: Usage
    timings: Timings
    stopped_by: str | None = None


def prompt_of(served: Served, request: ChatRequest) -> str:
    """Raises ApiError for a conversation that the template refuses."""
    messages = list(request.messages)
    last = messages.pop() if request.continues else None
    try:
        text = render_chat(
            served.tokenizer, messages, None if request.tool_choice == "none" else request.tools,
            enable_thinking=request.thinking, variables=request.template,
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    text += "" if last is None else _begun(last, request.thinking)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write it, in a tool's schema too
        raise ApiError(400, "a string has half of a surrogate pair: it is no text", param="messages") from None
    return text


async def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """A long text does not hold up the others."""
    return await asyncio.to_thread(tokenizer.encode, text) if len(text) > _LONG_TEXT else tokenizer.encode(text)


def _begun(message: Mapping[str, Any], thinking: bool) -> str:
    """What the assistant has written of a turn that it goes on with; its header is there."""
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or ""
    if not thinking or not (content or reasoning):
        return content
    return f"{THINK}{reasoning}{END_THINK}{content}" if content else THINK + reasoning


def count_tokens(served: Served, request: ChatRequest) -> int:
    return len(served.tokenizer.encode(prompt_of(served, request)))


async def answer_chat(served: Served, request: ChatRequest) -> AsyncGenerator[Piece | Finished, None]:
    """The pieces of the answer as they come, then Finished. Closing the iterator cancels what is left. Raises ApiError
    for what the engine refuses, before the first piece, and where it fails."""
    prompt = prompt_of(served, request)
    params = _constrained(request, prompt)
    tokens = await _encoded(served.tokenizer, prompt)
    room = served.most_tokens - len(tokens)  # without any the engine says so
    params = replace(params, max_tokens=min(params.max_tokens, room) if room > 0 else params.max_tokens)
    reader = _Reader(served.tokenizer, request, prompt)
    begin, first = time.monotonic(), 0.0
    async with aclosing(generate(served, tokens, params)) as events:
        async for event in events:
            if isinstance(event, NewTokens):
                first = first or time.monotonic()
                for piece in reader.read(event):
                    yield piece
                continue
            for piece in reader.finish():
                yield piece
            now = time.monotonic()
            usage = Usage(event.prompt_tokens, len(event.tokens), event.cached_tokens, reader.reasoning_tokens)
            timings = Timings((first or now) - begin, now - (first or now), event.accept_length)
            yield noted(Finished(reader.reason(event), usage, timings, reader.stopped_by))


def noted(end: Finished) -> Finished:
    """For the log and the metrics."""
    note(
        **vars(end.usage), first_token_seconds=end.timings.prompt, tokens_per_second=end.timings.rate(end.usage),
        accept_length=end.timings.accept_length,
    )
    return end


async def generate(
    served: Served, tokens: Sequence[int], params: SamplingParams, param: str = "messages"
) -> AsyncGenerator[NewTokens | Output, None]:
    """The engine's events, those of a moment in one. Raises ApiError where it fails, and where it refuses what stands
    in the request's field `param`."""
    try:
        async with aclosing(served.engine.events(tokens, params, gather=FLUSH_SECONDS)) as events:
            async for event in events:
                if isinstance(event, Output) and event.error is not None:
                    raise ApiError(500, f"the model failed: {event.error}")
                yield event
    except ValueError as error:
        raise refused(error, param) from None


def refused(error: ValueError, param: str) -> ApiError:
    """What the engine or its SamplingParams do not take. Their words begin with the field, where one is at fault."""
    message = str(error)
    first = message.partition(" ")[0]
    is_field = first in SamplingParams.__dataclass_fields__
    code = "context_length_exceeded" if "leaves no room" in message or "cache holds" in message else None
    return ApiError(400, message, param=first if is_field else param, code=code)


def _constrained(request: ChatRequest, prompt: str) -> SamplingParams:
    """With the grammar that the request asks for. Raises ApiError for one that cannot be followed."""
    answer = calls = None
    try:
        if request.schema is not None:
            answer = Grammar.json_schema(request.schema, prompt)
    except ValueError as error:
        raise ApiError(400, str(error), param="response_format") from None
    may_call = bool(request.tools) and request.tool_choice != "none"
    try:
        if may_call and (request.tool_choice != "auto" or answer is not None):
            calls = Grammar.tools(
                request.tools, request.tool_choice, prompt, parallel=request.parallel_tool_calls, schema=request.schema
            )
    except ValueError as error:
        raise ApiError(400, str(error), param="tools") from None
    return replace(request.params, grammar=calls or answer)


class _Reader:
    """From tokens to pieces."""

    def __init__(self, tokenizer: Tokenizer, request: ChatRequest, prompt: str):
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._trimmer = StopTrimmer(tuple(request.params.stop))
        self._parser = ChatParser(None if request.tool_choice == "none" else request.tools, prompt)
        self._want_logprobs = request.want_logprobs
        self._pending: list[Token] = []  # their text has not come out yet
        self._only_one_call = not request.parallel_tool_calls
        self._called = False
        self.reasoning_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        return self._trimmer.found

    def read(self, new: NewTokens) -> list[Piece]:
        """Token by token, to tell which of them reason; neighbours of a kind become one piece."""
        pieces: list[Piece] = []
        every = new.top_logprobs or [()] * len(new.tokens)
        for token, logprob, likeliest in zip(new.tokens, new.logprobs, every, strict=True):
            was_reasoning = self._parser.is_reasoning
            if self._want_logprobs and token not in self._tokenizer.stop_ids:
                self._pending.append(self._described(token, logprob, likeliest))
            self._take(self._decoder.feed([token]), pieces)
            self.reasoning_tokens += was_reasoning or self._parser.is_reasoning
            if was_reasoning:
                self._pending.clear()
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        self._take(self._decoder.finish(), pieces)
        self._pieces(self._parser.feed(self._trimmer.finish()), pieces)
        self._pieces(self._parser.finish(), pieces)
        return _joined(pieces)

    def reason(self, output: Output) -> Reason:
        if output.finish_reason != "stop":
            return "length"
        return "tool_calls" if self._called else "stop"

    def _take(self, text: str, pieces: list[Piece]) -> None:
        self._pieces(self._parser.feed(self._trimmer.feed(text)), pieces)

    def _pieces(self, events: Sequence[Any], pieces: list[Piece]) -> None:
        for event in events:
            if self._called and self._only_one_call:
                return  # what follows a call that is to be the only one
            self._called |= event.kind == "tool_call"
            tokens, self._pending = (self._pending, []) if event.kind == "content" else ((), [])
            pieces.append(Piece(event.kind, event.text, event.call, tokens))

    def _described(self, token: int, logprob: float, likeliest: Sequence[tuple[int, float]]) -> Token:
        text = self._tokenizer.decode_bytes
        return Token(token, text([token]), logprob, [(text([other]), value) for other, value in likeliest])


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        if found and piece.call is None and found[-1].kind == piece.kind:
            before = found[-1]
            found[-1] = replace(before, text=before.text + piece.text, tokens=[*before.tokens, *piece.tokens])
        elif piece.text or piece.call is not None:
            found.append(piece)
    return found
