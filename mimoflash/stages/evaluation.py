"""The stage that asks every model of a run what it can do."""

from itertools import islice
from pathlib import Path
from typing import Any

from mimoflash.checkpoint import load_model
from mimoflash.engine import Engine, SamplingParams
from mimoflash.engine.speculation import replay_speculation
from mimoflash.model import Transformer
from mimoflash.models import DEVICE
from mimoflash.posttrain import Rollout, play_tasks
from mimoflash.posttrain.groups import check_not_all_broken
from mimoflash.recipe import Recipe
from mimoflash.run_folder import Say, TrainingRun, write_json
from mimoflash.world import Domain, seeds


def evaluate(this: TrainingRun, say: Say) -> dict[str, Any]:
    """Held-out tasks of each domain: pass rates by domain and model, and what the MTP layers gain."""
    settings, domains = this.recipe.evaluate, this.recipe.domains()
    rates: dict[str, dict[str, float]] = {name: {"chance": domain.chance} for name, domain in domains.items()}
    lengths: dict[str, float] = {}
    conversations: list[dict[str, Any]] = []
    for kind, folder, names in _models(this):
        model = load_model(folder, dtype="float32", device=DEVICE)
        engine = Engine(model, this.tokenizer(), max_running=this.recipe.rollouts.max_running, share_prefixes=True)
        played = {name: play_held_out(this, engine, name, domains[name]) for name in names or domains}
        for name, rollouts in played.items():
            rates[name][kind] = sum(rollout.reward >= 1.0 for rollout in rollouts) / len(rollouts)
            chance = rates[name]["chance"]
            say(f"  {name}: {kind} {rates[name][kind]:.0%} of {len(rollouts)} held-out tasks (chance {chance:.1%})")
        if kind in ("sft", "student"):
            if model.config.num_nextn_predict_layers:
                lengths[kind] = _accept_length(model, [r for rollouts in played.values() for r in rollouts])
            conversations = [
                _shown(name, rollout)
                for name, rollouts in played.items()
                for rollout in rollouts[: settings.conversations * settings.samples : settings.samples]
            ]
    write_json(this.out / "evaluate" / "conversations.json", conversations)
    result: dict[str, Any] = {"domains": rates, "tasks": settings.tasks, "samples": settings.samples}
    if lengths:
        result |= {"accept_length": list(lengths.values())[-1], "accept_lengths": lengths}
    if this.recipe.mopd is not None:
        steps = (this.result("mopd") or {})["steps"]
        result["mopd"] = {"steps": steps, "recovered": recovered(rates)}
    return result


def recovered(rates: dict[str, dict[str, float]]) -> float | None:
    """How much of what the teachers gained over the fine-tuned model the student has gained; None if they gained
    nothing."""
    taught = [row for row in rates.values() if "teacher" in row]
    gained = sum(row["teacher"] - row["sft"] for row in taught)
    return sum(row["student"] - row["sft"] for row in taught) / gained if gained > 0 else None


def _models(this: TrainingRun) -> list[tuple[str, Path, list[str]]]:
    """(kind, folder, domains: all if empty) of what the run has made."""
    found = [("sft", this.start(), list[str]())]
    if isinstance(this.recipe, Recipe):
        found.insert(0, ("pretrain", this.done("pretrain") / "model", []))
    if this.recipe.teachers is not None:
        folder = this.done("teachers")
        found += [("teacher", folder / name / "model", [name]) for name in this.recipe.teachers]
    if this.recipe.mopd is not None:
        found.append(("student", this.done("mopd") / "model", []))
    if this.recipe.rivals is not None:
        folder = this.done("rivals")
        found += [(place.parent.name, place, []) for place in sorted(folder.glob("*/model"))]
    return found


def play_held_out(
    this: TrainingRun, engine: Engine, name: str, domain: Domain, *, behind: int = 0, tasks: int = 0
) -> list[Rollout]:
    """Held-out tasks of a domain as `evaluate` asks them, with the turns that its teacher has: the same ones, or
    `tasks` that are so many `behind` its first. Raises ValueError where its environment breaks each time."""
    asked, taught = this.recipe.evaluate, (this.recipe.teachers or {}).get(name)
    first = asked.first + behind
    chosen = islice(seeds(domain, "held_out"), first, first + (tasks or asked.tasks))
    each = [seed for seed in chosen for _ in range(asked.samples)]
    params = SamplingParams(max_tokens=asked.max_tokens, temperature=asked.temperature, seed=0)
    if taught is None:
        rollouts = play_tasks(engine, domain, each, params)
    else:
        rollouts = play_tasks(
            engine, domain, each, params, max_turns=taught.max_turns, thinking=taught.thinking, timeout=taught.timeout
        )
    check_not_all_broken(rollouts, name)
    return rollouts


def _accept_length(model: Transformer, rollouts: list[Rollout]) -> float:
    gains = [
        gain
        for rollout in rollouts
        for start, end in rollout.turns
        for gain in replay_speculation(model, rollout.tokens[:start], rollout.tokens[start:end])
    ]
    return sum(gains) / max(len(gains), 1)


def _shown(name: str, rollout: Rollout) -> dict[str, Any]:
    return {"domain": name, "messages": rollout.messages, "tools": rollout.tools, "reward": rollout.reward}
