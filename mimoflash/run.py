"""A recipe and its stages in order. Each stage is done once and can be resumed.

A new model: tokenizer, pretrain, sft, evaluate. MTP layers for one that is there: generate, first, mtp,
evaluate.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from mimoflash.checkpoint import load_heads, load_model, resolve, save_gguf, save_model
from mimoflash.data import Prepared, is_held_out_document, open_prepared, prepare, read_documents
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.speculation import replay_speculation
from mimoflash.kernels import native
from mimoflash.model import Transformer
from mimoflash.posttrain import Rollout, play_tasks, read_conversations, write_conversations
from mimoflash.posttrain.heads import HEADS, make_heads, measure_heads
from mimoflash.recipe import HeadsRecipe, Recipe, model_config
from mimoflash.report import write_report
from mimoflash.text import Tokenizer, load_tokenizer, render_chat, train_tokenizer
from mimoflash.train import HeadsSettings, StageSettings, train_stage
from mimoflash.train.monitor import fastest_dtype, matmul_peak
from mimoflash.world import domain, seeds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Kind = TypeVar("Kind", Recipe, HeadsRecipe)
Say = Callable[[str], None]


@dataclass
class Run(Generic[Kind]):
    """A run's folder: recipe.json, a folder for each stage with done.json, summary.json; of a new model tokenizer/ and
    data/ too."""

    recipe: Kind
    out: Path

    @property
    def stages(self) -> "dict[str, Callable[[Any, Say], dict[str, Any]]]":
        return STAGES[type(self.recipe)]

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.out / "tokenizer")

    def data(self) -> Prepared:
        """The shards that the tokenizer stage prepared, verified. Raises ValueError if they are other ones by now."""
        made = self.result("tokenizer")
        if made is None:
            raise ValueError(f"{self.out} has no finished stage tokenizer: run it first (--only tokenizer)")
        data = open_prepared(self.out / "data")
        if data.manifest["fingerprint"] != made["data"]:
            raise ValueError(f"{self.out / 'data'} is not the data that this run began with: give another --out")
        return data

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left in done.json; None if it has not finished."""
        file = self.out / stage / "done.json"
        return json.loads(file.read_text()) if file.exists() else None

    def begin(self, stage: str) -> None:
        """From now on neither this stage nor one after it counts as done."""
        names = list(self.stages)
        for later in names[names.index(stage) :]:
            (self.out / later / "done.json").unlink(missing_ok=True)

    def finish(self, stage: str, result: dict[str, Any]) -> None:
        write_json(self.out / stage / "done.json", result)
        shutil.rmtree(self.out / stage / "states", ignore_errors=True)  # only now: a kill before goes on from them


def run(
    recipe: Recipe | HeadsRecipe, out: str | Path, *, only: str | None = None, resume: bool = False, say: Say = print
) -> Path:
    """Runs the stages (or `only` one) into the folder `out` and writes summary.json there, of a new model report.html.

    With `resume` finished stages are kept and a broken-off one goes on where it was. Raises ValueError if `out` holds
    a run and `resume` is not given, or a run of another recipe, or if `only` needs a stage that has not been run.
    """
    stages = STAGES[type(recipe)]
    if only is not None and only not in stages:
        raise ValueError(f"there is no stage {only!r}; the stages are {', '.join(stages)}")
    this = open_run(recipe, Path(out), resume or only is not None)
    say(f"{recipe.name}: {matmul_peak() / 1e9:.0f} GFLOP/s in float32 matmul on {torch.get_num_threads()} threads")
    for stage in stages if only is None else (only,):
        if this.result(stage) is not None and only is None:
            say(f"{stage}: done before")
            continue
        begin = time.monotonic()
        this.begin(stage)
        result = stages[stage](this, say)
        this.finish(stage, {"seconds": time.monotonic() - begin} | result)
        write_json(this.out / "summary.json", summary(this))
        if isinstance(recipe, Recipe):
            write_report(this.out)
        say(f"{stage}: {time.monotonic() - begin:.0f} s")
    return this.out


def open_run(recipe: Recipe | HeadsRecipe, out: Path, resume: bool) -> Run[Any]:
    """The run in `out`, begun if there is none."""
    described = json.loads(recipe.model_dump_json())
    file = out / "recipe.json"
    if file.exists():
        if not resume:
            raise ValueError(f"{out} holds a run: add --resume to go on with it, or give another --out")
        stored = json.loads(file.read_text())
        if stored != described:
            changed = sorted(key for key in stored | described if stored.get(key) != described.get(key))
            begun = [key for key in changed if key not in STAGES[type(recipe)] or (out / key).exists()]
            if begun:
                raise ValueError(f"{out} holds a run of another recipe ({begun[0]} differs): give another --out")
            write_json(file, described)  # what differs are stages that have not begun
    elif out.exists() and any(path.name != "recipe.tmp" for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run: give another --out")
    else:
        write_json(file, described)
    return Run(recipe, out)


def open_engine(name: str, *, dtype: str | None = None, speculate: int | None = None) -> Engine:
    """An engine for the model that `name` means (see `find_model`), with its tokenizer. By default all its MTP layers
    draft, and weights are as they are stored: of a GGUF file with about 4 or 8 bits each, in int4 or int8; in float32
    where the machine is slow at what it is. Raises ValueError as Engine does."""
    place = find_model(name)
    on_cpu = DEVICE == "cpu" and native.available()
    slow = not on_cpu and fastest_dtype(DEVICE) == torch.float32
    model = load_model(name if name == "smol" else place, dtype="float32" if slow else None, device=DEVICE)
    if on_cpu and dtype is None and place.suffix == ".gguf":
        bits = 8 * place.stat().st_size / model.config.count_parameters()["total"]
        dtype = "int4" if bits < 7 else "int8" if bits < 12 else None
    if speculate is None:
        speculate = min(model.config.num_nextn_predict_layers, 3)
    return Engine(model, load_tokenizer(place), speculate=speculate, dtype=dtype)


def find_model(name: str) -> Path:
    """The model folder or .gguf file that `name` means: itself, that of a run's folder, a hub id's, or `smol`. Raises
    ValueError where there is none."""
    return _newest_model(Path(name)) if (Path(name) / "recipe.json").exists() else resolve(name)


def _newest_model(folder: Path) -> Path:
    """The model of a run's last finished stage."""
    for stage in ("sft", "pretrain"):
        if (folder / stage / "done.json").exists():
            return folder / stage / "model"
    raise ValueError(f"{folder}: no stage of this run has finished a model yet")


def convert(source: str, target: Path, *, format: str, dtype: str) -> None:
    """Writes the model `source` (see `find_model`) as a published folder ("hf") or for llama.cpp ("gguf")."""
    place = find_model(source)
    model, tokenizer = load_model(place), load_tokenizer(place)
    if format == "hf":
        save_model(model, target, dtype=dtype, tokenizer=tokenizer)
    else:
        save_gguf(model, target, dtype=dtype, tokenizer=tokenizer.gguf_fields())


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)


# -- stages -----------------------------------------------------------------------------------------------------------


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
    model = load_model(_done(this, "pretrain") / "model", dtype="float32", device=DEVICE)
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


def _done(this: Run[Any], stage: str) -> Path:
    """The folder of a finished stage."""
    if this.result(stage) is None:
        raise ValueError(f"{this.out} has no finished stage {stage}: run it first (--only {stage})")
    return this.out / stage


def _evaluate(this: Run[Recipe], say: Say) -> dict[str, Any]:
    settings, tokenizer = this.recipe.evaluate, this.tokenizer()
    results: dict[str, dict[str, float]] = {}
    conversations: list[dict[str, Any]] = []
    gains: list[int] = []
    for stage in ("pretrain", "sft"):
        model = load_model(_done(this, stage) / "model", dtype="float32", device=DEVICE)
        engine = Engine(model, tokenizer)
        for name, source in this.recipe.domains().items():
            tasks = domain(source.domain, **source.options)
            chosen = list(islice(seeds(tasks, "held_out"), settings.tasks))
            rollouts = play_tasks(engine, tokenizer, tasks, chosen, SamplingParams(max_tokens=settings.max_tokens))
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


def _generate(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, tokenizer = _trunk(this)
    folder = this.out / "generate"
    write_conversations(Engine(model, tokenizer), tokenizer, this.recipe.generate, folder, this.recipe.seed, say)
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
    load_heads(model, _done(this, "first") / HEADS, place)
    return _make_heads(this, place, model, "mtp", say)


def _make_heads(this: Run[HeadsRecipe], place: Path, model: Transformer, stage: str, say: Say) -> dict[str, Any]:
    settings: HeadsSettings = getattr(this.recipe, stage)
    settings = replace(settings, seed=settings.seed + this.recipe.seed)
    return make_heads(model, place, _done(this, "generate"), settings, this.out / stage, say)


def _evaluate_heads(this: Run[HeadsRecipe], say: Say) -> dict[str, Any]:
    place, model, tokenizer = _trunk(this)
    load_heads(model, _done(this, "mtp") / HEADS, place)
    settings, written = this.recipe.evaluate, _done(this, "generate")
    result = measure_heads(model, tokenizer, written, prompts=settings.prompts, max_tokens=settings.max_tokens)
    accepted = ", ".join(f"{share:.0%}" for share in result["accepted"])
    say(f"  {result['accept_length']:.2f} tokens a step; drafts that counted, by position: {accepted}")
    return result


def _trunk(this: Run[HeadsRecipe]) -> tuple[Path, Transformer, Tokenizer]:
    """Where the model stands, itself without MTP layers, and its tokenizer."""
    place = find_model(this.recipe.model)
    if place.suffix != ".gguf":
        raise ValueError(f"{place}: heads are made for a .gguf file, which they can be told to belong to")
    return place, load_model(place, dtype="float32", device=DEVICE), load_tokenizer(place)


STAGES: dict[type, dict[str, Callable[[Any, Say], dict[str, Any]]]] = {
    Recipe: {"tokenizer": _tokenizer, "pretrain": _pretrain, "sft": _sft, "evaluate": _evaluate},
    HeadsRecipe: {"generate": _generate, "first": _first, "mtp": _mtp, "evaluate": _evaluate_heads},
}


def _seconds(result: dict[str, Any]) -> float:
    """Of a resumed training stage, all of its processes together."""
    return max(result["seconds"], result.get("training", {}).get("seconds", 0.0))


def summary(this: Run[Any]) -> dict[str, Any]:
    """summary.json: what is known of the run as far as it has gone."""
    results = {stage: result for stage in this.stages if (result := this.result(stage)) is not None}
    whole: dict[str, Any] = {
        "name": this.recipe.name,
        "seconds": {stage: round(_seconds(result), 1) for stage, result in results.items()},
        "machine": {"matmul_gflops": round(matmul_peak() / 1e9, 1), "threads": torch.get_num_threads(),
                    "torch": torch.__version__},
    }
    trained = {stage: result for stage, result in results.items() if "training" in result}
    for stage, result in trained.items():
        whole["parameters"] = result["parameters"]
        whole.setdefault("tokens", {})[stage] = result["training"]["tokens"]
        whole.setdefault("held_out", {})[stage] = result["training"]["held_out"]
    known = ("domains", "accept_length", "accepted")
    return whole | {key: value for key, value in results.get("evaluate", {}).items() if key in known}
