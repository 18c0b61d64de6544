"""The stages of a comparison: each method's learning rate is chosen, then all methods run once a seed, and a table says
what can be told apart. A run inside is one of the ordinary kind, in a folder of its own."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mimoflash.recipe import ComparisonRecipe, PostTrainingRecipe, RivalSettings
from mimoflash.report import write_report
from mimoflash.report.found import LABELS
from mimoflash.run_folder import Run, Say, write_json
from mimoflash.stages.evaluation import evaluate
from mimoflash.stages.post_training import TASKS_A_ROUND, mopd, rivals, teachers

Comparison = Run[ComparisonRecipe]
Rates = dict[str, dict[str, float]]  # by domain and model
_INNER = {"teachers": teachers, "mopd": mopd, "rivals": rivals, "evaluate": evaluate}
_STUDENT = "student"  # what MOPD makes, among the models
# 97.5 % quantile of Student's t by degrees of freedom from 1 on
STUDENTS_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.96


def tune(this: Comparison, say: Say) -> dict[str, Any]:
    """Of `factors` the one that each method does best by, on one seed and with the same teachers."""
    recipe, found = this.recipe, dict[str, dict[str, float]]()
    asked = len(recipe.compare.seeds) * recipe.evaluate.tasks
    taught: Path | None = None
    for factor in recipe.tune.factors:
        say(f" learning rates x {factor:g}")
        inner = _inner_run(this, this.out / "tune" / f"x{factor:g}", recipe.tune.seed, len(recipe.compare.seeds),
                           dict.fromkeys(_settings(recipe), factor), first=asked, tasks=recipe.tune.tasks)
        if taught is not None:
            _copy(taught, inner.out / "teachers")
        rates = _go_through(inner, say)
        taught = inner.out / "teachers"
        for kind in _settings(recipe):
            found.setdefault(kind, {})[f"{factor:g}"] = _mean_rate(rates, kind)
    chosen = {kind: float(max(tried, key=lambda factor: tried[factor])) for kind, tried in found.items()}
    say(" chosen: " + ", ".join(f"{_label(kind)} x {factor:g}" for kind, factor in chosen.items()))
    return {"pass_rates": found, "factors": chosen}


def compare(this: Comparison, say: Say) -> dict[str, Any]:
    """The pass rates of all seeds; the table of them is in table.md."""
    tuned = this.result("tune")
    if tuned is None:
        raise ValueError(f"{this.out} has no finished stage tune: run it first (--only tune)")
    recipe = this.recipe
    every: dict[str, Rates] = {}
    spent: list[dict[str, int]] = []
    for number, seed in enumerate(recipe.compare.seeds):
        say(f" seed {seed}")
        inner = _inner_run(this, this.out / "compare" / f"seed-{seed}", seed, number, tuned["factors"],
                           first=number * recipe.evaluate.tasks, tasks=recipe.evaluate.tasks)
        every[str(seed)] = _go_through(inner, say)
        spent.append(_tokens(inner))
    tokens = {name: round(mean(each[name] for each in spent)) for name in spent[0]}
    result = {"domains": every, "tokens": tokens}
    table = _table(list(every.values()), tokens)
    (this.out / "table.md").write_text(_words(this, tuned, table))
    say("\n" + table)
    return result


def _settings(recipe: ComparisonRecipe) -> dict[str, Any]:
    """Of the methods that learn, by the model that comes of it."""
    return {_STUDENT: recipe.mopd} | {
        name: settings for name, settings in recipe.rivals if not isinstance(settings, bool) and settings is not None
    }


def _inner_run(
    this: Comparison, out: Path, seed: int, number: int, factors: Mapping[str, float], *, first: int, tasks: int
) -> Run[PostTrainingRecipe]:
    """All methods with one seed, at its learning rates; the training tasks are those of the `number`-th run of all."""
    recipe, after = this.recipe, number * TASKS_A_ROUND
    methods = {
        kind: replace(
            settings, lr=settings.lr * factors[kind], tokens=recipe.compare.tokens,
            first_task=settings.first_task + after,
        )
        for kind, settings in _settings(recipe).items()
    }
    taught = {name: replace(each, first_task=each.first_task + after) for name, each in recipe.teachers.items()}
    inner = PostTrainingRecipe(
        name=f"{recipe.name}, {out.name}", seed=seed, model=recipe.model, tasks=recipe.tasks, rollouts=recipe.rollouts,
        teachers=taught, mopd=methods.pop(_STUDENT),
        rivals=RivalSettings(**methods, param_merge=recipe.rivals.param_merge),
        evaluate=recipe.evaluate.model_copy(update={"first": first, "tasks": tasks}),
    )
    return Run(inner, out, this.ray_workers)


def _go_through(inner: Run[PostTrainingRecipe], say: Say) -> Rates:
    write_json(inner.out / "recipe.json", inner.recipe.model_dump(mode="json"))
    for name, stage in _INNER.items():
        if inner.result(name) is None:
            inner.finish(name, stage(inner, say))
    write_report(inner.out)
    result = inner.result("evaluate")
    assert result is not None
    return result["domains"]


def _copy(source: Path, target: Path) -> None:
    """A folder, whole or not at all; one that is there stays."""
    if not target.exists():
        part = target.with_suffix(".tmp")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        os.replace(part, target)


def _tokens(inner: Run[PostTrainingRecipe]) -> dict[str, int]:
    """Sampled, by model; the teachers' together."""
    taught, distilled, others = (inner.result(stage) or {} for stage in ("teachers", "mopd", "rivals"))
    found = {"teacher": sum(each["tokens"] for each in taught["teachers"].values()), _STUDENT: distilled["tokens"]}
    return found | {name: each["tokens"] for name, each in others["rivals"].items()}


def _mean_rate(rates: Rates, kind: str) -> float:
    return mean(row[kind] for row in rates.values())


def _table(seeds: list[Rates], tokens: Mapping[str, int]) -> str:
    """In Markdown: the models in the order of their mean, each pass rate with its standard deviation over the seeds,
    and the difference to MOPD, seed by seed, with its 95 % interval."""
    kinds = [kind for kind in next(iter(seeds[0].values())) if kind != "chance"]
    means = {kind: [_mean_rate(rates, kind) for rates in seeds] for kind in kinds}
    rows = [["", *seeds[0], "mean", "against MOPD", "tokens sampled"]]
    for kind in sorted(kinds, key=lambda kind: -mean(means[kind])):
        difference = [own - mopd for own, mopd in zip(means[kind], means[_STUDENT], strict=True)]
        rows.append([
            _label(kind), *(_spread([rates[domain][kind] for rates in seeds]) for domain in seeds[0]),
            _spread(means[kind]), "" if kind == _STUDENT else interval(difference),
            f"{tokens[kind]:,}" if kind in tokens else "",
        ])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _label(kind: str) -> str:
    return {_STUDENT: "MOPD", "teacher": "teachers, each in its domain"}.get(kind) or LABELS.get(kind, kind)


def _spread(shares: Iterable[float]) -> str:
    values = [100 * share for share in shares]
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def interval(differences: Iterable[float]) -> str:
    """In points; seeds are what varies, so that with few of them it is wide."""
    values = [100 * difference for difference in differences]
    t = STUDENTS_T[len(values) - 2] if len(values) - 2 < len(STUDENTS_T) else _NORMAL
    half = t * stdev(values) / sqrt(len(values))
    return f"{mean(values):+.1f} ({mean(values) - half:+.1f} to {mean(values) + half:+.1f})"


def _words(this: Comparison, tuned: Mapping[str, Any], table: str) -> str:
    """What the table says, and how it came about."""
    recipe = this.recipe
    rows = []
    for kind, settings in _settings(recipe).items():
        tried = [f"{settings.lr * float(factor):g}: {rate:.1%}" for factor, rate in tuned["pass_rates"][kind].items()]
        rows.append(f"| {_label(kind)} | {settings.lr * tuned['factors'][kind]:g} | {', '.join(tried)} |")
    return f"""# {recipe.name}

Pass rates in %, mean ± standard deviation over the seeds {", ".join(map(str, recipe.compare.seeds))}, each judged by
{recipe.evaluate.tasks} held-out tasks a domain of its own (temperature {recipe.evaluate.temperature:g}).
Against MOPD: the difference of the means, seed by seed, with its 95 % interval by Student's t.
A method may sample {recipe.compare.tokens:,} tokens; its last step may go over. Those that need teachers have the same
ones, whose tokens are counted apart.

{table}
The learning rates, chosen with seed {recipe.tune.seed} by {recipe.tune.tasks} other tasks a domain:

| method | lr | tried: mean pass rate |
| --- | --- | --- |
""" + "\n".join(rows) + "\n"
