"""Text to token ids and back: a byte-level BPE, the roles of its special tokens, and the chat template it came with.

`load_tokenizer` reads what a published checkpoint ships, `train_tokenizer` makes one from text, `Tokenizer.save` writes
a folder that transformers' `AutoTokenizer` reads. `StreamDecoder` turns tokens into text as they arrive.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders
from tokenizers.pre_tokenizers import ByteLevel

from mimoflash.text.vocabulary import core_from_gguf, core_to_gguf, read_gguf_fields, train_core

FAMILY_TOKENS: Mapping[str, str] = {  # role -> text, in the order in which a new vocabulary gets them
    "end_of_text": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "tool_call": "<tool_call>",
    "end_tool_call": "</tool_call>",
    "tool_response": "<tool_response>",
    "end_tool_response": "</tool_response>",
    "think": "<think>",
    "end_think": "</think>",
}
FAMILY_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
_CONTROL_ROLES = ("end_of_text", "im_start", "im_end")  # the other roles are text that the chat parser must see


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids by role; None for a role that the vocabulary has no token for."""

    end_of_text: int | None
    im_start: int | None
    im_end: int | None
    tool_call: int | None
    end_tool_call: int | None
    tool_response: int | None
    end_tool_response: int | None
    think: int | None
    end_think: int | None


class Tokenizer:
    """A byte-level BPE with roles for its special tokens.

    `core` is the `tokenizers.Tokenizer`. `special_texts` says which token plays which role (roles as in
    `FAMILY_TOKENS`; roles left out keep the family's text). `config` is tokenizer_config.json's content: its eos, bos
    and pad tokens are used, the rest is kept for `save`. `chat_template` is the checkpoint's own Jinja source; None
    where ours is to be used. Raises ValueError for an unknown role or a vocabulary that is not byte-level.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        special_texts: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        roles = [field.name for field in fields(SpecialTokens)]
        if unknown := set(special_texts or {}) - set(roles):
            raise ValueError(
                f"unknown role of a special token: {', '.join(sorted(unknown))}; known: {', '.join(roles)}"
            )
        if not isinstance(core.decoder, decoders.ByteLevel):
            raise ValueError("the tokenizer's decoder is not ByteLevel: only byte-level BPE is supported")
        self.core = core
        self.config = dict(config or {})
        self.chat_template = chat_template
        self.special_texts: dict[str, str] = {**FAMILY_TOKENS, **(special_texts or {})}
        self.special = SpecialTokens(**{role: core.token_to_id(text) for role, text in self.special_texts.items()})
        eos = self.config_token("eos_token")
        ends = (self.special.im_end, self.special.end_of_text, core.token_to_id(eos) if eos else None)
        self.stop_ids: frozenset[int] = frozenset(index for index in ends if index is not None)
        self._added = core.get_added_tokens_decoder()
        shown = {index for role, index in vars(self.special).items() if role not in _CONTROL_ROLES}
        self._skipped = {index for index, token in self._added.items() if token.special} - shown
        self._bytes: dict[int, bytes] = {}  # filled as ids are decoded

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], special_texts: Mapping[str, str] | None = None) -> "Tokenizer":
        """From a GGUF file's metadata: plain values by key (`read_gguf_fields`) or `gguf.GGUFReader(path).fields`."""
        values = {key: field.contents() if hasattr(field, "contents") else field for key, field in fields.items()}
        tokens = values.get("tokenizer.ggml.tokens", [])
        names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
        ids = {name: values.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
        return cls(
            core_from_gguf(values),
            special_texts=special_texts,
            config={name: tokens[index] for name, index in ids.items() if index is not None},
            chat_template=values.get("tokenizer.chat_template"),
        )

    def gguf_fields(self) -> dict[str, Any]:
        """The `tokenizer.*` metadata of a GGUF file with this vocabulary: the inverse of `from_gguf`."""
        values = core_to_gguf(self.core)
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
            index = self.core.token_to_id(self.config_token(name) or "")
            if index is not None:
                values[f"tokenizer.ggml.{key}_token_id"] = index
        if self.chat_template is not None:
            values["tokenizer.chat_template"] = self.chat_template
        return values

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's embedding may be larger: the ids beyond decode to nothing."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they are the same: a hash of vocabulary, merges and pre-tokenizer."""
        return hashlib.blake2b(self.core.to_str().encode(), digest_size=16).hexdigest()

    @property
    def template(self) -> str:
        """The Jinja source that renders a chat: the checkpoint's own, else ours with these special tokens."""
        if self.chat_template is not None:
            return self.chat_template
        source = FAMILY_TEMPLATE
        for role, text in self.special_texts.items():
            source = source.replace(FAMILY_TOKENS[role], text)
        return source

    def config_token(self, name: str) -> str | None:
        """The text of `eos_token`, `bos_token` or `pad_token` of tokenizer_config.json."""
        token = self.config.get(name)
        return token["content"] if isinstance(token, dict) else token

    def encode(self, text: str) -> list[int]:
        """Token ids of the text. Special tokens written in it become their ids; nothing (no BOS) is added."""
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD.

        `skip_special` leaves out control tokens (turns, end of text) but never the think and tool tags: they are for
        the parser.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes behind the ids. Ids outside the vocabulary stand for nothing."""
        skipped = self._skipped if skip_special else ()
        return b"".join([self._token_bytes(int(index)) for index in ids if int(index) not in skipped])

    def _token_bytes(self, index: int) -> bytes:
        known = self._bytes.get(index)
        if known is None:
            token = self.core.id_to_token(index) or ""
            plain = index in self._added or any(char not in _BYTE_OF_CHAR for char in token)
            known = token.encode() if plain else bytes(_BYTE_OF_CHAR[char] for char in token)
            self._bytes[index] = known
        return known

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja (ours where the tokenizer has none)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.config}
        config.pop("chat_template", None)
        config["special_token_roles"] = self.special_texts
        self.core.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8"
        )
        (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8", newline="")


def load_tokenizer(path: str | Path, special_texts: Mapping[str, str] | None = None) -> Tokenizer:
    """A tokenizer from a folder with tokenizer.json, from a tokenizer.json, or from a .gguf file.

    tokenizer_config.json and chat_template.jinja are read where they stand beside tokenizer.json. `special_texts`
    overrides the roles of tokens that the folder names. Raises ValueError where nothing of that kind is at `path`.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return Tokenizer.from_gguf(read_gguf_fields(path), special_texts)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file():
        raise ValueError(f"no tokenizer at {path}: give a tokenizer.json, a folder with one, or a .gguf file")
    config_file, template_file = file.with_name("tokenizer_config.json"), file.with_name("chat_template.jinja")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template_file.is_file():
        template = template_file.read_bytes().decode("utf-8")
    return Tokenizer(
        tokenizers.Tokenizer.from_file(str(file)),
        special_texts={**config.get("special_token_roles", {}), **(special_texts or {})},
        config=config,
        chat_template=template,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE on the texts: single digits, the family's word boundaries, its special tokens at the end.

    Where a special token stands in a text, no merge reaches across it: it will be a token by itself.

    The result has at most `vocab_size` entries, fewer where the texts are too few. ValueError where it cannot hold
    bytes and specials.
    """
    smallest = 256 + len(FAMILY_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but bytes and special tokens need {smallest}")
    between = re.compile("|".join(re.escape(text) for text in FAMILY_TOKENS.values()))
    pieces = (piece for text in texts for piece in between.split(text) if piece)
    core = train_core(pieces, vocab_size - len(FAMILY_TOKENS))
    core.add_tokens(
        [AddedToken(text, normalized=False, special=role in _CONTROL_ROLES) for role, text in FAMILY_TOKENS.items()]
    )
    ends = {"eos_token": FAMILY_TOKENS["im_end"], "pad_token": FAMILY_TOKENS["end_of_text"]}
    return Tokenizer(core, config=ends)


class StreamDecoder:
    """Text of tokens as they arrive, each byte looked at once; a character is given out when its last byte has come.

    The pieces joined are `tokenizer.decode(all ids, skip_special=skip_special)`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that became complete with these ids."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids, skip_special=self._skip_special))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became complete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """Byte by its printable character of GPT-2: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
assert set(_BYTE_OF_CHAR) == set(ByteLevel.alphabet())
