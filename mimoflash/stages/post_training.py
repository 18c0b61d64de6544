"""The stages that improve a fine-tuned model: teachers by reinforcement learning, their student by MOPD, and what the
student is compared with."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mimoflash.checkpoint import load_model, save_model
from mimoflash.engine import Engine
from mimoflash.models import DEVICE
from mimoflash.posttrain import RolloutSettings, Shelf, StoredTeacher, train_grpo, train_mopd
from mimoflash.posttrain.rivals import cascade_rl, merge_parameters, off_policy_finetune
from mimoflash.posttrain.rollout import tokenizer_of
from mimoflash.posttrain.scheduler import Player
from mimoflash.run_folder import Say, TrainingRun, write_json
from mimoflash.train.monitor import read_metrics
from mimoflash.world import Domain

Settings = TypeVar("Settings", bound=RolloutSettings)
TASKS_A_ROUND = 10_000_000  # of co-evolution: seeds that no other round takes its tasks from


def teachers(this: TrainingRun, say: Say) -> dict[str, Any]:
    assert this.recipe.teachers is not None
    start = this.start()
    found = {name: taught(this, this.out / "teachers" / name, name, start, say) for name in this.recipe.teachers}
    return {"teachers": found}


def mopd(this: TrainingRun, say: Say) -> dict[str, Any]:
    return distilled(this, this.out / "mopd", this.done("teachers"), this.start(), say)


def taught(this: TrainingRun, folder: Path, name: str, start: Path, say: Say, round: int = 0) -> dict[str, Any]:
    """The teacher of the domain `name`, made of the model in `start`; each `round` by other tasks."""
    assert this.recipe.teachers is not None
    settings = _of_round(this.recipe.teachers[name], round)
    return _trained(this, folder, start, settings, _grpo(this, [name]), say)


def distilled(
    this: TrainingRun, folder: Path, teachers: Path, start: Path, say: Say, round: int = 0
) -> dict[str, Any]:
    """The student, made of the model in `start` by those in the folders of `teachers`; each `round` by other tasks."""
    assert this.recipe.mopd is not None
    return _trained(this, folder, start, _of_round(this.recipe.mopd, round), _mopd(this, teachers), say)


def _of_round(settings: Settings, round: int) -> Settings:
    return replace(settings, first_task=settings.first_task + round * TASKS_A_ROUND)


def rivals(this: TrainingRun, say: Say) -> dict[str, Any]:
    """Each of those that the recipe names, from the same fine-tuned model."""
    asked = this.recipe.rivals
    assert asked is not None
    domains, start, folder = _domains(this), this.start(), this.out / "rivals"
    places = {name: this.done("teachers") / name / "model" for name in domains}

    def cascade(engine: Engine, settings: Any, place: Path) -> None:
        with _player(this, engine, domains) as player:
            cascade_rl(engine, domains, settings, folder=place, player=player)

    def off_policy(engine: Engine, settings: Any, place: Path) -> None:
        engines = {name: engine_of(this, model) for name, model in places.items()}
        off_policy_finetune(engine, domains, engines, settings, folder=place)

    how = {
        "mix_rl": _grpo(this, list(domains)), "cascade_rl": cascade, "off_policy": off_policy,
        "naive_mopd": _mopd(this, this.done("teachers")),
    }
    found = {
        name: _trained(this, folder / name, start, settings, how[name], say)
        for name in how
        if (settings := getattr(asked, name)) is not None
    }
    if asked.param_merge:
        engine = engine_of(this, start)
        merge_parameters(engine, [load_model(model, dtype="float32", device=DEVICE) for model in places.values()])
        save_model(engine.model, folder / "param_merge" / "model", dtype="float32", tokenizer=this.tokenizer())
    return {"rivals": found}


def _domains(this: TrainingRun) -> dict[str, Domain]:
    """Those that have a teacher."""
    return {name: domain for name, domain in this.recipe.domains().items() if name in (this.recipe.teachers or {})}


def _grpo(this: TrainingRun, names: list[str]) -> Callable[[Engine, Any, Path], None]:
    domains = {name: this.recipe.domains()[name] for name in names}

    def train(engine: Engine, settings: Any, place: Path) -> None:
        with _player(this, engine, domains) as player:
            train_grpo(engine, domains, settings, folder=place, player=player)

    return train


def _mopd(this: TrainingRun, teachers: Path) -> Callable[[Engine, Any, Path], None]:
    domains, shelf = _domains(this), Shelf(device=DEVICE)

    def train(engine: Engine, settings: Any, place: Path) -> None:
        known = {name: StoredTeacher(teachers / name / "model", shelf) for name in domains}
        with _player(this, engine, domains) as player:
            train_mopd(engine, domains, known, settings, folder=place, player=player)

    return train


@contextmanager
def _player(this: TrainingRun, engine: Engine, domains: dict[str, Domain]) -> Iterator[Player | None]:
    """None: the engine itself."""
    if not this.ray_workers:
        yield None
        return
    from mimoflash.posttrain.ray_players import RayPlayers

    settings = _engine_settings(this)
    with RayPlayers(settings, engine.model, tokenizer_of(engine), domains, this.ray_workers) as players:
        yield players


def _trained(
    this: TrainingRun, folder: Path, start: Path, settings: Settings, train: Callable[[Engine, Settings, Path], None],
    say: Say,
) -> dict[str, Any]:
    """The model in `start` trained on, kept in `folder`; how it went."""
    if (known := this.result(str(folder.relative_to(this.out)))) is not None:
        return known
    torch.manual_seed(this.recipe.seed)
    engine = engine_of(this, start)
    train(engine, replace(settings, seed=settings.seed + this.recipe.seed), folder)
    save_model(engine.model, folder / "model", dtype="float32", tokenizer=this.tokenizer())
    lasts = [list(read_metrics(file))[-1] for file in folder.rglob("metrics.jsonl")]  # several of a cascade
    result = {"steps": sum(int(last["step"]) for last in lasts), "tokens": sum(int(last["tokens"]) for last in lasts)}
    say(f"  {folder.name}: {result['steps']} steps, {result['tokens']:,} tokens sampled")
    if folder.parent != this.out:  # else it is a stage, which the run finishes
        write_json(folder / "done.json", result)
        for states in list(folder.rglob("states")):
            shutil.rmtree(states)
    return result


def engine_of(this: TrainingRun, folder: Path) -> Engine:
    """Plays rollouts with the model in `folder`, and is trained with it."""
    return Engine(load_model(folder, dtype="float32", device=DEVICE), this.tokenizer(), **_engine_settings(this))


def _engine_settings(this: TrainingRun) -> dict[str, Any]:
    asked = this.recipe.rollouts
    return {"dtype": asked.dtype, "max_running": asked.max_running, "share_prefixes": True}
