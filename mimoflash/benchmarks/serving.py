"""Our server as a side: the engine behind HTTP, asked by a client in a process of its own."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import tokenizers
import uvicorn

from mimoflash.benchmarks.pairs import Side, answer_requests
from mimoflash.benchmarks.peers import Ours, Stream
from mimoflash.serve import ServerSettings, make_app
from mimoflash.text import Tokenizer

NAME = "model"


class Served(Ours):
    """Text completions, streamed, as clients ask for them."""

    def __init__(self, s: dict[str, Any]):
        super().__init__(s)
        engine = self.engine
        if engine.tokenizer is None:
            engine.tokenizer = _numbered_words(engine.model.config.vocab_size)
        app = make_app({NAME: NAME}, lambda _: engine, ServerSettings(capacity=s["streams"]))
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        threading.Thread(target=self.server.run, daemon=True).start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = Side("mimoflash.benchmarks.serving", side="client")

    def run(self, prompts: list[list[int]], tokens: int) -> list[Stream]:
        port = self.server.servers[0].sockets[0].getsockname()[1]
        answer = self.client.ask(port=port, prompts=prompts, tokens=tokens, endless=self.endless)
        return [Stream(**stream) for stream in answer["streams"]]


def _numbered_words(size: int) -> Tokenizer:
    """A vocabulary for weights that have none: text goes out for every token."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={f"t{i}": i for i in range(size)}, merges=[]))
    core.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(core)


async def _stream(port: int, prompt: list[int], tokens: int, endless: bool, begin: float) -> dict[str, Any]:
    """As little as a client can do: it shares the machine with what is measured."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked = {
        "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": endless, "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(asked).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    first, last, end = 0.0, 0.0, b""
    async for line in reader:
        if line.startswith(b'data: {"id"'):
            now = time.perf_counter() - begin
            if b'"usage"' in line:
                end = line
            else:
                first, last = first or now, now
    writer.close()
    if not end:
        raise ValueError(f"the server broke off the answer to a prompt of {len(prompt)} tokens")
    known = json.loads(end.removeprefix(b"data: "))
    count = known["usage"]["completion_tokens"]
    passes = (count - 1) / known["timings"]["accept_length"]
    return {"prompt": len(prompt), "tokens": count, "first": first, "last": last, "passes": passes}


async def _all(port: int, prompts: list[list[int]], tokens: int, endless: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    return {"streams": await asyncio.gather(*(_stream(port, prompt, tokens, endless, begin) for prompt in prompts))}


def _open_client(settings: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    return lambda **asked: asyncio.run(_all(**asked))


if __name__ == "__main__":
    answer_requests(_open_client)
