"""A model in the terminal: continuing a text, and talking."""

import json
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape

from mimoflash.engine import Engine, SamplingParams
from mimoflash.text import ChatParser, Event, StreamDecoder, Tokenizer, render_chat


def stream_text(engine: Engine, tokenizer: Tokenizer, text: str, params: SamplingParams) -> Iterator[str]:
    """What follows `text`, piece by piece. An empty text begins with the tokenizer's end-of-text token."""
    prompt = tokenizer.encode(text) or [tokenizer.special.end_of_text or 0]
    yield from _decoded(engine, tokenizer, prompt, params)


def converse(engine: Engine, tokenizer: Tokenizer, params: SamplingParams, *, thinking: bool) -> None:
    """Reads turns from standard input and answers them until it ends (or, in a terminal, until an empty line)."""
    console = Console(emoji=False)
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
        parser = ChatParser(prompt=text)
        try:
            _answer(console, parser, _decoded(engine, tokenizer, prompt, params))
        except KeyboardInterrupt:
            _print(console, parser.finish())
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


def _answer(console: Console, parser: ChatParser, pieces: Iterator[str]) -> None:
    """Prints an answer as it comes; reasoning is dim."""
    for piece in pieces:
        _print(console, parser.feed(piece))
    _print(console, parser.finish())


def _print(console: Console, events: Sequence[Event]) -> None:
    for event in events:
        if event.call is not None:
            console.print(f"[cyan]{escape(json.dumps(event.call['function']))}[/cyan]")
        else:
            style = "dim" if event.kind == "reasoning" else None
            console.print(event.text, end="", style=style, markup=False, highlight=False, soft_wrap=True)


def _decoded(engine: Engine, tokenizer: Tokenizer, prompt: list[int], params: SamplingParams) -> Iterator[str]:
    decoder = StreamDecoder(tokenizer)
    for token in engine.stream(prompt, params):
        yield decoder.feed([token])
    yield decoder.finish()
