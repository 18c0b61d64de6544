"""OpenAI's Responses: what a request may say, and what comes back. Fields that are not here are ignored."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
)

from mimoflash.serve.chat_schema import Count, Text
from mimoflash.serve.responses_items import Id, Items

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
Status = Literal["in_progress", "completed", "incomplete"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _can_be_sent(value: dict[str, Any]) -> dict[str, Any]:
    """What is told again later: Python reads JSON that it could not write (NaN, halves of surrogate pairs)."""
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


Schema = Annotated[dict[str, Any], AfterValidator(_can_be_sent)]

# -- tools ------------------------------------------------------------------------------------------------------------


class FunctionTool(BaseModel):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class CustomTool(BaseModel):
    """Its input is free text, or, where `format` says so, text of a grammar."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: Schema | None = None


class NamespaceTool(BaseModel):
    type: Literal["namespace"]
    name: Name
    description: str = ""
    tools: list[Annotated[FunctionTool | CustomTool, Field(discriminator="type")]]


class HostedTool(BaseModel):
    """Tools that OpenAI runs itself, and clients can do without: they are not shown to the model."""

    type: Literal[
        "web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "local_shell",
        "image_generation", "tool_search",
    ]


Tool = Annotated[FunctionTool | CustomTool | NamespaceTool | HostedTool, Field(discriminator="type")]


class NamedTool(BaseModel):
    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


class AllowedTools(BaseModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Annotated[NamedTool | HostedTool, Field(discriminator="type")]]


def _choice(given: Any) -> str | None:
    return given.get("type") if isinstance(given, dict) else "a word"


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("a word")] | Annotated[NamedTool, Tag("function")]
    | Annotated[NamedTool, Tag("custom")] | Annotated[AllowedTools, Tag("allowed_tools")],
    Discriminator(_choice),
]

# -- the request ------------------------------------------------------------------------------------------------------


class PlainFormat(BaseModel):
    type: Literal["text", "json_object"]


class SchemaFormat(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"]
    name: str = "answer"
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class TextSettings(BaseModel):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None


class Reasoning(BaseModel):
    """`effort`: none is without, anything else with reasoning. `summary`: with it the reasoning comes as its own
    summary, which more clients show."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


def _refused(value: Any, info: ValidationInfo) -> Any:
    if value:
        raise ValueError(f"{info.field_name} is not supported by this server")
    return value


Refused = Annotated[Literal[False] | None, BeforeValidator(_refused, json_schema_input_type=Literal[False] | None)]


class ResponsesRequest(BaseModel):
    model: str
    input: Items
    instructions: Text | None = None
    previous_response_id: Id | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
    ] | None = None
    user: str | None = None
    background: Refused = None
    conversation: Refused = None
    prompt: Refused = None


# -- what comes back --------------------------------------------------------------------------------------------------


class InputDetails(BaseModel):
    cached_tokens: Count
    cache_write_tokens: Count


class OutputDetails(BaseModel):
    reasoning_tokens: Count


class ResponseUsage(BaseModel):
    input_tokens: Count
    input_tokens_details: InputDetails
    output_tokens: Count
    output_tokens_details: OutputDetails
    total_tokens: Count


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ToldItem(BaseModel):
    """An item as it is told: of those that `AnyItem` lists, with its id."""

    model_config = ConfigDict(extra="allow")

    id: str
    type: Literal[
        "message", "function_call", "custom_tool_call", "function_call_output", "custom_tool_call_output", "reasoning"
    ]
    status: Status | None = None


class ToldResponse(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ToldItem]
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    tools: list[Tool]
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    text: TextSettings
    reasoning: Reasoning
    temperature: float
    top_p: float
    top_logprobs: Count
    max_output_tokens: int | None
    truncation: Literal["auto", "disabled"]
    store: bool
    background: Literal[False]
    metadata: dict[str, str]
    user: str | None


class Deleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(BaseModel):
    object: Literal["list"]
    data: list[ToldItem]
    first_id: str | None
    last_id: str | None
    has_more: bool
