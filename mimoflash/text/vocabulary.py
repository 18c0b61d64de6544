"""Byte-level BPE vocabularies: trained from text, read from a GGUF file's metadata, and written back to it.

Everything here deals in `tokenizers.Tokenizer` (called a core) and plain values; `tokenizer.py` wraps a core with the
roles of its tokens. The pre-tokenizers are named as in GGUF's `tokenizer.ggml.pre`, so that a vocabulary trained here
runs in llama.cpp too.
"""

import json
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

# The family's words: contractions, letters with one leading mark, single digits, punctuation, line ends, other space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer that GGUF calls `name`: "qwen2" (the family's), "smollm", or "gpt-2" (also "default")."""
    if name == "qwen2":
        words = Split(Regex(_WORDS), "isolated")
        return pre_tokenizers.Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    if name == "smollm":
        return pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in ("gpt-2", "default"):
        return ByteLevel(add_prefix_space=False)
    raise ValueError(f"pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known: qwen2, smollm, gpt-2 and default are")


def train_core(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` entries (fewer if no pair of tokens in the texts occurs twice any more)."""
    core = _core({}, [], "qwen2")
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return core


def core_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """The core that a GGUF file's `tokenizer.ggml.*` values describe; ValueError where it is not a byte-level BPE."""
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {kind!r}: only byte-level BPE ('gpt2') is supported")
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    core = _core(vocabulary, merges, fields.get("tokenizer.ggml.pre", "default"))
    core.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return core


def core_to_gguf(core: Tokenizer) -> dict[str, Any]:
    """The `tokenizer.ggml.*` values of a core, `core_from_gguf`'s inverse; ValueError for a foreign pre-tokenizer."""
    added = core.get_added_tokens_decoder()
    by_id = {index: token for token, index in core.get_vocab(with_added_tokens=True).items()}
    size = max(by_id) + 1
    merges = json.loads(core.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_name(core),
        "tokenizer.ggml.tokens": [by_id.get(index, f"[PAD{index}]") for index in range(size)],
        "tokenizer.ggml.token_type": [
            (_CONTROL if added[index].special else _USER_DEFINED) if index in added else _NORMAL
            for index in range(size)
        ],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": False,
    }


def _core(vocabulary: dict[str, int], merges: list[Any], pre: str) -> Tokenizer:
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizer(pre)
    core.decoder = decoders.ByteLevel()
    return core


def _pre_tokenizer_name(core: Tokenizer) -> str:
    def essence(pre: PreTokenizer) -> Any:  # trim_offsets moves offsets, never ids
        return json.loads(pre.__getstate__(), object_hook=lambda d: {k: v for k, v in d.items() if k != "trim_offsets"})

    if core.pre_tokenizer is not None:
        for name in ("qwen2", "smollm", "gpt-2"):
            if essence(core.pre_tokenizer) == essence(pre_tokenizer(name)):
                return name
    raise ValueError("this vocabulary's pre-tokenizer has no name in GGUF that is known here (qwen2, smollm, gpt-2)")


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf_fields(path: str | Path) -> dict[str, Any]:
    """All metadata of a little-endian GGUF file (version 2 or 3) as plain values by key; no tensor is touched.

    `gguf.GGUFReader` makes an array per string, seconds for a vocabulary; this takes a fraction of a second.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, _, count = struct.unpack_from("<4sIQQ", data, 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        fields, at = {}, 24
        for _ in range(count):
            key, at = _read_value(data, at, _STRING)
            (kind,) = struct.unpack_from("<I", data, at)
            fields[key], at = _read_value(data, at + 4, kind)
        return fields


def _read_value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """The value of GGUF type `kind` at offset `at`, and the offset after it."""
    if kind == _STRING:
        end = at + 8 + struct.unpack_from("<Q", data, at)[0]
        return data[at + 8 : end].decode("utf-8", "replace"), end
    if kind == _ARRAY:
        inner, length = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in _SCALARS:
            form = f"<{length}{_SCALARS[inner]}"
            return list(struct.unpack_from(form, data, at)), at + struct.calcsize(form)
        values = []
        for _ in range(length):
            value, at = _read_value(data, at, inner)
            values.append(value)
        return values, at
    form = f"<{_SCALARS[kind]}"
    return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
