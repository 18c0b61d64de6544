"""Anthropic's Messages API: from a request's JSON to what the model is asked, and from its answer to JSON."""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from mimoflash.engine import SamplingParams
from mimoflash.serve.chat_completions import sampling_params
from mimoflash.serve.chat_schema import Sampling
from mimoflash.serve.errors import ApiError, anthropic_error
from mimoflash.serve.generation import ChatRequest, Finished, Piece, Usage, answer_chat, count_tokens
from mimoflash.serve.messages_schema import (
    AnsweredMessage,
    AnthropicError,
    Block,
    CountTokensRequest,
    CustomTool,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    TokenCount,
    ToolResultBlock,
    ToolUseBlock,
)
from mimoflash.serve.registry import Served
from mimoflash.serve.respond import STREAMED, Frames, frame, respond

SIGNATURE = "unsigned"  # of thinking: clients drop a block without one; here it is not looked at when it comes back

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")  # differs each time: no prompt would be cached

router = APIRouter(responses={status: {"model": AnthropicError} for status in (400, 401, 404, 413, 429, 500)})


@router.post("/v1/messages", response_model=AnsweredMessage, responses=STREAMED)
async def messages(http: Request, body: MessagesRequest) -> Response:
    """A conversation's next message; with `stream` as server-sent events."""
    head = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": body.model}
    return await respond(
        http, body.model, stream=partial(_stream, body, head) if body.stream else None,
        whole=partial(_whole, body, head), error_frame=error_frame,
    )


@router.post("/v1/messages/count_tokens", response_model=TokenCount)
async def count(http: Request, body: CountTokensRequest) -> Response:
    """Tokens of the prompt that the same request would make."""

    async def counted(served: Served) -> Mapping[str, Any]:
        return {"input_tokens": count_tokens(served, _asked(body, SamplingParams()))}

    return await respond(http, body.model, answers=0, stream=None, whole=counted, error_frame=error_frame)


def error_frame(error: ApiError) -> str:
    return frame(anthropic_error(error), "error")


async def _whole(body: MessagesRequest, head: Mapping[str, Any], served: Served) -> Mapping[str, Any]:
    pieces: list[Piece] = []
    async with aclosing(answer_chat(served, _asked(body, _params(body, served)))) as answer:
        async for item in answer:
            if isinstance(item, Finished):
                end = item
            else:
                pieces.append(item)
    content = [_block(list(parts)) for _, parts in groupby(pieces, key=_block_of)]
    return {**head, "content": content, **_stop(end), "usage": _usage(end.usage)}


async def _stream(body: MessagesRequest, head: Mapping[str, Any], served: Served) -> Frames:
    request = _asked(body, _params(body, served))
    blocks = _BlockEvents()
    is_begun = False
    async with aclosing(answer_chat(served, request)) as answer:
        async for item in answer:
            if not is_begun:
                usage = _usage(Usage(prompt_tokens=count_tokens(served, request)))  # what is cached is told at the end
                message = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                yield _event("message_start", message=message)
                is_begun = True
            if isinstance(item, Finished):
                end = _event("message_delta", delta=_stop(item), usage=_usage(item.usage))
                yield blocks.close() + end + _event("message_stop")
            else:
                yield blocks.add(item)


def _event(name: str, **data: Any) -> str:
    return frame({"type": name, **data}, name)


class _BlockEvents:
    """Events of the answer's blocks, one after the other."""

    def __init__(self) -> None:
        self._open: object = None  # what _block_of says of the block under way
        self._index = -1

    def add(self, piece: Piece) -> str:
        text = ""
        if self._open != _block_of(piece):
            text = self.close()
            self._open = _block_of(piece)
            self._index += 1
            text += _event("content_block_start", index=self._index, content_block=_empty(piece))
        return text + self._delta(_delta(piece))

    def close(self) -> str:
        if self._open is None:
            return ""
        text = self._delta({"type": "signature_delta", "signature": SIGNATURE}) if self._open == "reasoning" else ""
        return text + _event("content_block_stop", index=self._index)

    def _delta(self, delta: Mapping[str, Any]) -> str:
        return _event("content_block_delta", index=self._index, delta=delta)


def _block_of(piece: Piece) -> object:
    """What neighbouring pieces of one block have in common."""
    return piece.kind if piece.call is None else piece.call["id"]


def _block(pieces: Sequence[Piece]) -> dict[str, Any]:
    text = "".join(piece.text for piece in pieces)
    block = _empty(pieces[0])
    if pieces[0].call is not None:
        return block | {"input": json.loads(pieces[0].call["function"]["arguments"])}
    return block | ({"thinking": text, "signature": SIGNATURE} if "thinking" in block else {"text": text})


def _empty(piece: Piece) -> dict[str, Any]:
    if piece.call is not None:
        return {"type": "tool_use", "id": piece.call["id"], "name": piece.call["function"]["name"], "input": {}}
    if piece.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.call is not None:
        return {"type": "input_json_delta", "partial_json": piece.call["function"]["arguments"]}
    if piece.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "text_delta", "text": piece.text}


def _stop(end: Finished) -> dict[str, Any]:
    """A call has to be answered, whatever came after it: it is the reason before all others."""
    if end.stopped_by is not None and end.reason != "tool_calls":
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stopped_by}
    return {"stop_reason": _STOP_REASONS[end.reason], "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0, "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


# -- what is asked ----------------------------------------------------------------------------------------------------


def _params(body: MessagesRequest, served: Served) -> SamplingParams:
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=body.stop_sequences)
    return sampling_params(sampling, body.max_tokens, served)


def _asked(body: CountTokensRequest, params: SamplingParams) -> ChatRequest:
    plain = list(_plain_messages(body))
    continues = body.messages[-1].role == "assistant"
    if continues and plain[-1].get("tool_calls"):
        raise ApiError(400, "the last message calls tools: their tool_result blocks have to follow", param="messages")
    form = body.output_config.format if body.output_config else None
    return ChatRequest(
        messages=plain, params=params, tools=[_function(tool) for tool in body.tools or ()],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        schema=form.schema_ if form else None,
        thinking=body.thinking is not None and body.thinking.type != "disabled", continues=continues,
    )


def _function(tool: CustomTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema.model_dump(exclude_none=True)}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _tool_choice(body: CountTokensRequest) -> str:
    choice = body.tool_choice
    if choice is None or choice.type in ("auto", "none"):
        return choice.type if choice else "auto"
    names = [tool.name for tool in body.tools or ()]
    if not names:
        raise ApiError(400, "it asks for a call, but there are no tools", param="tool_choice")
    if choice.type == "any":
        return "required"
    if choice.name not in names:
        raise ApiError(400, f"it names {choice.name!r}; the tools are {', '.join(names)}", param="tool_choice")
    return choice.name


def _plain_messages(body: CountTokensRequest) -> Iterator[dict[str, Any]]:
    """In OpenAI's terms. Neighbours of one role are one turn."""
    if system := _BILLING.sub("", _told(body.system or ())):
        yield {"role": "system", "content": system}
    for role, turns in groupby(body.messages, key=lambda turn: turn.role):
        blocks = [block for turn in turns for block in turn.content]
        if role == "assistant":
            yield _spoken(blocks)
            continue
        yield from (_result(block) for block in blocks if isinstance(block, ToolResultBlock))
        if texts := [block for block in blocks if isinstance(block, TextBlock)]:
            yield {"role": role, "content": _told(texts)}


def _told(texts: Sequence[TextBlock]) -> str:
    """Blocks stand for themselves: clients set reminders and files apart from a question by them."""
    return "\n".join(block.text for block in texts)


def _result(block: ToolResultBlock) -> dict[str, Any]:
    text = _told(block.content)
    content = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _spoken(blocks: Sequence[Block]) -> dict[str, Any]:
    """The assistant's own turn, as it was written: nothing comes between its blocks."""
    message: dict[str, Any] = {
        "role": "assistant", "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    if thoughts := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
        message["reasoning_content"] = "".join(thoughts)
    if calls := [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input)}
    return {"id": block.id, "type": "function", "function": function}
