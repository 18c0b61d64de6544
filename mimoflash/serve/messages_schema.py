"""Anthropic's messages: what a request may say, and what comes back. Fields that are not here (cache_control, metadata,
those of betas) are ignored, since clients send many."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mimoflash.serve.chat_schema import Count, Text


class TextBlock(BaseModel):
    type: Literal["text"]
    text: Text


def _readable(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind not in _BLOCKS:
        raise ValueError(f"{kind} blocks cannot be read here, only {', '.join(_BLOCKS)}: give their content as text")
    return block


def _blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_Texts = list[Annotated[TextBlock, BeforeValidator(_readable)]]
Texts = Annotated[_Texts, BeforeValidator(_blocks, json_schema_input_type=Text | _Texts)]


class ThinkingBlock(BaseModel):
    type: Literal["thinking"]
    thinking: Text
    signature: str = ""


class RedactedThinkingBlock(BaseModel):
    """Another server's, that only it can read: it says nothing here."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(BaseModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = Field(default_factory=list)
    is_error: bool = False


_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
_OF_ROLE = {
    "user": ("text", "tool_result"), "system": ("text",),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
}
Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
_Content = list[Annotated[Block, Field(discriminator="type"), BeforeValidator(_readable)]]


class Turn(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[_Content, BeforeValidator(_blocks, json_schema_input_type=Text | _Content)]

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Turn":
        if not self.content and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        for block in self.content:
            if block.type not in _OF_ROLE[self.role]:
                raise ValueError(f"a message of role {self.role} takes no {block.type} block")
        return self


class InputSchema(BaseModel):
    """JSON Schema of an object."""

    model_config = ConfigDict(extra="allow")
    type: Literal["object"]
    properties: dict[str, Any] | None = None
    required: list[str] | None = None


class CustomTool(BaseModel):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
    description: str | None = None
    input_schema: InputSchema


def _is_custom(tool: Any) -> Any:
    """A tool that Anthropic runs, or whose schema only Anthropic's models know, is refused: without it an answer would
    seem to have been searched for, say. Coding tools ask for these in requests of their own and show what they are
    told; the tools they work with are custom ones."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise ValueError(f"{kind} is a tool of Anthropic's: only custom tools, with an input_schema, can be used here")
    return tool


class ToolChoice(BaseModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _says_which(self) -> "ToolChoice":
        if self.type == "tool" and self.name is None:
            raise ValueError("name is missing: give the tool's beside the type tool")
        return self


class Thinking(BaseModel):
    """`budget_tokens` is taken, but nothing holds the model to it."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Count | None = None


class OutputFormat(BaseModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    format: OutputFormat | None = None


class CountTokensRequest(BaseModel):
    model: str
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Texts | None = None
    tools: list[Annotated[CustomTool, BeforeValidator(_is_custom)]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stream: bool | None = None


# -- what comes back --------------------------------------------------------------------------------------------------


class OutputDetails(BaseModel):
    thinking_tokens: Count


class MessageUsage(BaseModel):
    """The prompt's tokens are `input_tokens` and, where the cache had them, `cache_read_input_tokens`."""

    input_tokens: Count
    cache_read_input_tokens: Count
    cache_creation_input_tokens: Literal[0]
    output_tokens: Count
    output_tokens_details: OutputDetails


class AnsweredMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    input_tokens: Count


class AnthropicErrorBody(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"]
    error: AnthropicErrorBody
