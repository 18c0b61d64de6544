"""An answer as OpenAI's Responses tell it: items, each with events from its beginning to its end."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mimoflash.serve.chat_completions import logprob_of
from mimoflash.serve.errors import ApiError, openai_error
from mimoflash.serve.generation import Finished, Piece, Usage
from mimoflash.serve.respond import frame
from mimoflash.serve.responses_input import Offer

Event = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How text is told: in an item's `field` as a part, by events that are named after it."""

    item: str
    prefix: str
    field: str
    part: str
    part_event: str
    text_event: str


MESSAGE = Form("message", "msg", "content", "output_text", "content_part", "output_text")
REASONING = Form("reasoning", "rs", "content", "reasoning_text", "content_part", "reasoning_text")
SUMMARY = Form("reasoning", "rs", "summary", "summary_text", "reasoning_summary_part", "reasoning_summary_text")


@dataclass
class Writing:
    """The item whose text is coming."""

    form: Form
    id: str
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def part(self) -> dict[str, Any]:
        part = {"type": self.form.part, "text": "".join(self.text)}
        return part | ({"annotations": [], "logprobs": list(self.logprobs)} if self.form is MESSAGE else {})

    def item(self, status: str, *parts: dict[str, Any]) -> dict[str, Any]:
        head: dict[str, Any] = {"id": self.id, "type": self.form.item, "status": status}
        kind: dict[str, Any] = {"role": "assistant"} if self.form is MESSAGE else {"summary": []}
        return {**head, **kind, self.form.field: list(parts)}


class Answer:
    """Pieces of an answer go in, events come out; `response` is what they have come to."""

    def __init__(self, head: Mapping[str, Any], offers: Mapping[str, Offer], *, summary: bool):
        self.response: dict[str, Any] = {
            "id": new_id("resp"), "object": "response", "created_at": int(time.time()), "completed_at": None,
            "status": "in_progress", "error": None, "incomplete_details": None, "output": [], "usage": None, **head,
        }
        self._offers, self._reasoning = offers, SUMMARY if summary else REASONING
        self._writing: Writing | None = None
        self._events = 0

    def take(self, piece: Piece | Finished) -> list[Event]:
        return list(self._take(piece))

    def error_frame(self, error: ApiError) -> str:
        """The end of a stream that fails."""
        if self._events:
            code = "server_error" if error.status >= 500 else "invalid_prompt"
            self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
            event = self._lifecycle("failed")
        else:  # nested as clients read it, flat as it is documented
            told = openai_error(error)
            event = self._event("error", **told, **{key: told["error"][key] for key in ("code", "message", "param")})
        return event_frame(event)

    def _take(self, piece: Piece | Finished) -> Iterator[Event]:
        if not self._events:
            yield self._lifecycle("created")
            yield self._lifecycle("in_progress")
        if isinstance(piece, Finished):
            yield from self._finish(piece)
        elif piece.call is not None:
            yield from self._close("completed")
            yield from self._call(piece.call)
        else:
            yield from self._write(piece)

    def _write(self, piece: Piece) -> Iterator[Event]:
        form = self._reasoning if piece.kind == "reasoning" else MESSAGE
        if self._writing is None or self._writing.form is not form:
            yield from self._close("completed")
            yield from self._begin(form)
        writing = self._writing
        assert writing is not None
        logprobs = list(map(logprob_of, piece.tokens))
        writing.text.append(piece.text)
        writing.logprobs += logprobs
        yield self._of_part(writing, f"{form.text_event}.delta", delta=piece.text, **_with(form, logprobs))

    def _begin(self, form: Form) -> Iterator[Event]:
        self._writing = writing = Writing(form, new_id(form.prefix))
        yield self._event("response.output_item.added", item=writing.item("in_progress"), **self._place())
        yield self._of_part(writing, f"{form.part_event}.added", part=writing.part())

    def _close(self, status: str) -> Iterator[Event]:
        """Of the text that was coming."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        form, part = writing.form, writing.part()
        yield self._of_part(writing, f"{form.text_event}.done", text=part["text"], **_with(form, writing.logprobs))
        yield self._of_part(writing, f"{form.part_event}.done", part=part)
        yield self._done(writing.item(status, part))

    def _call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        item, given = _call_item(call, self._offers)
        events = "response.custom_tool_call_input" if given == "input" else "response.function_call_arguments"
        place = {"item_id": item["id"], **self._place()}
        yield self._event(
            "response.output_item.added", item={**item, given: "", "status": "in_progress"}, **self._place()
        )
        yield self._event(f"{events}.delta", delta=item[given], **place)
        yield self._event(f"{events}.done", **{given: item[given]}, **place)
        yield self._done(item)

    def _finish(self, end: Finished) -> Iterator[Event]:
        cut = end.reason == "length"
        if not cut and not any(item["type"] != "reasoning" for item in self.response["output"]) and (
            self._writing is None or self._writing.form is not MESSAGE
        ):
            yield from self._write(Piece("content"))  # clients look for a message
        yield from self._close("incomplete" if cut else "completed")
        self.response |= {
            "status": "incomplete" if cut else "completed", "usage": usage_of(end.usage),
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        }
        yield self._lifecycle(self.response["status"])

    def _done(self, item: dict[str, Any]) -> Event:
        event = self._event("response.output_item.done", item=item, **self._place())
        self.response["output"].append(item)
        return event

    def _place(self) -> dict[str, int]:
        return {"output_index": len(self.response["output"])}

    def _of_part(self, writing: Writing, name: str, **more: Any) -> Event:
        index = {f"{writing.form.field}_index": 0}
        return self._event(f"response.{name}", item_id=writing.id, **self._place(), **index, **more)

    def _lifecycle(self, name: str) -> Event:
        return self._event(f"response.{name}", response={**self.response, "output": list(self.response["output"])})

    def _event(self, type: str, **more: Any) -> Event:
        self._events += 1
        return {"type": type, "sequence_number": self._events - 1, **more}


def _with(form: Form, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"logprobs": logprobs} if form is MESSAGE else {}


def _call_item(call: Mapping[str, Any], offers: Mapping[str, Offer]) -> tuple[dict[str, Any], str]:
    """The item, and its field with what the call is given. A name that nobody offered is told as it is."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    offer = offers.get(name) or Offer(name, None, False, {})
    known = {"call_id": call["id"], "name": offer.name, "status": "completed"}
    if offer.namespace:
        known["namespace"] = offer.namespace
    if offer.custom:
        given = json.loads(arguments).get("input", arguments)
        return {"id": new_id("ctc"), "type": "custom_tool_call", **known, "input": str(given)}, "input"
    return {"id": new_id("fc"), "type": "function_call", **known, "arguments": arguments}, "arguments"


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def event_frame(event: Event) -> str:
    return frame(event, event["type"])


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
