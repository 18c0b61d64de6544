"""The stages that improve a fine-tuned model: teachers by reinforcement learning, their student by MOPD, and what the
student is compared with."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mimoflash.checkpoint import load_model, save_model
from mimoflash.engine import Engine
from mimoflash.models import DEVICE
from mimoflash.posttrain import RolloutSettings, Shelf, StoredTeacher, train_grpo, train_mopd
from mimoflash.posttrain.rivals import cascade_rl, merge_parameters, off_policy_finetune
from mimoflash.recipe import Recipe
from mimoflash.run_folder import Run, Say, write_json
from mimoflash.train.monitor import read_metrics
from mimoflash.world import Domain

Settings = TypeVar("Settings", bound=RolloutSettings)


def teachers(this: Run[Recipe], say: Say) -> dict[str, Any]:
    assert this.recipe.teachers is not None
    return {
        "teachers": {
            name: _trained(this, this.out / "teachers" / name, settings, _grpo(this, [name]), say)
            for name, settings in this.recipe.teachers.items()
        }
    }


def mopd(this: Run[Recipe], say: Say) -> dict[str, Any]:
    settings = this.recipe.mopd
    assert settings is not None
    shelf, folder = Shelf(device=DEVICE), this.done("teachers")
    domains = _domains(this)
    known = {name: StoredTeacher(folder / name / "model", shelf) for name in domains}

    def distil(engine: Engine, settings: Any, place: Path) -> None:
        train_mopd(engine, domains, known, settings, folder=place)

    return _trained(this, this.out / "mopd", settings, distil, say)


def rivals(this: Run[Recipe], say: Say) -> dict[str, Any]:
    """Each of those that the recipe names, from the same fine-tuned model."""
    asked = this.recipe.rivals
    assert asked is not None
    domains, taught, folder = _domains(this), this.done("teachers"), this.out / "rivals"

    def cascade(engine: Engine, settings: Any, place: Path) -> None:
        cascade_rl(engine, domains, settings, folder=place)

    def off_policy(engine: Engine, settings: Any, place: Path) -> None:
        engines = {name: _engine(this, taught / name / "model") for name in domains}
        off_policy_finetune(engine, domains, engines, settings, folder=place)

    def naive(engine: Engine, settings: Any, place: Path) -> None:
        known = {name: StoredTeacher(taught / name / "model", Shelf(device=DEVICE)) for name in domains}
        train_mopd(engine, domains, known, settings, folder=place)

    how = {"mix_rl": _grpo(this, list(domains)), "cascade_rl": cascade, "off_policy": off_policy, "naive_mopd": naive}
    found = {
        name: _trained(this, folder / name, settings, how[name], say)
        for name in how
        if (settings := getattr(asked, name)) is not None
    }
    if asked.param_merge:
        engine = _engine(this, this.done("sft") / "model")
        merge_parameters(
            engine, [load_model(taught / name / "model", dtype="float32", device=DEVICE) for name in domains]
        )
        save_model(engine.model, folder / "param_merge" / "model", dtype="float32", tokenizer=this.tokenizer())
    return {"rivals": found}


def _domains(this: Run[Recipe]) -> dict[str, Domain]:
    """Those that have a teacher."""
    return {name: domain for name, domain in this.recipe.domains().items() if name in (this.recipe.teachers or {})}


def _grpo(this: Run[Recipe], names: list[str]) -> Callable[[Engine, Any, Path], None]:
    domains = {name: this.recipe.domains()[name] for name in names}

    def train(engine: Engine, settings: Any, place: Path) -> None:
        train_grpo(engine, domains, settings, folder=place)

    return train


def _trained(
    this: Run[Recipe], folder: Path, settings: Settings, train: Callable[[Engine, Settings, Path], None], say: Say
) -> dict[str, Any]:
    """The fine-tuned model trained on, kept in `folder`; how it went."""
    if (known := this.result(str(folder.relative_to(this.out)))) is not None:
        return known
    torch.manual_seed(this.recipe.seed)
    engine = _engine(this, this.done("sft") / "model")
    train(engine, replace(settings, seed=settings.seed + this.recipe.seed), folder)
    save_model(engine.model, folder / "model", dtype="float32", tokenizer=this.tokenizer())
    lasts = [list(read_metrics(file))[-1] for file in folder.rglob("metrics.jsonl")]  # several of a cascade
    result = {"steps": sum(int(last["step"]) for last in lasts), "tokens": sum(int(last["tokens"]) for last in lasts)}
    say(f"  {folder.name}: {result['steps']} steps, {result['tokens']:,} tokens sampled")
    if folder.parent != this.out:  # else it is a stage, which the run finishes
        write_json(folder / "done.json", result)
        shutil.rmtree(folder / "states", ignore_errors=True)
    return result


def _engine(this: Run[Recipe], folder: Path) -> Engine:
    asked = this.recipe.rollouts
    model = load_model(folder, dtype="float32", device=DEVICE)
    return Engine(model, this.tokenizer(), dtype=asked.dtype, max_running=asked.max_running, share_prefixes=True)
