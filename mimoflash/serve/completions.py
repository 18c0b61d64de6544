"""OpenAI's text completions: what follows a prompt, without a chat template; and log-probabilities of prompts."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from mimoflash.engine import NewTokens, Output, SamplingParams
from mimoflash.serve.chat_completions import DONE, LEAST_LOGPROB, error_frame, nth_params, sampling_params, totals
from mimoflash.serve.chat_schema import AnswerTimings, CompletionUsage, Count, Sampling, Text
from mimoflash.serve.errors import ApiError
from mimoflash.serve.generation import Finished, Timings, Usage, generate, noted
from mimoflash.serve.registry import Served
from mimoflash.serve.respond import STREAMED, Frames, frame, respond, side_by_side
from mimoflash.serve.stops import StopTrimmer
from mimoflash.text import StreamDecoder, Tokenizer

DEFAULT_TOKENS = 16  # as with OpenAI
MOST_LIKELIEST = 1000  # tokens, at each place of a prompt
_FILL = (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))

router = APIRouter()
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """`prompt_logprobs`: of the prompt's tokens, with so many of the likeliest at each place, as with vLLM."""

    model: str
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=128)] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=128)
    ]
    suffix: Text | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST)] | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[Count]


class PromptLogprob(BaseModel):
    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(BaseModel):
    index: Count
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    timings: AnswerTimings


@router.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def completions(http: Request, body: CompletionRequest) -> Response:
    """What follows each prompt; with `stream` as server-sent events."""
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": body.model}
    if body.stream and (body.echo or body.prompt_logprobs is not None):
        raise ApiError(400, "echo and prompt_logprobs come with whole answers only", param="stream")
    return await respond(
        http, body.model, answers=len(_prompts(body)) * (body.n or 1),
        stream=partial(_stream, body, head) if body.stream else None, whole=partial(_whole, body, head),
        error_frame=error_frame,
    )


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt: Any = body.prompt
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def _tokens(prompt: str | list[int], body: CompletionRequest, tokenizer: Tokenizer) -> list[int]:
    """An empty prompt begins with the tokenizer's end-of-text token."""
    if not isinstance(prompt, str):
        return prompt
    if body.suffix is not None:
        known = tokenizer.core.token_to_id
        marks = next((each for each in _FILL if all(known(mark) is not None for mark in each)), None)
        if marks is None:
            raise ApiError(400, "this model has no tokens to fill in the middle", param="suffix")
        prompt = f"{marks[0]}{prompt}{marks[1]}{body.suffix}{marks[2]}"
    return tokenizer.encode(prompt) or [tokenizer.special.end_of_text or 0]


def _params(body: CompletionRequest, served: Served) -> SamplingParams:
    wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if not wanted and not body.echo and body.prompt_logprobs is None:
        raise ApiError(400, "max_tokens is 0: only with echo or prompt_logprobs is there something to say",
                       param="max_tokens")
    echoed = body.logprobs if body.echo else None
    return sampling_params(
        body, max(wanted, 1), served, top_logprobs=body.logprobs or 0,
        prompt_logprobs=echoed if body.prompt_logprobs is None else body.prompt_logprobs,
    )


def _answers(body: CompletionRequest, served: Served) -> AsyncGenerator[tuple[int, NewTokens | Output], None]:
    params, number = _params(body, served), body.n or 1
    return side_by_side([
        generate(served, _tokens(prompt, body, served.tokenizer), nth_params(params, i), "prompt")
        for prompt in _prompts(body) for i in range(number)
    ])


async def _whole(body: CompletionRequest, head: Mapping[str, Any], served: Served) -> Mapping[str, Any]:
    begin, outputs = time.monotonic(), dict[int, Output]()
    first: dict[int, float] = {}
    async with aclosing(_answers(body, served)) as answers:
        async for index, event in answers:
            first.setdefault(index, time.monotonic())
            if isinstance(event, Output):
                outputs[index] = event
    ends = [_end(output, begin, first[index]) for index, output in outputs.items()]
    prompts = [prompt for prompt in _prompts(body) for _ in range(body.n or 1)]

    def choices() -> list[dict[str, Any]]:
        return [_choice(index, outputs[index], prompt, body, served.tokenizer) for index, prompt in enumerate(prompts)]

    told = await asyncio.to_thread(choices)  # a long prompt's log-probabilities do not hold up the others
    return {**head, "choices": told, **totals(ends, body.n or 1)}


def _end(output: Output, begin: float, first: float) -> Finished:
    usage = Usage(output.prompt_tokens, len(output.tokens), output.cached_tokens)
    timings = Timings(first - begin, time.monotonic() - first, output.accept_length)
    return noted(Finished("stop" if output.finish_reason == "stop" else "length", usage, timings))


def _choice(
    index: int, output: Output, prompt: str | list[int], body: CompletionRequest, tokenizer: Tokenizer
) -> dict[str, Any]:
    nothing = body.max_tokens == 0  # a token had to be generated; it was not asked for
    kept = [] if nothing else [i for i, token in enumerate(output.tokens) if token not in tokenizer.stop_ids]
    trimmer = StopTrimmer([body.stop] if isinstance(body.stop, str) else body.stop or ())
    text = trimmer.feed(tokenizer.decode([output.tokens[i] for i in kept], skip_special=True))
    text += trimmer.finish()
    before = ""
    if body.echo:
        before = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    choice: dict[str, Any] = {
        "index": index, "text": before + text,
        "finish_reason": "stop" if output.finish_reason == "stop" and not nothing else "length", "logprobs": None,
    }
    if body.logprobs is not None:
        rows = [(output.tokens[i], output.logprobs[i], output.top_logprobs[i] if output.top_logprobs else ())
                for i in kept]
        if body.echo:
            assert output.prompt_logprobs is not None
            ids = _tokens(prompt, body, tokenizer)
            known = [(token, *(place or (None, ()))) for token, place in zip(ids, output.prompt_logprobs, strict=True)]
            rows = [*known, *rows]
        choice["logprobs"] = _logprobs(rows, body.logprobs, tokenizer)
    if body.prompt_logprobs is not None:
        assert output.prompt_logprobs is not None
        ids = _tokens(prompt, body, tokenizer)
        choice["prompt_logprobs"] = [
            _place(token, place, tokenizer) for token, place in zip(ids, output.prompt_logprobs, strict=True)
        ]
    return choice


def _logprobs(rows: Sequence[tuple[int, float | None, Any]], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    texts = [tokenizer.decode([token]) for token, _, _ in rows]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    likeliest = [
        {tokenizer.decode([other]): max(value, LEAST_LOGPROB) for other, value in row} if logprob is not None else None
        for _, logprob, row in rows
    ]
    return {
        "tokens": texts,
        "token_logprobs": [None if value is None else max(value, LEAST_LOGPROB) for _, value, _ in rows],
        "top_logprobs": likeliest if top else None, "text_offset": offsets[:-1],
    }


def _place(token: int, place: Any, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The token's own log-probability and the likeliest ones', by token id."""
    if place is None:
        return None
    logprob, likeliest = place
    found = {token: {"logprob": max(logprob, LEAST_LOGPROB), "rank": None, "decoded_token": tokenizer.decode([token])}}
    for rank, (other, value) in enumerate(likeliest, 1):
        found[other] = {"logprob": max(value, LEAST_LOGPROB), "rank": rank, "decoded_token": tokenizer.decode([other])}
    return {str(other): known for other, known in found.items()}


async def _stream(body: CompletionRequest, head: Mapping[str, Any], served: Served) -> Frames:
    begin, first = time.monotonic(), dict[int, float]()
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or ()
    count = len(_prompts(body)) * (body.n or 1)
    decoders = [StreamDecoder(served.tokenizer) for _ in range(count)]
    trimmers = [StopTrimmer(stops) for _ in range(count)]
    offsets, ends = [0] * count, list[Finished]()

    def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return frame({**head, "choices": [choice]})

    async with aclosing(_answers(body, served)) as answers:
        async for index, event in answers:
            first.setdefault(index, time.monotonic())
            if isinstance(event, Output):
                end = _end(event, begin, first[index])
                ends.append(end)
                text = trimmers[index].feed(decoders[index].finish()) + trimmers[index].finish()
                yield chunk(index, text, end.reason)
                continue
            kept = [i for i, token in enumerate(event.tokens) if token not in served.tokenizer.stop_ids]
            text = trimmers[index].feed(decoders[index].feed([event.tokens[i] for i in kept]))
            logprobs = None
            if body.logprobs is not None:
                rows = [(event.tokens[i], event.logprobs[i], event.top_logprobs[i] if event.top_logprobs else ())
                        for i in kept]
                logprobs = _logprobs(rows, body.logprobs, served.tokenizer)
                logprobs["text_offset"] = [offsets[index] + offset for offset in logprobs["text_offset"]]
                offsets[index] += sum(map(len, logprobs["tokens"]))
            if text or logprobs:
                yield chunk(index, text, logprobs=logprobs)
    if body.stream_options and body.stream_options.include_usage:
        yield frame({**head, "choices": [], **totals(ends, body.n or 1)})
    yield DONE
