"""What a Responses request asks, in the terms that all chat APIs share: its items as messages, its tools as functions.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mimoflash.serve.chat_completions import sampling_params
from mimoflash.serve.chat_schema import Sampling
from mimoflash.serve.errors import ApiError
from mimoflash.serve.generation import ChatRequest, count_tokens
from mimoflash.serve.registry import Served
from mimoflash.serve.responses_schema import (
    AllowedTools,
    CustomTool,
    FunctionTool,
    HostedTool,
    NamedTool,
    NamespaceTool,
    ResponsesRequest,
    SchemaFormat,
    Tool,
)

LOGPROBS = "message.output_text.logprobs"
FREE_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


@dataclass(frozen=True)
class Offer:
    """A tool that the model may call, as `function`; how the client calls it. `custom`: its input is free text, for
    which the function has one parameter."""

    name: str
    namespace: str | None
    custom: bool
    function: Mapping[str, Any]


def offers_of(tools: Sequence[Tool]) -> dict[str, Offer]:
    """By the name that the model uses. Raises ApiError where two get the same."""
    found: dict[str, Offer] = {}
    for tool in tools:
        inner = tool.tools if isinstance(tool, NamespaceTool) else [tool]
        namespace = tool.name if isinstance(tool, NamespaceTool) else None
        for each in inner:
            if isinstance(each, FunctionTool | CustomTool):
                name = full_name(each.name, namespace)
                if name in found:
                    raise ApiError(400, f"two tools are called {name}", param="tools")
                function = {"name": name, "description": _description(each), "parameters": _parameters(each)}
                function = {key: value for key, value in function.items() if value is not None}
                found[name] = Offer(each.name, namespace, isinstance(each, CustomTool), function)
    return found


def full_name(name: str, namespace: str | None) -> str:
    return f"{namespace}.{name}" if namespace else name


def _parameters(tool: FunctionTool | CustomTool) -> Mapping[str, Any] | None:
    return FREE_INPUT if isinstance(tool, CustomTool) else tool.parameters


def _description(tool: FunctionTool | CustomTool) -> str | None:
    if isinstance(tool, FunctionTool) or not tool.format or "definition" not in tool.format:
        return tool.description
    grammar = f"Its input follows this grammar ({tool.format.get('syntax')}):\n{tool.format['definition']}"
    return f"{tool.description}\n\n{grammar}" if tool.description else grammar


def chat_request(
    body: ResponsesRequest, conversation: Sequence[Mapping[str, Any]], offers: Mapping[str, Offer], served: Served
) -> ChatRequest:
    """Raises ApiError for what cannot be asked."""
    wanted = bool(body.top_logprobs) or LOGPROBS in (body.include or ())
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p)
    allowed, choice = _chosen(body, offers)
    parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)  # a name: once
    request = ChatRequest(
        messages=chat_messages(conversation, body.instructions),
        params=sampling_params(sampling, body.max_output_tokens, served, top_logprobs=body.top_logprobs or 0),
        tools=[{"type": "function", "function": offer.function} for offer in allowed.values()], tool_choice=choice,
        parallel_tool_calls=parallel, schema=_schema(body),
        thinking=body.reasoning is not None and body.reasoning.effort not in (None, "none"), want_logprobs=wanted,
    )
    return _fitting(request, served) if body.truncation == "auto" else request


def _chosen(body: ResponsesRequest, offers: Mapping[str, Offer]) -> tuple[Mapping[str, Offer], str]:
    """The tools that are shown, and which of them are called: auto, none, required or a name."""
    choice = body.tool_choice or "auto"
    if isinstance(choice, AllowedTools):
        names = [_known(tool, offers) for tool in choice.tools if not isinstance(tool, HostedTool)]
        offers, choice = {name: offers[name] for name in names}, choice.mode
    if choice == "required" and not offers:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    return offers, _known(choice, offers) if isinstance(choice, NamedTool) else choice


def _known(tool: NamedTool, offers: Mapping[str, Offer]) -> str:
    name = full_name(tool.name, tool.namespace)
    if name not in offers:
        known = f"the tools are {', '.join(offers)}" if offers else "there are no tools"
        raise ApiError(400, f"tool_choice names {name!r}; {known}", param="tool_choice")
    return name


def _schema(body: ResponsesRequest) -> Mapping[str, Any] | None:
    wanted = body.text.format if body.text else None
    if isinstance(wanted, SchemaFormat):
        return wanted.schema_
    return {"type": "object"} if wanted and wanted.type == "json_object" else None


def _fitting(request: ChatRequest, served: Served) -> ChatRequest:
    """Without its oldest turns, so many that the answer has room: what is asked for, but at most an eighth of the
    context. The system messages at the start stay, and the last turn."""
    messages = list(request.messages)
    first = next((i for i, each in enumerate(messages) if each["role"] != "system"), len(messages))
    starts = [first, *(i for i, each in enumerate(messages) if each["role"] == "user" and i > first)]
    room = max(1, min(request.params.max_tokens, served.most_tokens // 8))

    def from_(start: int) -> ChatRequest:
        return replace(request, messages=[*messages[:first], *messages[start:]])

    def fits(start: int) -> bool:
        return count_tokens(served, from_(start)) + room <= served.most_tokens

    return from_(starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)])


# -- items as messages ------------------------------------------------------------------------------------------------


def chat_messages(conversation: Iterable[Mapping[str, Any]], instructions: str | None = None) -> list[dict[str, Any]]:
    """Raises ApiError for the output of a call that is not there."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    called: set[str] = set()
    for item in conversation:
        kind = item["type"]
        if kind.endswith("_output"):
            if item["call_id"] not in called:
                raise ApiError(400, f"there is no call with the call_id {item['call_id']!r} of this output",
                               param="input")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item["output"])})
        elif kind == "reasoning":
            if text := text_of(item.get("content") or item["summary"]):
                _add_text(_turn(messages, after=("content", "tool_calls")), "reasoning_content", text)
        elif kind != "message":
            called.add(item["call_id"])
            _turn(messages).setdefault("tool_calls", []).append(_call(item))
        elif item["role"] == "assistant":
            _add_text(_turn(messages, after=("content",)), "content", text_of(item["content"]))
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            messages.append({"role": role, "content": text_of(item["content"])})
    return messages


def _turn(messages: list[dict[str, Any]], after: Sequence[str] = ()) -> dict[str, Any]:
    """The assistant's message that goes on: the last one, but what cannot come `after` a part of it begins another."""
    if not messages or messages[-1]["role"] != "assistant" or any(part in messages[-1] for part in after):
        messages.append({"role": "assistant"})
    return messages[-1]


def _add_text(message: dict[str, Any], field: str, text: str) -> None:
    message[field] = message.get(field, "") + text


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    custom = item["type"] == "custom_tool_call"
    arguments = json.dumps({"input": item["input"]}, ensure_ascii=False) if custom else item["arguments"]
    function = {"name": full_name(item["name"], item.get("namespace")), "arguments": arguments}
    return {"id": item["call_id"], "type": "function", "function": function}


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(map(_part_text, content))


def _part_text(part: Mapping[str, Any]) -> str:
    if part["type"] in ("input_image", "input_file"):
        return f"[{part['type'].removeprefix('input_')} left out: only text can be read here]"
    return part["refusal"] if part["type"] == "refusal" else part["text"]
