"""The stages that make MTP layers for a model that is there: generate, first, mtp, evaluate."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mimoflash.checkpoint import HEADS, load_heads, load_model
from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.models import DEVICE, find_model, stored_dtype
from mimoflash.posttrain import read_conversations, write_conversations
from mimoflash.posttrain.heads import make_heads, measure_heads
from mimoflash.recipe import HeadsRecipe
from mimoflash.run_folder import Run, Say
from mimoflash.text import Tokenizer, load_tokenizer
from mimoflash.train import HeadsSettings


def generate(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, tokenizer = _trunk(this)
    folder = this.out / "generate"
    engine = Engine(model, tokenizer, dtype=stored_dtype(place))
    write_conversations(engine, tokenizer, this.recipe.generate, folder, this.recipe.seed, say)
    counts: dict[str, Any] = {"trunk": str(place)}
    for split in ("train", "held_out"):
        shards = read_conversations(folder, split)
        documents, tokens = sum(map(len, shards)), sum(shard.tokens.size for shard in shards)
        counts[split] = {"conversations": documents, "tokens": tokens}
        say(f"  {split}: {documents:,} conversations, {tokens:,} tokens")
    return counts


def first(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, _ = _trunk(this)
    return _make_heads(this, place, model, "first", say)


def mtp(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, _ = _trunk(this)
    load_heads(model, this.done("first") / HEADS, place)
    return _make_heads(this, place, model, "mtp", say)


def _make_heads(this: Run[HeadsRecipe], place: Path, model: Transformer, stage: str, say: Say) -> dict[str, Any]:
    settings: HeadsSettings = getattr(this.recipe, stage)
    settings = replace(settings, seed=settings.seed + this.recipe.seed)
    return make_heads(model, place, this.done("generate"), settings, this.out / stage, say)


def evaluate(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, tokenizer = _trunk(this)
    load_heads(model, this.done("mtp") / HEADS, place)
    settings, written = this.recipe.evaluate, this.done("generate")
    result = measure_heads(model, tokenizer, written, prompts=settings.prompts, max_tokens=settings.max_tokens)
    accepted = ", ".join(f"{share:.0%}" for share in result["accepted"])
    say(f"  {result['accept_length']:.2f} tokens a step; drafts that counted, by position: {accepted}")
    return result


def _trunk(this: Run[HeadsRecipe]) -> tuple[Path, Transformer, Tokenizer]:
    """Where the model stands, itself without MTP layers, and its tokenizer."""
    place = find_model(this.recipe.model)
    if place.suffix != ".gguf":
        raise ValueError(f"{place}: heads are made for a .gguf file, which they can be told to belong to")
    model = load_model(place, dtype="float32", device=DEVICE)
    model.set_mtp_layers(0)
    return place, model, load_tokenizer(place)
