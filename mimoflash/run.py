"""A recipe and its stages in order. Each stage is done once and can be resumed."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from mimoflash.recipe import AnyRecipe, ComparisonRecipe, HeadsRecipe, PostTrainingRecipe, Recipe
from mimoflash.report import write_report
from mimoflash.run_folder import Run, Say, write_json
from mimoflash.stages import stages_of
from mimoflash.stages.coevolution import coevolve as evolve
from mimoflash.train.monitor import matmul_peak

_SERVES = {"rollouts": "teachers"}  # a part of the recipe that is no stage, and the first stage that needs it


def run(
    recipe: AnyRecipe, out: str | Path, *, only: str | None = None, resume: bool = False, ray_workers: int = 0,
    say: Say = print,
) -> Path:
    """Runs the stages (or `only` one) into the folder `out` and writes summary.json there, and report.html.

    With `resume` finished stages are kept and a broken-off one goes on where it was. `ray_workers`: see Run. Raises
    ValueError if `out` holds a run and `resume` is not given, or a run of another recipe, or if `only` needs a stage
    that has not been run.
    """
    stages = stages_of(recipe)
    if only is not None and only not in stages:
        raise ValueError(f"there is no stage {only!r}; the stages are {', '.join(stages)}")
    this = open_run(recipe, Path(out), resume or only is not None)
    this.ray_workers = ray_workers
    say(f"{recipe.name}: {matmul_peak() / 1e9:.0f} GFLOP/s in float32 matmul on {torch.get_num_threads()} threads")
    for stage in stages if only is None else (only,):
        if this.result(stage) is not None and only is None:
            say(f"{stage}: done before")
            continue
        begin = time.monotonic()
        names = list(stages)
        this.forget(stage, names[names.index(stage) + 1 :])
        result = stages[stage](this, say)
        this.finish(stage, {"seconds": time.monotonic() - begin} | result)
        write_json(this.out / "summary.json", summary(this))
        if not isinstance(recipe, HeadsRecipe | ComparisonRecipe):
            write_report(this.out)
        say(f"{stage}: {time.monotonic() - begin:.0f} s")
    return this.out


def coevolve(out: Path, rounds: int, *, say: Say = print) -> dict[str, Any]:
    """Co-evolution of the finished run in `out`: see stages/coevolution.py. Goes on with rounds that are there. Raises
    ValueError where there is no such run."""
    file = out / "recipe.json"
    if not file.exists():
        raise ValueError(f"{out} holds no run: give the folder of one that has come to its student")
    described = json.loads(file.read_text())
    if not described.get("mopd"):
        raise ValueError(f"{out}: its recipe has no [mopd], so there is no student to go on with")
    kind = PostTrainingRecipe if isinstance(described["model"], str) else Recipe
    recipe = kind.model_validate(described)
    return evolve(Run(recipe, out), rounds, say)


def open_run(recipe: AnyRecipe, out: Path, resume: bool) -> Run[Any]:
    """The run in `out`, begun if there is none."""
    described = json.loads(recipe.model_dump_json())
    file = out / "recipe.json"
    if file.exists():
        if not resume:
            raise ValueError(f"{out} holds a run: add --resume to go on with it, or give another --out")
        stored = json.loads(file.read_text())
        if stored != described:
            changed = sorted(key for key in stored | described if stored.get(key) != described.get(key))
            stages = stages_of(recipe)
            begun = [key for key in changed if (out / _SERVES.get(key, key)).exists() or key not in (*stages, *_SERVES)]
            if begun:
                raise ValueError(f"{out} holds a run of another recipe ({begun[0]} differs): give another --out")
            write_json(file, described)  # what differs are stages that have not begun
    elif out.exists() and any(path.name != "recipe.tmp" for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run: give another --out")
    else:
        write_json(file, described)
    return Run(recipe, out)


def _seconds(result: dict[str, Any]) -> float:
    """Of a resumed training stage, all of its processes together."""
    return max(result["seconds"], result.get("training", {}).get("seconds", 0.0))


def summary(this: Run[Any]) -> dict[str, Any]:
    """summary.json: what is known of the run as far as it has gone."""
    results = {stage: result for stage in stages_of(this.recipe) if (result := this.result(stage)) is not None}
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
    known = ("domains", "mopd", "accept_length", "accept_lengths", "accepted")
    return whole | {key: value for key, value in results.get("evaluate", {}).items() if key in known}
