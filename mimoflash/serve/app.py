"""The server as an ASGI application: its paths, and what stands before all of them."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from mimoflash.engine import Engine
from mimoflash.serve import chat_completions, completions, messages, page_files, responses
from mimoflash.serve.chat_schema import ModelCard, ModelList, OpenAIError
from mimoflash.serve.errors import ApiError, error_response
from mimoflash.serve.gate import Gate
from mimoflash.serve.middleware import BodyLimit, Doorkeeper, Witness
from mimoflash.serve.observe import Metrics, failed
from mimoflash.serve.registry import Registry
from mimoflash.serve.store import MEMORY, Store


@dataclass(frozen=True)
class ServerSettings:
    """`api_keys`: one of them is asked for, if there are any. `origins`: sites whose pages may call this server; none
    by default. `capacity`: answers under way at a time, those that wait included. `body_bytes`: of a request. `store`:
    the file that keeps responses to go on from; memory by default."""

    api_keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    capacity: int = 256
    body_bytes: int = 32 * 2**20
    most_loaded: int = 2
    store: str = MEMORY

    def __post_init__(self) -> None:
        for name in ("capacity", "body_bytes", "most_loaded"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if any(not key for key in self.api_keys):
            raise ValueError("an API key is empty: give one that says something, or none")


def make_app(
    places: Mapping[str, str], open_engine: Callable[[str], Engine], settings: ServerSettings | None = None
) -> FastAPI:
    """Serves the models at `places`, by their names; `open_engine` loads what stands at one."""
    settings = settings or ServerSettings()
    models = Registry(places, open_engine, settings.most_loaded)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": OpenAIError, "description": text} for status, text in _ERRORS.items()
    }
    # traces go where OTEL_EXPORTER_OTLP_ENDPOINT says, if it does; its logs would hold what clients wrote
    app = FastAPI(
        title="mimoflash", lifespan=lifespan, docs_url=None, redoc_url=None, responses=errors,
        telemetry={"auto_configure": True, "logs": False},
    )
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    app.state.registry, app.state.gate = models, Gate(settings.capacity)
    app.state.store = Store(settings.store)
    app.state.metrics = Metrics(app.state.gate, models)
    for part in (
        chat_completions.router, completions.router, messages.router, responses.router, router, page_files.router,
    ):
        app.include_router(part)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    # the last one added sees a request first
    app.add_middleware(BodyLimit, most=settings.body_bytes)
    if settings.api_keys:
        app.add_middleware(Doorkeeper, keys=settings.api_keys)
    app.add_middleware(Witness, metrics=app.state.metrics)
    if settings.origins:  # outside of all: a site's page may read every error
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"], expose_headers=["x-request-id", "request-id", "retry-after"],
        )
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. FastAPI would name its own error for bodies that do not fit; here they get 400."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=version("mimoflash"), routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema


router = APIRouter()


@router.get("/v1/models", response_model=ModelList)
async def list_models(http: Request) -> Any:
    registry: Registry = http.app.state.registry
    return {"object": "list", "data": [_card(registry, name) for name in registry.places]}


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def model(http: Request, name: str) -> Any:
    registry: Registry = http.app.state.registry
    return _card(registry, registry.resolve(name))


def _card(registry: Registry, name: str) -> dict[str, Any]:
    card: dict[str, Any] = {"id": name, "object": "model", "created": registry.started, "owned_by": "mimoflash"}
    if served := registry.loaded.get(name):
        config = served.engine.model.config
        card |= {"context_length": served.most_tokens, "mtp_layers": config.num_nextn_predict_layers}
    return card


@router.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(http: Request) -> Response:  # in a thread: the engine may be in the middle of a pass
    return PlainTextResponse(http.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


# -- errors -----------------------------------------------------------------------------------------------------------

_ERRORS = {
    400: "The request cannot be answered as it is", 401: "No key, or a wrong one", 404: "No such model or thing",
    413: "The request is too large", 429: "The server is busy: try again after Retry-After seconds",
    500: "The server's own fault",
}


def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status >= 500:
        failed(error)
    return error_response(http.url.path, error)


def _invalid(http: Request, error: Exception) -> Response:
    """The first field that does not fit, by its path."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    if first["type"] == "json_invalid":
        return error_response(http.url.path, ApiError(400, f"the body is not JSON: {first['ctx']['error']}"))
    return error_response(http.url.path, ApiError(400, first["msg"].removeprefix("Value error, "), param=place or None))


def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is nothing at {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
    reason = words.get(error.status_code, str(error.detail))
    response = error_response(http.url.path, ApiError(error.status_code, reason))
    response.headers.update(error.headers or {})
    return response
