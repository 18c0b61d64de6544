"""From an answer under way to HTTP: a whole JSON document, or events as they come. A client that goes away ends it."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from mimoflash.serve.errors import ApiError
from mimoflash.serve.gate import Gate
from mimoflash.serve.observe import failed
from mimoflash.serve.registry import Registry, Served

HEADER_SECONDS = 5.0  # what goes wrong until then has its own HTTP status
PING_SECONDS = 15.0  # of silence, after which proxies may close a connection

STREAMED: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document
    200: {"content": {"text/event-stream": {"schema": {  # of each event
        "type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}, "required": ["data"],
    }}}, "description": "Whole, or as events"},
}

Frames = AsyncGenerator[str, None]
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
Item = TypeVar("Item")


def frame(data: Mapping[str, Any], event: str | None = None) -> str:
    """A server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {_compact(data)}\n\n"


async def respond(
    http: Request, model: str, *, answers: int = 1, stream: Callable[[Served], Frames] | None,
    whole: Callable[[Served], Coroutine[Any, Any, Mapping[str, Any]]], error_frame: Callable[[ApiError], str],
) -> Response:
    """The frames of `stream`, where one is given, else what `whole` returns, both asked of the model called so. Raises
    ApiError as long as no header has been sent."""
    gate: Gate = http.app.state.gate
    registry: Registry = http.app.state.registry
    async with AsyncExitStack() as stack:
        registry.resolve(model)
        stack.enter_context(gate.room_for(answers))
        served = await stack.enter_async_context(registry.using(model))
        if stream is None:
            return JSONResponse(await _unless_gone(http.receive, whole(served)))
        frames = await stack.enter_async_context(aclosing(stream(served)))
        first = asyncio.ensure_future(anext(frames, ""))
        stack.push_async_callback(_ended, first)
        await asyncio.wait({first}, timeout=HEADER_SECONDS)
        if first.done():
            first.result()
        return EventStream(_to_the_end(frames, first, error_frame), stack.pop_all())
    raise AssertionError("the stack swallows nothing")


class EventStream(StreamingResponse):
    """What the answer holds is let go of however the response ends, even before it has begun. A silence is broken by
    pings. (Starlette's own __call__ cancels again and again, so that nothing can be ended in good order.)"""

    def __init__(self, frames: AsyncIterator[str], held: AsyncExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last = time.monotonic()  # that something was sent

        async def told(message: Message) -> None:
            nonlocal last
            last = time.monotonic()
            await send(message)

        async def ping() -> None:
            while True:
                if (left := last + PING_SECONDS - time.monotonic()) <= 0:
                    await told({"type": "http.response.body", "body": b": still at work\n\n", "more_body": True})
                await asyncio.sleep(max(left, 0))

        async with self._held:
            pings = asyncio.ensure_future(ping())
            try:
                with suppress(ApiError):  # nobody is there to be told
                    await _unless_gone(receive, self.stream_response(told))
            finally:
                await _ended(pings)


async def _to_the_end(
    frames: Frames, first: "asyncio.Future[str]", error_frame: Callable[[ApiError], str]
) -> AsyncIterator[str]:
    """All frames, and that of the error that ends them."""
    try:
        if text := await first:
            yield text
            async for text in frames:
                yield text
    except ApiError as error:
        yield error_frame(error)
    except Exception as error:  # the status has been sent: the client is told within the stream
        failed(error)
        yield error_frame(ApiError(500, "the server failed: see its log"))


async def _ended(task: "asyncio.Future[Any]") -> None:
    """Whatever it ends with: who wants to know has asked for it."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # else asyncio says that nobody has asked


async def _unless_gone(receive: Receive, answer: Coroutine[Any, Any, Item]) -> Item:
    """What `answer` returns; it is cancelled where the client has closed the connection."""
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has closed the connection")
        return task.result()
    finally:
        await _ended(task)
        await _ended(gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def side_by_side(
    streams: Sequence[AsyncGenerator[Item, None]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """The items of all streams as they come, each with its stream's number. Raises what the first one raises that
    fails; the others are closed."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item] | BaseException | None] = asyncio.Queue()

    async def forward(number: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((number, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(forward(*each)) for each in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                running -= 1
            else:
                yield got
    finally:
        for task in tasks:  # all before the wait, which may be cancelled, too
            task.cancel()
        await asyncio.wait(tasks)
