"""OpenAI's chat completions: from a request's JSON to what the model is asked, and from its answer to JSON."""

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from mimoflash.engine import SamplingParams
from mimoflash.serve.chat_schema import ChatCompletion, ChatCompletionRequest, Message, NamedTool, Sampling
from mimoflash.serve.errors import ApiError, openai_error
from mimoflash.serve.generation import ChatRequest, Finished, Piece, Timings, Token, Usage, answer_chat, refused
from mimoflash.serve.registry import Served
from mimoflash.serve.respond import STREAMED, Frames, frame, respond, side_by_side

TEMPERATURE, TOP_P = 0.8, 0.95  # the family's own
LEAST_LOGPROB = -9999.0  # JSON has no infinity
DONE = "data: [DONE]\n\n"

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat_completions(http: Request, body: ChatCompletionRequest) -> Response:
    """A conversation's next message; with `stream` as server-sent events."""
    number = body.n or 1
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return await respond(
        http, body.model, answers=number,
        stream=partial(_stream, body, head, usage) if body.stream else None,
        whole=partial(_whole, body, head), error_frame=error_frame,
    )


def error_frame(error: ApiError) -> str:
    return frame(openai_error(error))


def _answers(body: ChatCompletionRequest, served: Served) -> AsyncGenerator[tuple[int, Piece | Finished], None]:
    request = _asked(body, served)
    return side_by_side([
        answer_chat(served, replace(request, params=nth_params(request.params, i))) for i in range(body.n or 1)
    ])


async def _whole(body: ChatCompletionRequest, head: Mapping[str, Any], served: Served) -> Mapping[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in range(body.n or 1)]
    ends: dict[int, Finished] = {}
    async with aclosing(_answers(body, served)) as answers:
        async for index, item in answers:
            if isinstance(item, Finished):
                ends[index] = item
            else:
                pieces[index].append(item)
    choices = [_choice(index, each, ends[index], body) for index, each in enumerate(pieces)]
    return {**head, "object": "chat.completion", "choices": choices, **totals(list(ends.values()), body.n or 1)}


def _choice(index: int, pieces: Sequence[Piece], end: Finished, body: ChatCompletionRequest) -> dict[str, Any]:
    calls = [_call(piece.call) for piece in pieces if piece.call is not None]
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if reasoning := "".join(piece.text for piece in pieces if piece.kind == "reasoning"):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    tokens = [token for piece in pieces for token in piece.tokens]
    logprobs = {"content": list(map(logprob_of, tokens))} if body.logprobs else None
    return {"index": index, "message": message, "finish_reason": end.reason, "logprobs": logprobs}


async def _stream(body: ChatCompletionRequest, head: Mapping[str, Any], usage: bool, served: Served) -> Frames:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return frame({**head, "choices": [choice]} | ({"usage": None} if usage else {}))

    begun: set[int] = set()
    ends: list[Finished] = []
    async with aclosing(_answers(body, served)) as answers:
        async for index, item in answers:
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if isinstance(item, Finished):
                ends.append(item)
                yield chunk(index, {}, item.reason)
            else:
                logprobs = {"content": list(map(logprob_of, item.tokens))} if item.tokens else None
                yield chunk(index, _delta(item), logprobs=logprobs)
    if usage:
        yield frame({**head, "choices": [], **totals(ends, body.n or 1)})
    yield DONE


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.call is not None:
        return {"tool_calls": [{"index": piece.call["index"], **_call(piece.call)}]}
    return {"reasoning_content" if piece.kind == "reasoning" else "content": piece.text}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call["id"], "type": "function", "function": dict(call["function"])}


def logprob_of(token: Token) -> dict[str, Any]:
    def one(text: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text)}

    return {**one(token.text, token.logprob), "top_logprobs": [one(*other) for other in token.likeliest]}


def totals(ends: Sequence[Finished], n: int = 1) -> dict[str, Any]:
    """`usage` and `timings` of all answers to a request, `n` to each prompt, which counts once."""
    usage = Usage(
        sum(end.usage.prompt_tokens for end in ends) // n, sum(end.usage.completion_tokens for end in ends),
        sum(end.usage.cached_tokens for end in ends) // n, sum(end.usage.reasoning_tokens for end in ends),
    )
    prompt, generation = max(e.timings.prompt for e in ends), max(e.timings.generation for e in ends)
    accepted = sum(end.timings.accept_length for end in ends) / len(ends)
    return {"usage": usage_of(usage), "timings": timings_of(usage, Timings(prompt, generation, accepted))}


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def timings_of(usage: Usage, timings: Timings) -> dict[str, Any]:
    """As llama.cpp's server tells them."""
    read = usage.prompt_tokens - usage.cached_tokens
    return {
        "prompt_n": read, "prompt_ms": 1000 * timings.prompt,
        "prompt_per_second": read / timings.prompt if timings.prompt > 0 else 0.0,
        "predicted_n": usage.completion_tokens, "predicted_ms": 1000 * timings.generation,
        "predicted_per_second": timings.rate(usage), "accept_length": timings.accept_length,
    }


# -- what is asked ----------------------------------------------------------------------------------------------------


def _asked(body: ChatCompletionRequest, served: Served) -> ChatRequest:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    variables = dict(body.chat_template_kwargs or {})
    begun = bool(body.continue_final_message and body.messages[-1].reasoning_content)
    thinking = variables.pop("enable_thinking", begun or body.reasoning_effort not in (None, "none"))
    top = (body.top_logprobs or 0) if body.logprobs else 0
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)  # a name: once
    continues = bool(body.continue_final_message)
    if continues and body.messages[-1].role != "assistant":
        raise ApiError(400, "the last message is not the assistant's: there is nothing to continue", param="messages")
    return ChatRequest(
        messages=[plain_message(message) for message in body.messages],
        params=sampling_params(body, body.max_completion_tokens or body.max_tokens, served, top_logprobs=top),
        tools=tools, tool_choice=_tool_choice(body, tools),
        parallel_tool_calls=parallel, schema=_schema(body), thinking=bool(thinking),
        template=variables, continues=continues, want_logprobs=bool(body.logprobs),
    )


def plain_message(message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = "".join(part.text if part.type != "refusal" else part.refusal for part in message.content)
    return plain


def _tool_choice(body: ChatCompletionRequest, tools: Sequence[Mapping[str, Any]]) -> str:
    choice = body.tool_choice or "auto"
    if choice in ("auto", "none"):
        return str(choice)
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    if not isinstance(choice, NamedTool):
        return choice
    names = [tool["function"]["name"] for tool in tools]
    if choice.function.name not in names:
        raise ApiError(
            400, f"tool_choice names {choice.function.name!r}; the tools are {', '.join(names)}", param="tool_choice"
        )
    return choice.function.name


def _schema(body: ChatCompletionRequest) -> Mapping[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    return wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}


def sampling_params(
    body: Sampling, max_tokens: int | None, served: Served, *, top_logprobs: int = 0, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Raises ApiError for what the engine does not take."""
    bias: dict[int, float] = {}
    for token, value in (body.logit_bias or {}).items():
        if not token.isdecimal():
            raise ApiError(400, f"logit_bias has {token!r}: its keys are token ids", param="logit_bias")
        bias[int(token)] = -float("inf") if value == -100 else value  # a ban, as with OpenAI
    given: dict[str, Any] = {
        "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty, "min_p": body.min_p, "stop": body.stop,
        "ignore_stop_tokens": body.ignore_eos, "top_k": None if body.top_k == -1 else body.top_k,
        "seed": None if body.seed is None else body.seed % 2**64,
    }
    try:
        return SamplingParams(
            max_tokens=served.most_tokens if max_tokens is None else max_tokens,
            temperature=_at_least(TEMPERATURE if body.temperature is None else body.temperature),
            top_p=TOP_P if body.top_p is None else body.top_p, logit_bias=bias, top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs, **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise refused(error, "messages") from None


def _at_least(temperature: float) -> float:
    """As good as greedy is greedy."""
    return 0.0 if temperature < 1e-6 else temperature


def nth_params(params: SamplingParams, index: int) -> SamplingParams:
    """Of the n-th of several answers: each draws for itself."""
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index) % 2**64)
