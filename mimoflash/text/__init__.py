"""Text: tokens, the chat format, and what a model's text means (messages, reasoning, tool calls)."""

from mimoflash.text.arguments import typed_argument
from mimoflash.text.chat import encode_training_chat, render_chat
from mimoflash.text.parser import ChatParser, Event, parse_chat
from mimoflash.text.tokenizer import (
    FAMILY_TOKENS,
    SpecialTokens,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "FAMILY_TOKENS",
    "ChatParser",
    "Event",
    "SpecialTokens",
    "StreamDecoder",
    "Tokenizer",
    "encode_training_chat",
    "load_tokenizer",
    "parse_chat",
    "render_chat",
    "train_tokenizer",
    "typed_argument",
]
