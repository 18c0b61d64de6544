"""A model in the terminal: continuing a text, and talking."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from mimoflash.engine import Engine, Request, SamplingParams
from mimoflash.text import ChatParser, Event, StreamDecoder, Tokenizer, render_chat


def stream_text(engine: Engine, text: str, params: SamplingParams) -> Iterator[str]:
    """What follows `text`, piece by piece. An empty text begins with the tokenizer's end-of-text token."""
    tokenizer = _tokenizer(engine)
    prompt = tokenizer.encode(text) or [tokenizer.special.end_of_text or 0]
    decoder = StreamDecoder(tokenizer)
    for token in engine.stream(prompt, params):
        yield decoder.feed([token])
    yield decoder.finish()


def converse(engine: Engine, params: SamplingParams, *, thinking: bool) -> None:
    """Reads turns from standard input and answers them until it ends (or, in a terminal, until an empty line). A
    conversation that no longer fits into the model's context begins anew, with what was said last."""
    console, tokenizer = Console(emoji=False), _tokenizer(engine)
    if sys.stdin.isatty():
        console.print("[dim]An empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer.[/dim]")
    messages: list[dict[str, object]] = []
    while (said := _next_turn(console)) is not None:
        messages.append({"role": "user", "content": said})
        while messages:
            text = render_chat(tokenizer, messages, enable_thinking=thinking)
            try:
                request = engine.submit(tokenizer.encode(text), params)
            except ValueError as error:
                messages = _forgotten(messages, error, console)
            else:
                messages.append(_answer(engine, request, text, console))
                break


def _forgotten(messages: list[dict[str, object]], error: ValueError, console: Console) -> list[dict[str, object]]:
    """What is left of a conversation that the engine does not take: what was said last; nothing if that was all."""
    anew = "The conversation begins anew." if len(messages) > 1 else "Say something shorter."
    console.print(f"({error}. {anew})", style="dim", markup=False, highlight=False, soft_wrap=True)
    return messages[-1:] if len(messages) > 1 else []


def _answer(engine: Engine, request: Request, text: str, console: Console) -> dict[str, object]:
    """The assistant's message, printed as it comes; `text` is its prompt. Ctrl-C ends it."""
    decoder, parser, printer = StreamDecoder(_tokenizer(engine)), ChatParser(prompt=text), _Printer(console)
    seen = request.prompt_tokens
    with _on_interrupt(lambda: _end_soon(request)) as stopped:
        while request.finish_reason is None:
            engine.step()
            tokens, seen = request.text[seen:], len(request.text)
            printer.show(parser.feed(decoder.feed(tokens)))
    printer.show(parser.feed(decoder.finish()))
    printer.show(parser.finish())
    if remark := "stopped" if stopped else _remark(engine, request):
        console.print(f" ({remark})", end="", style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return parser.message


def _remark(engine: Engine, request: Request) -> str | None:
    """What has to be said of how an answer ended."""
    if len(request.text) >= engine.model.config.max_position_embeddings:
        return "the model's context is full: whatever you say next begins a new conversation"
    return request.error


def _end_soon(request: Request) -> None:
    """It ends by its length with the next token: so its keys and values stay for the next turn, which those of a
    cancelled request do not."""
    request.limit = min(request.limit, request.generated + 1)


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Ctrl-C calls `stop`, and is noted in what is given; a second one is the usual KeyboardInterrupt."""
    signals: list[int] = []

    def first(number: int, _: object) -> None:
        signal.signal(signal.SIGINT, before)
        signals.append(number)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def _next_turn(console: Console) -> str | None:
    while True:
        try:
            said = console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return None
        if said.strip():
            return said
        if sys.stdin.isatty():
            return None


class _Printer:
    """Prints an answer as it comes: reasoning dim, and what follows it on a line of its own."""

    def __init__(self, console: Console):
        self.console, self.kind = console, ""

    def show(self, events: Sequence[Event]) -> None:
        for event in events:
            if self.kind not in ("", event.kind):
                self.console.print()
            self.kind = event.kind
            text = json.dumps(event.call["function"]) if event.call is not None else event.text
            style = {"reasoning": "dim", "tool_call": "cyan"}.get(event.kind)
            self.console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)


def _tokenizer(engine: Engine) -> Tokenizer:
    assert engine.tokenizer is not None, "text needs a tokenizer"
    return engine.tokenizer
