"""Our server as a side: the engine behind HTTP, asked by a client in a process of its own."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import tokenizers
import uvicorn

from mimoflash.benchmarks.pairs import Side, answer_requests
from mimoflash.benchmarks.peers import Ours, Stream
from mimoflash.engine import Engine
from mimoflash.serve import ServerSettings, make_app
from mimoflash.text import Tokenizer

NAME = "model"


@contextmanager
def server_of(engine: Engine, capacity: int) -> Iterator[int]:
    """The port where a thread of this process serves the engine, under NAME."""
    server, thread = start_server(engine, capacity)
    try:
        yield port_of(server)
    finally:
        server.should_exit = True
        thread.join()


def start_server(engine: Engine, capacity: int) -> tuple[uvicorn.Server, threading.Thread]:
    """In a thread that ends with the process, if not before."""
    if engine.tokenizer is None:
        engine.tokenizer = engine.core.tokenizer = _numbered_words(engine.model.config.vocab_size)
    app = make_app({NAME: NAME}, lambda _: engine, ServerSettings(capacity=capacity))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread


def port_of(server: uvicorn.Server) -> int:
    return server.servers[0].sockets[0].getsockname()[1]


def _numbered_words(size: int) -> Tokenizer:
    """A vocabulary for weights that have none: text goes out for every token."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={f"t{i}": i for i in range(size)}, merges=[]))
    core.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(core)


async def post_completion(port: int, asked: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
    """What the server sends, headers and all, as it comes. As little as a client can do: it shares the machine with
    what is measured. Closing the iterator closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": NAME, **asked}).encode()
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        while part := await reader.read(2**16):
            yield part
    finally:
        writer.close()


def events_in(parts: list[bytes]) -> list[bytes]:
    """Those of a whole answer, as JSON. A chunk of the transfer coding holds whole lines."""
    lines = b"".join(parts).splitlines()
    return [line.removeprefix(b"data:") for line in lines if line.startswith(b"data: {")]


class Served(Ours):
    """Text completions, streamed, as clients ask for them."""

    def __init__(self, s: dict[str, Any]):
        super().__init__(s)
        server, _ = start_server(self.engine, s["streams"])
        self.port = port_of(server)
        self.client = Side("mimoflash.benchmarks.serving", side="client")

    def run(self, prompts: list[list[int]], tokens: int) -> list[Stream]:
        answer = self.client.ask(port=self.port, prompts=prompts, tokens=tokens, endless=self.endless)
        return [Stream(**stream) for stream in answer["streams"]]


async def _stream(port: int, prompt: list[int], tokens: int, endless: bool, begin: float) -> dict[str, Any]:
    asked = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": endless, "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, last, parts = 0.0, 0.0, list[bytes]()
    async with aclosing(post_completion(port, asked)) as coming:
        async for part in coming:
            last = time.perf_counter() - begin
            first = first or (last if b"data:" in part else 0.0)
            parts.append(part)
    end = events_in(parts)[-1:]
    if not end or b'"usage"' not in end[0]:
        raise ValueError(f"the server broke off the answer to a prompt of {len(prompt)} tokens")
    known = json.loads(end[0])
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
