"""OpenAI's Responses: a conversation's next items, and responses that are kept to go on from."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from mimoflash.serve.chat_completions import TEMPERATURE, TOP_P
from mimoflash.serve.errors import ApiError
from mimoflash.serve.generation import Finished, answer_chat
from mimoflash.serve.registry import Served
from mimoflash.serve.respond import STREAMED, Frames, respond
from mimoflash.serve.responses_input import Offer, chat_request, offers_of
from mimoflash.serve.responses_items import ItemReference
from mimoflash.serve.responses_output import Answer, Event, event_frame, new_id
from mimoflash.serve.responses_schema import (
    Deleted,
    ItemList,
    PlainFormat,
    Reasoning,
    ResponsesRequest,
    TextSettings,
    ToldResponse,
)
from mimoflash.serve.store import Store, Stored

_PREFIXES = {
    "message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc",
    "function_call_output": "fco", "custom_tool_call_output": "cto",
}
_FIELDS = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}


@asynccontextmanager
async def _closing(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.store.close()


router = APIRouter(lifespan=_closing)


@dataclass(frozen=True)
class Asked:
    """`conversation`: the items that are answered; `named`: those of them that have got their id here."""

    body: ResponsesRequest
    conversation: list[dict[str, Any]]
    named: list[str]
    offers: Mapping[str, Offer]
    answer: Answer
    store: Store


@router.post("/v1/responses", response_model=ToldResponse, responses=STREAMED)
async def create_response(http: Request, body: ResponsesRequest) -> Response:
    """What comes next in a conversation; with `stream` as semantic events."""
    asked = await _asked(body, http.app.state.store)

    async def stream(served: Served) -> Frames:
        async with aclosing(_events(asked, served)) as events:
            async for event in events:
                yield event_frame(event)

    async def whole(served: Served) -> Mapping[str, Any]:
        async with aclosing(_events(asked, served)) as events:
            async for _ in events:
                pass
        return asked.answer.response

    return await respond(
        http, body.model, stream=stream if body.stream else None, whole=whole, error_frame=asked.answer.error_frame
    )


async def _events(asked: Asked, served: Served) -> AsyncGenerator[Event, None]:
    """The answer is stored before its end is told, so that the client can go on from it at once."""
    with _in_our_words():
        request = chat_request(asked.body, asked.conversation, asked.offers, served)
        async with aclosing(answer_chat(served, request)) as pieces:
            async for piece in pieces:
                events = asked.answer.take(piece)
                if isinstance(piece, Finished) and asked.body.store is not False:
                    response = asked.answer.response
                    named = [*asked.named, *(item["id"] for item in response["output"])]
                    await asked.store.put(response, asked.conversation, named)
                for event in events:
                    yield event


@contextmanager
def _in_our_words() -> Iterator[None]:
    """What is at fault is called as it is here, not as in chat completions."""
    try:
        yield
    except ApiError as error:
        error.param = _FIELDS.get(error.param or "", error.param)
        raise


async def _asked(body: ResponsesRequest, store: Store) -> Asked:
    conversation: list[dict[str, Any]] = []
    if body.previous_response_id:
        before = await _stored(store, body.previous_response_id, "previous_response_id", "previous_response_not_found")
        conversation += [*before.conversation, *before.response["output"]]
    named = []
    for given in body.input:
        if isinstance(given, ItemReference):
            item = await store.item(given.id)
            if item is None:
                raise ApiError(404, f"there is no item {given.id!r} here", param="input", code="item_not_found")
        else:
            item = _told(given.model_dump(exclude_none=True))
            if given.id is None:
                item["id"] = new_id(_PREFIXES[item["type"]])
                named.append(item["id"])
        conversation.append(item)
    offers = offers_of(body.tools or ())
    answer = Answer(_head(body), offers, summary=bool(body.reasoning and body.reasoning.summary))
    return Asked(body, conversation, named, offers, answer, store)


def _told(item: dict[str, Any]) -> dict[str, Any]:
    """An input item as it is listed: with its state, and parts of text called after who wrote them."""
    if item["type"] == "message":
        own = {"type": "output_text", "annotations": []} if item["role"] == "assistant" else {"type": "input_text"}
        item["content"] = [{**part, **own} if "text" in part else part for part in item["content"]]
    return {**item, "status": "completed"}


def _head(body: ResponsesRequest) -> dict[str, Any]:
    """What a response tells of its request."""
    text = TextSettings(format=(body.text and body.text.format) or PlainFormat(type="text"))
    choice = body.tool_choice or "auto"
    return {
        "model": body.model, "instructions": body.instructions, "previous_response_id": body.previous_response_id,
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "parallel_tool_calls": body.parallel_tool_calls is not False, "text": text.model_dump(exclude_none=True),
        "reasoning": (body.reasoning or Reasoning()).model_dump(),
        "temperature": TEMPERATURE if body.temperature is None else body.temperature,
        "top_p": TOP_P if body.top_p is None else body.top_p, "top_logprobs": body.top_logprobs or 0,
        "max_output_tokens": body.max_output_tokens, "truncation": body.truncation or "disabled",
        "store": body.store is not False, "background": False, "metadata": body.metadata or {}, "user": body.user,
    }


# -- what is kept -----------------------------------------------------------------------------------------------------


@router.get("/v1/responses/{id}", response_model=ToldResponse)
async def retrieve_response(http: Request, id: str) -> Response:
    if http.query_params.get("stream") == "true":
        raise ApiError(400, "a stored response comes whole only", param="stream")
    return JSONResponse((await _stored(http.app.state.store, id)).response)


@router.delete("/v1/responses/{id}", response_model=Deleted)
async def delete_response(http: Request, id: str) -> Any:
    store: Store = http.app.state.store
    if not await store.delete(id):
        raise _unknown(id)
    return {"id": id, "object": "response", "deleted": True}


@router.get("/v1/responses/{id}/input_items", response_model=ItemList)
async def list_input_items(
    http: Request, id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """All items that were answered, those of earlier responses included; `after` the one with this id."""
    items = (await _stored(http.app.state.store, id)).conversation
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((place for place, item in enumerate(items, 1) if item["id"] == after), None)
        if place is None:
            raise ApiError(400, f"the response has no item {after!r}", param="after")
        items = items[place:]
    page = items[:limit]
    return JSONResponse({
        "object": "list", "data": page, "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None, "has_more": len(items) > limit,
    })


async def _stored(store: Store, id: str, param: str | None = None, code: str | None = None) -> Stored:
    stored = await store.get(id)
    if stored is None:
        raise _unknown(id, param, code)
    return stored


def _unknown(id: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(404, f"there is no response {id!r} here", param=param, code=code)
