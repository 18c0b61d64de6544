"""A server on a free port, and an engine that writes what a script says: behind it are the real template, parser and
server, before it what no small model would say."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn

from mimoflash.engine import Event, Grammar, NewTokens, Output, SamplingParams
from mimoflash.serve import ServerSettings, make_app
from mimoflash.text import Tokenizer

Script = Callable[[str], str]


class ScriptedEngine:
    """Answers by `script`, from the prompt's text to the assistant's turn, `cut` tokens at a time. What the server asks
    of an engine, and no more. With `obeys` it fails where a request's grammar forbids the answer, which a model would
    not have given."""

    def __init__(
        self, tokenizer: Tokenizer, script: Script, *, cut: int = 3, seconds: float = 0.0, obeys: bool = False
    ):
        self.tokenizer, self.script, self.cut, self.seconds = tokenizer, script, cut, seconds
        self.obeys = obeys
        self.asked: list[tuple[str, SamplingParams]] = []
        self.running = 0
        config = SimpleNamespace(max_position_embeddings=32_768, num_nextn_predict_layers=3)
        self.model = SimpleNamespace(config=config)
        self.runner = SimpleNamespace(cache=SimpleNamespace(positions=32_768))

    async def events(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, gather: float = 0.0
    ) -> AsyncGenerator[Event, None]:
        assert params is not None
        if len(prompt) >= 32_768:
            raise ValueError(f"the prompt has {len(prompt)} tokens; the model's context leaves no room for an answer")
        if max(prompt) >= self.tokenizer.vocab_size:
            raise ValueError("the prompt has a token outside the vocabulary")
        text = self.tokenizer.decode(prompt)
        self.asked.append((text, params))
        tokens = [*self.tokenizer.encode(self.script(text)), self.tokenizer.special.im_end]
        if self.obeys and params.grammar is not None:
            self._check(tokens, params.grammar)
        reason = "stop"
        for n in range(1, len(tokens)):
            if any(stop in self.tokenizer.decode(tokens[:n]) for stop in params.stop):
                tokens = tokens[:n]
                break
        if len(tokens) > params.max_tokens:
            tokens, reason = tokens[: params.max_tokens], "length"
        self.running += 1
        try:
            for start in range(0, len(tokens), self.cut):
                part = tokens[start : start + self.cut]
                likeliest = [((token, -0.5),) * params.top_logprobs for token in part] if params.top_logprobs else []
                yield NewTokens(part, [-0.5] * len(part), likeliest, start)
                await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        scores = None
        if (asked := params.prompt_logprobs) is not None:
            scores = [None, *((-0.5, ((token, -0.5),) * asked) for token in prompt[1:])]
        yield Output(
            tokens=tokens, logprobs=[-0.5] * len(tokens), sampling_logprobs=[-0.5] * len(tokens), top_logprobs=[],
            routes=None, finish_reason=reason, accept_length=2.5, prompt_tokens=len(prompt), cached_tokens=0,
            prompt_logprobs=scores,
        )

    def _check(self, tokens: Sequence[int], grammar: Grammar) -> None:
        state = grammar.start(self.tokenizer, self.tokenizer.vocab_size, frozenset(self.tokenizer.stop_ids))
        for n, token in enumerate(tokens, 1):
            assert state.mask()[token], f"the grammar forbids the end of {self.tokenizer.decode(tokens[:n])!r}"
            state.accept(token)

    def stats(self) -> dict[str, Any]:
        return {"running": self.running, "cache_used_bytes": {}}

    def close(self) -> None:
        pass


@contextmanager
def served(engines: dict[str, Any], settings: ServerSettings | None = None) -> Iterator[str]:
    """The address of a server with these engines, by name; it ends with the block."""
    app = make_app({name: name for name in engines}, engines.__getitem__, settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
