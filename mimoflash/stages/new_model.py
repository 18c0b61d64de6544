"""The stages that make a model out of text: tokenizer, pretrain, sft."""

import os
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch

from mimoflash.checkpoint import load_model, save_model
from mimoflash.data import is_held_out_document, prepare, read_documents
from mimoflash.model import Transformer
from mimoflash.models import DEVICE
from mimoflash.recipe import Recipe, model_config
from mimoflash.run_folder import Run, Say
from mimoflash.text import render_chat, train_tokenizer
from mimoflash.train import StageSettings, train_stage


def make_tokenizer(this: Run[Recipe], say: Say) -> dict[str, Any]:
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


def pretrain(this: Run[Recipe], say: Say) -> dict[str, Any]:
    torch.manual_seed(this.recipe.seed)
    model = Transformer(model_config(this.recipe, this.tokenizer())).to(DEVICE)
    counted = model.config.count_parameters()
    say(f"  {counted['total']:,} parameters, {counted['active']:,} active, {counted['mtp']:,} in MTP layers")
    return _train(this, model, this.recipe.pretrain, "pretrain") | {"parameters": counted}


def sft(this: Run[Recipe], say: Say) -> dict[str, Any]:
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
