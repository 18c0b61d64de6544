"""What both sides run: a shape with random weights from a fixed seed, or a model; in the files that each side reads."""

import json
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from mimoflash.checkpoint import save_gguf, save_model
from mimoflash.config import WINDOW, ModelConfig
from mimoflash.model import Transformer
from mimoflash.models import find_model, open_model
from mimoflash.text import Tokenizer, load_tokenizer, render_chat
from mimoflash.text.vocabulary import read_gguf_fields

SHAPES = Path(__file__).parent / "shapes"
QUESTIONS = (  # asked of a model that talks; no training here has seen them
    "Why does bread rise when it is baked?",
    "Write a short message to a neighbour whose parcel was delivered to me.",
    "Explain to a ten year old how a rainbow is made.",
    "What should I pack for a weekend of walking in the mountains in autumn?",
    "Write a Python function that returns the longest word in a sentence.",
    "Summarise in three sentences why cities are often built beside rivers.",
    "Give me five names for a small cafe that sells books.",
    "How do I get a red wine stain out of a cotton shirt?",
)
SEED = 0
CONTEXT = 64  # positions of a random prompt where nothing else is asked for
SPARE = 8  # positions beyond the last token: drafts
GGUF_TYPES = {"float32": "float32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_1"}
_Q4_1_FILE = 3  # general.file_type


@dataclass(frozen=True)
class Subject:
    """`source`: what `open_model` takes. `prompts`: token ids that the model is asked to continue until its end token;
    None for random tokens, continued for as long as is measured."""

    name: str
    source: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    prompts: list[list[int]] | None

    def batches(self, streams: int, context: int | None, seed: int) -> list[list[list[int]]]:
        """Prompts to run, `streams` at a time."""
        if self.prompts is None:
            generator = torch.Generator().manual_seed(seed)
            shape = (streams, context or CONTEXT)
            return [torch.randint(0, self.config.vocab_size, shape, generator=generator).tolist()]
        count = -(-len(self.prompts) // streams)
        prompts = islice(cycle(self.prompts), count * streams)
        return [list(islice(prompts, streams)) for _ in range(count)]


def shape_file(shape: str) -> Path:
    """The config.json of a shape that comes along, or the file or folder of that name. ValueError if there is none."""
    file = SHAPES / f"{shape}.json"
    file = file if file.exists() else Path(shape)
    if not file.exists():
        known = ", ".join(sorted(known.stem for known in SHAPES.glob("*.json")))
        raise ValueError(f"--shape {shape}: it must be one of {known}, a config.json, or a folder with one "
                         "(and to generate from: a model's folder, a .gguf file, or smol)")
    return file


def open_subject(
    shape: str, scratch: Path, *, context: int | None, tokens: int, drafts: int = 0, prompts: Path | None = None
) -> Subject:
    """The shape (its random weights are written into `scratch`), or the model, of that name.

    A model is given its prompts (`prompts`: see `read_prompts`; QUESTIONS if None), or random ones where `context` says
    how long. Raises ValueError where it has fewer than `drafts` MTP layers or a shorter context.
    """
    subject = _model(shape, context, prompts) if _is_model(shape) else None
    if subject is None and prompts is not None:
        raise ValueError(f"--prompts need a model that can read them, but {shape} has random weights")
    config = subject.config if subject else ModelConfig.load(shape_file(shape))
    if config.num_nextn_predict_layers < drafts:
        raise ValueError(
            f"--speculate {drafts}: {shape} has {config.num_nextn_predict_layers} MTP layers: give at most so many, or "
            "another --shape"
        )
    longest = max(map(len, subject.prompts)) if subject and subject.prompts else context or CONTEXT
    longest += tokens + SPARE
    if subject is None:
        longest = max(longest, config.max_position_embeddings)
        config = replace(config, max_position_embeddings=longest, eos_token_id=None)
        torch.manual_seed(SEED)
        save_model(Transformer(config), scratch / "weights", dtype="float32")
        return Subject(shape, str(scratch / "weights"), config, None, None)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"{shape} has a context of {config.max_position_embeddings} tokens, but {longest} are asked for: give less "
            "--context or --tokens"
        )
    return subject


def _is_model(shape: str) -> bool:
    """Weights are there: not a shape that comes along, nor a bare config.json."""
    place = Path(shape)
    named = (SHAPES / f"{shape}.json").exists()
    is_folder = (place / "recipe.json").exists() or any(place.glob("*.safetensors"))
    return not named and (shape == "smol" or place.suffix == ".gguf" or is_folder)


def _model(shape: str, context: int | None, prompts: Path | None) -> Subject:
    if context is not None and prompts is not None:
        raise ValueError("--context asks for random prompts of that length, --prompts for those: give one of them")
    tokenizer = load_tokenizer(find_model(shape))
    asked = None
    if context is None:
        conversations = read_conversations(prompts) if prompts else [_question(text) for text in QUESTIONS]
        asked = [
            tokenizer.encode(render_chat(tokenizer, messages, tools, enable_thinking=True))
            for messages, tools in conversations
        ]
    return Subject(shape, shape, open_model(shape).config, tokenizer, asked)


Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]  # messages, tools


def read_conversations(file: Path) -> list[Conversation]:
    """What is asked in a .txt file (a question a line) or a .json file (a list of {"messages", "tools"}, such as the
    evaluate/conversations.json of a run: each of the assistant's turns is asked for). Raises ValueError where it holds
    none."""
    if not file.exists():
        raise ValueError(f"--prompts {file}: no such file")
    if file.suffix == ".json":
        asked = [
            (one["messages"][:i], one.get("tools"))
            for one in json.loads(file.read_text())
            for i, message in enumerate(one["messages"])
            if message["role"] == "assistant"
        ]
    else:
        asked = [_question(line) for line in file.read_text().splitlines() if line.strip()]
    if not asked:
        raise ValueError(f"--prompts {file}: there is none in it")
    return asked


def _question(text: str) -> Conversation:
    return [{"role": "user", "content": text}], None


def gguf_file(subject: Subject, dtype: str, scratch: Path) -> Path:
    """The same weights as GGUF: the model's own file where it is stored in that type, else written into `scratch`."""
    own = find_model(subject.source)
    if own.suffix == ".gguf" and dtype == "int4" and read_gguf_fields(own).get("general.file_type") == _Q4_1_FILE:
        return own
    known = subject.tokenizer
    fields = _numbered_words(subject.config.vocab_size) if known is None else known.gguf_fields()
    file = scratch / f"{dtype}.gguf"
    model = open_model(subject.source, dtype="float32")
    if WINDOW not in subject.config.layer_types:
        model.set_mtp_layers(0)  # GGUF's `llama` has none
    save_gguf(model, file, dtype=GGUF_TYPES[dtype], tokenizer=fields)
    return file


def published_folder(subject: Subject, scratch: Path) -> Path:
    """The same weights in the published format, for transformers."""
    own = find_model(subject.source)
    if own.is_dir():
        return own
    save_model(open_model(subject.source, dtype="float32"), scratch / "published", dtype="float32")
    return scratch / "published"


def _numbered_words(size: int) -> dict[str, Any]:
    """A vocabulary for weights that have none: llama.cpp's server wants text for every token."""
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(size)], "tokenizer.ggml.token_type": [1] * size,
        "tokenizer.ggml.merges": ["t 1"], "tokenizer.ggml.add_bos_token": False,
    }
