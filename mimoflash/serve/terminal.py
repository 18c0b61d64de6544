"""A model in the terminal: continuing a text, and talking."""

import json
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console

from mimoflash.engine import Engine, SamplingParams
from mimoflash.text import ChatParser, Event, StreamDecoder, Tokenizer, render_chat


def stream_text(engine: Engine, text: str, params: SamplingParams) -> Iterator[str]:
    """What follows `text`, piece by piece. An empty text begins with the tokenizer's end-of-text token."""
    tokenizer = _tokenizer(engine)
    prompt = tokenizer.encode(text) or [tokenizer.special.end_of_text or 0]
    yield from _decoded(engine, prompt, params)


def converse(engine: Engine, params: SamplingParams, *, thinking: bool) -> None:
    """Reads turns from standard input and answers them until it ends (or, in a terminal, until an empty line)."""
    console, tokenizer = Console(emoji=False), _tokenizer(engine)
    context = engine.model.config.max_position_embeddings
    if sys.stdin.isatty():
        console.print("[dim]An empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer.[/dim]")
    messages: list[dict[str, object]] = []
    while (said := _next_turn(console)) is not None:
        messages.append({"role": "user", "content": said})
        text = render_chat(tokenizer, messages, enable_thinking=thinking)
        prompt = tokenizer.encode(text)
        if len(prompt) >= context:
            raise ValueError(f"the conversation has {len(prompt)} tokens; the model's context is {context}")
        parser, printer = ChatParser(prompt=text), _Printer(console)
        try:
            for piece in _decoded(engine, prompt, params):
                printer.show(parser.feed(piece))
            printer.show(parser.finish())
        except KeyboardInterrupt:
            printer.show(parser.finish())
            console.print("[dim] (stopped)[/dim]", end="")
        console.print()
        messages.append(parser.message)


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


def _decoded(engine: Engine, prompt: list[int], params: SamplingParams) -> Iterator[str]:
    decoder = StreamDecoder(_tokenizer(engine))
    for token in engine.stream(prompt, params):
        yield decoder.feed([token])
    yield decoder.finish()


def _tokenizer(engine: Engine) -> Tokenizer:
    assert engine.tokenizer is not None, "text needs a tokenizer"
    return engine.tokenizer
