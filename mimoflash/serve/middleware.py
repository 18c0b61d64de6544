"""What stands before all paths of the server."""

import hmac
import logging
import secrets
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimoflash.serve.errors import ApiError, error_response
from mimoflash.serve.observe import Facts, Metrics, facts, failed, log

_OPEN_PATHS = ("/health", "/")  # need no key
_GONE = 499  # the client was, before it had a status


class BodyLimit:
    """Lets no body in of more than `most` bytes. (Starlette's own refuses in plain text, which clients cannot read.)"""

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(413, f"the request is larger than {self._most:,} bytes")
        length = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if length.isdecimal() and int(length) > self._most:
            return await error_response(scope["path"], error)(scope, receive, send)
        seen = 0

        async def counted() -> Message:  # a body may come in chunks, without its length
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, error.message)
            return message

        return await self._app(scope, counted, send)


class Doorkeeper:
    """Asks for a key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope["path"]) or self._is_known(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return await error_response(scope["path"], error)(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        # every key is compared, in constant time: how long it takes tells nothing
        return sum(hmac.compare_digest(given.encode(), key) for key in self._keys) > 0


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith("/page/")


class Witness:
    """Gives each request an id and a line of log when it is over, and counts it. What nobody has caught is logged, and
    answered with a 500 where nothing has been sent."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        here = Facts(given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else _new_id())
        token = facts.set(here)
        status = _GONE

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                for name in ("x-request-id", "request-id"):  # OpenAI's and Anthropic's
                    MutableHeaders(scope=message)[name] = here.id
            await send(message)

        try:
            await self._app(scope, receive, told)
        except Exception as error:
            failed(error)
            if status != _GONE:
                raise  # the connection breaks off: what has been sent is not all
            await error_response(scope["path"], ApiError(500, "the server failed: see its log"))(scope, receive, told)
        finally:
            facts.reset(token)
            route = scope.get("route")
            path = getattr(route, "path", "other")  # not what a client has made up
            self._metrics.count(path, status, here)
            seconds = time.monotonic() - here.begin
            said = {"request": here.id, "method": scope["method"], "path": path, "status": status}
            log.log(
                logging.INFO if path.startswith("/v1") else logging.DEBUG, "%s %s %s", scope["method"], path, status,
                extra={"told": {**said, "seconds": round(seconds, 4), **here.known}},
            )


def _new_id() -> str:
    return f"req_{secrets.token_hex(12)}"
