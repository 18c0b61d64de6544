"""Plots and the table of post-training: the teachers, their student, and what it is compared with."""

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mimoflash.report.drawing import BLUE, GREEN, MODELS, MUTED, ORANGE, PURPLE, RED, WIDTH, Plot, curve
from mimoflash.report.found import LABELS, Found, Lines

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, MUTED)
STUDENTS = {"mopd": PURPLE, "mix_rl": RED, "cascade_rl": ORANGE, "off_policy": BLUE, "naive_mopd": GREEN}
REWARD, KL = "dynsam/avg@n", "train_infer_diff/kl"


def table(found: Found) -> list[list[str]]:
    """Pass rates, a row a domain and the mean of all; the first row names the models. Empty before there is a student.
    """
    rates: dict[str, dict[str, Any]] = found.evaluated("domains") or {}
    kinds = [kind for kind in (*MODELS, *LABELS) if any(row.get(kind) is not None for row in rates.values())]
    kinds = list(dict.fromkeys(kinds))
    if "student" not in kinds:
        return []
    rows = [["", *(LABELS.get(kind, kind) for kind in kinds)]]
    rows += [[name, *(_percent(row.get(kind)) for kind in kinds)] for name, row in rates.items()]
    means = [[row[kind] for row in rates.values() if row.get(kind) is not None] for kind in kinds]
    return [*rows, ["mean", *(_percent(sum(values) / len(values)) for values in means)]]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def plots(found: Found) -> Iterator[Plot]:
    if found.teachers:
        figure, axes = _axes("step", "mean reward")
        for colour, (name, lines) in zip(COLOURS, found.teachers.items(), strict=False):
            _over_steps(axes, lines, REWARD, colour, name)
        note = "Each domain's teacher by GRPO: mean reward of its rollouts, on tasks that it has not seen before."
        yield from _finished("Teachers", note, figure, axes)
    if found.students:
        figure, axes = _axes("step", "mean reward")
        for name, lines in found.students.items():
            _over_steps(axes, lines, REWARD, STUDENTS.get(name, MUTED), (LABELS | {"mopd": "MOPD"}).get(name, name))
        note = "One model in all domains, from the same start: mean reward of the rollouts that it learns from."
        yield from _finished("MOPD beside its rivals", note, figure, axes)
    if "mopd" in found.students:
        lines = found.students["mopd"]
        yield from _domains(lines)
        figure, axes = _axes("step", "nats a token")
        _over_steps(axes, lines, "mopd/reverse_kl", PURPLE, "student to its teachers")
        yield from _finished("Reverse KL", "How far the student is from the teacher of each task.", figure, axes)
        figure, axes = _axes("step", "nats a token")
        if all(line[KL] > 0 for line in lines if KL in line):
            axes.set_yscale("log")
        _over_steps(axes, lines, KL, PURPLE, "routes replayed")
        _over_steps(axes, lines, f"{KL}/without_replay", RED, "routed anew")
        note = "KL between what the rollout engine sampled from and what the trainer computes of it."
        yield from _finished("Rollout against trainer", note, figure, axes)


def _domains(lines: Lines) -> Iterator[Plot]:
    figure, axes = _axes("step", "mean reward")
    names = [key.removesuffix(f"/{REWARD}") for key in lines[0] if key.endswith(f"/{REWARD}")]
    for colour, name in zip(COLOURS, names, strict=False):
        _over_steps(axes, lines, f"{name}/{REWARD}", colour, name)
    yield from _finished("The student by domain", "Mean reward of its rollouts under MOPD.", figure, axes)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _over_steps(axes: Axes, lines: Lines, key: str, colour: str, label: str) -> None:
    curve(axes, [line | {"tokens": line["step"]} for line in lines], key, colour, label, part=8)


def _finished(title: str, note: str, figure: Figure, axes: Axes) -> Iterator[Plot]:
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=4)
        yield Plot(title, note, figure)
