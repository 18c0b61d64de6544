"""The stages of both kinds of recipes: each takes a run, does its part in the run's folder, and tells what came of it.

A new model: tokenizer, pretrain, sft, evaluate. MTP layers for one that is there: generate, first, mtp,
evaluate.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mimoflash.checkpoint import HEADS, load_heads, load_model, save_model
from mimoflash.data import is_held_out_document, prepare, read_documents
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.speculation import replay_speculation
from mimoflash.model import Transformer
from mimoflash.models import DEVICE, find_model, stored_dtype
from mimoflash.posttrain import Rollout, play_tasks, read_conversations, write_conversations
from mimoflash.posttrain.heads import make_heads, measure_heads
from mimoflash.recipe import HeadsRecipe, Recipe, model_config
from mimoflash.run_folder import Run, write_json
from mimoflash.text import Tokenizer, load_tokenizer, render_chat, train_tokenizer
from mimoflash.train import HeadsSettings, StageSettings, train_stage
from mimoflash.world import domain, seeds

Say = Callable[[str], None]

# -- a new model -------------------------------------------------------------------------------------------------------


def _tokenizer(this: Run[Recipe], say: Say) -> dict[str, Any]:
    settings = this.recipe.tokenizer
    texts = (
        document.text or render_chat(None, document.messages or [], document.tools, generation_prompt=False)
        for source in this.recipe.sources.values()
        for document in islice(read_documents(source), settings.documents)
        if not is_held_out_document(document, source, this.recipe.held_out)
    )
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    tokenizer.save(this.out / "tokenizer")
    workers = max(1, (os.cpu_count() or 1) // 4)  # each imports torch: on a few cores one is faster
    sources = list(this.recipe.sources.values())
    data = prepare(sources, tokenizer, this.out / "data", held_out=this.recipe.held_out, workers=workers)
    for name, counts in data.manifest["sources"].items():
        say(f"  {name}: {len(data.train[name])} documents, {data.train[name].tokens.size:,} tokens {counts}")
    return {
        "vocabulary": tokenizer.vocab_size, "data": data.manifest["fingerprint"], "sources": data.manifest["sources"]
    }


def _pretrain(this: Run[Recipe], say: Say) -> dict[str, Any]:
    torch.manual_seed(this.recipe.seed)
    model = Transformer(model_config(this.recipe, this.tokenizer())).to(DEVICE)
    counted = model.config.count_parameters()
    say(f"  {counted['total']:,} parameters, {counted['active']:,} active, {counted['mtp']:,} in MTP layers")
    return _train(this, model, this.recipe.pretrain, "pretrain") | {"parameters": counted}


def _sft(this: Run[Recipe], say: Say) -> dict[str, Any]:
    model = load_model(this.done("pretrain") / "model", dtype="float32", device=DEVICE)
    torch.manual_seed(this.recipe.seed)
    model.set_mtp_layers(this.recipe.sft.mtp_layers)
    return _train(this, model, this.recipe.sft, "sft") | {"parameters": model.config.count_parameters()}


def _train(this: Run[Recipe], model: Transformer, settings: StageSettings, stage: str) -> dict[str, Any]:
    folder = this.out / stage
    settings = replace(settings, seed=settings.seed + this.recipe.seed)
    result = train_stage(model, this.data(), settings, folder, stage)
    save_model(model, folder / "model", dtype="float32", tokenizer=this.tokenizer())
    training = asdict(result)
    return {"expert_load": training.pop("expert_load"), "training": training}


def _evaluate(this: Run[Recipe], say: Say) -> dict[str, Any]:
    settings, tokenizer = this.recipe.evaluate, this.tokenizer()
    results: dict[str, dict[str, float]] = {}
    conversations: list[dict[str, Any]] = []
    gains: list[int] = []
    for stage in ("pretrain", "sft"):
        model = load_model(this.done(stage) / "model", dtype="float32", device=DEVICE)
        engine = Engine(model, tokenizer)
        for name, source in this.recipe.domains().items():
            tasks = domain(source.domain, **source.options)
            chosen = list(islice(seeds(tasks, "held_out"), settings.tasks))
            rollouts = play_tasks(engine, tasks, chosen, SamplingParams(max_tokens=settings.max_tokens))
            rate = sum(r.reward >= 1.0 for r in rollouts) / len(rollouts)
            results.setdefault(name, {"chance": tasks.chance})[stage] = rate
            say(f"  {name}: {stage} {rate:.0%} of {len(rollouts)} held-out tasks (chance {tasks.chance:.1%})")
            if stage == "sft":
                conversations += [_shown(name, r) for r in rollouts[: settings.conversations]]
                gains += [
                    gain
                    for rollout in rollouts
                    for start, end in rollout.turns
                    for gain in replay_speculation(model, rollout.tokens[:start], rollout.tokens[start:end])
                ]
    write_json(this.out / "evaluate" / "conversations.json", conversations)
    drafted = {"accept_length": sum(gains) / len(gains)} if gains else {}
    return {"domains": results, "tasks": settings.tasks} | drafted


def _shown(name: str, rollout: Rollout) -> dict[str, Any]:
    return {"domain": name, "messages": rollout.messages, "tools": rollout.tools, "reward": rollout.reward}


# -- MTP layers for a model that is there ------------------------------------------------------------------------------


def _generate(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
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


def _first(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, _ = _trunk(this)
    return _make_heads(this, place, model, "first", say)


def _mtp(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, _ = _trunk(this)
    load_heads(model, this.done("first") / HEADS, place)
    return _make_heads(this, place, model, "mtp", say)


def _make_heads(this: Run[HeadsRecipe], place: Path, model: Transformer, stage: str, say: Say) -> dict[str, Any]:
    settings: HeadsSettings = getattr(this.recipe, stage)
    settings = replace(settings, seed=settings.seed + this.recipe.seed)
    return make_heads(model, place, this.done("generate"), settings, this.out / stage, say)


def _evaluate_heads(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
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


STAGES: dict[type, dict[str, Callable[[Any, Say], dict[str, Any]]]] = {
    Recipe: {"tokenizer": _tokenizer, "pretrain": _pretrain, "sft": _sft, "evaluate": _evaluate},
    HeadsRecipe: {"generate": _generate, "first": _first, "mtp": _mtp, "evaluate": _evaluate_heads},
}
