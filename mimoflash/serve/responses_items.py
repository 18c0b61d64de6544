"""Items: what a conversation of OpenAI's Responses is made of, as a request gives them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag

from mimoflash.serve.chat_schema import Text

Id = Annotated[str, Field(min_length=1, max_length=128)]
Role = Literal["user", "assistant", "system", "developer"]


class TextPart(BaseModel):
    type: Literal["input_text", "output_text", "text"]
    text: Text


class RefusalPart(BaseModel):
    type: Literal["refusal"]
    refusal: Text


class UnreadPart(BaseModel):
    """Of a tool's output: the model is told that there is one. Elsewhere it is refused."""

    type: Literal["input_image", "input_file"]


def _parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
Content = Annotated[list[Part], BeforeValidator(_parts, json_schema_input_type=str | list[Part])]
ToolOutput = Text | list[Annotated[TextPart | UnreadPart, Field(discriminator="type")]]


class Item(BaseModel):
    id: Id | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Role
    content: Content


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: Id
    name: str
    namespace: str | None = None
    arguments: Text


class CustomCallItem(Item):
    type: Literal["custom_tool_call"]
    call_id: Id
    name: str
    namespace: str | None = None
    input: Text


class OutputItem(Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Id
    output: ToolOutput


class SummaryPart(BaseModel):
    type: Literal["summary_text"] = "summary_text"
    text: Text


class ReasoningPart(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: Text


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: list[SummaryPart] = []
    content: list[ReasoningPart] | None = None


class ItemReference(BaseModel):
    type: Literal["item_reference"]
    id: Id


def _kind(item: Any) -> str | None:
    return item.get("type") or "message" if isinstance(item, dict) else None


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")] | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")] | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[OutputItem, Tag("custom_tool_call_output")] | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
]


def _items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


_Items = Annotated[list[AnyItem], Field(min_length=1)]
Items = Annotated[_Items, BeforeValidator(_items, json_schema_input_type=Text | _Items)]
