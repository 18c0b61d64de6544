"""A run's folder as one page, report.html: what was made, how it went, what it can do. The page needs no network.

Plots are SVG inside the page. Their colours are the page's CSS variables, so that they follow its light or dark theme;
matplotlib draws with stand-ins for them.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mimoflash.train.monitor import read_metrics

STAGES = {"pretrain": "pre-trained", "sft": "fine-tuned"}  # those that train on text, in order, and what comes of them
NAMES = ("ink", "muted", "line", "blue", "orange", "green", "purple", "red")
VARIABLES = {f"#0000{n:02}": f"var(--{name})" for n, name in enumerate(NAMES, 1)}  # a stand-in, and what it becomes
INK, MUTED, LINE, BLUE, ORANGE, GREEN, PURPLE, RED = VARIABLES
MODELS = {"chance": MUTED, "pretrain": BLUE, "sft": ORANGE, "teacher": GREEN, "student": PURPLE}
MTP_LAYERS = {"MTP layer 1": GREEN, "MTP layer 2": PURPLE, "MTP layer 3": RED}
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "mimoflash", "text.parse_math": False,
    "font.size": 9.5, "legend.fontsize": 8.5, "legend.frameon": False, "legend.handlelength": 1,
    "legend.handletextpad": 0.5, "legend.columnspacing": 1, "legend.borderpad": 0,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "ytick.labelcolor": INK,
    "axes.edgecolor": LINE, "grid.color": LINE, "grid.linewidth": 0.6, "axes.grid.axis": "y", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "figure.facecolor": "none", "axes.facecolor": "none",
}
WIDTH = 4.4  # inches: a phone's width, or half of a desktop page, at the same size of type


@dataclass
class Found:
    """What a run's folder holds; empty where a stage has not come so far."""

    recipe: dict[str, Any]
    summary: dict[str, Any]
    done: dict[str, dict[str, Any]]  # by stage
    metrics: dict[str, list[dict[str, float]]]  # by training stage
    conversations: list[dict[str, Any]]


@dataclass
class Plot:
    title: str
    note: str
    figure: Figure


def write_report(out: Path) -> Path:
    """Writes report.html into the run's folder `out`, from what is there, whole or not at all."""
    found = find(out)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # a message may lack any of its keys
    )
    environment.filters |= {"svg": inline_svg, "text": as_text}
    with matplotlib.rc_context(LOOK):
        page = environment.get_template("report.html.jinja").render(
            name=found.recipe.get("name") or out.resolve().name,
            unfinished=[(stage, lines[-1]) for stage, lines in found.metrics.items() if stage not in found.done],
            figures=list(key_figures(found)),
            sections={
                "What it can do": [*skills(found), *knowledge(found)],
                "Training": list(losses(found)),
                "Drafting ahead": list(drafts(found)),
                "Health": [*experts(found), *gradients(found)],
            },
            conversations=found.conversations,
            recipe=json.dumps(found.recipe, indent=2, ensure_ascii=False) if found.recipe else "",
        )
    file, temporary = out / "report.html", out / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8", errors="replace")  # a model can write half a surrogate pair
    os.replace(temporary, file)
    return file


def find(out: Path) -> Found:
    """Reads the run's folder. A file that is missing or broken counts as not there."""

    def read(path: str, nothing: Any) -> Any:
        try:
            value = json.loads((out / path).read_text())
        except (OSError, ValueError):
            return nothing
        return value if isinstance(value, type(nothing)) else nothing

    done = {stage: read(f"{stage}/done.json", {}) for stage in (*STAGES, "evaluate")}
    metrics = {stage: list(read_metrics(out / stage / "metrics.jsonl")) for stage in STAGES}
    return Found(
        read("recipe.json", {}),
        read("summary.json", {}),
        {stage: result for stage, result in done.items() if result},
        {stage: lines for stage, lines in metrics.items() if lines},
        read("evaluate/conversations.json", []),
    )


# -- numbers ----------------------------------------------------------------------------------------------------------


def key_figures(found: Found) -> Iterator[tuple[str, str, str]]:
    """(value, what it is, a remark) of what is known."""
    if counted := found.summary.get("parameters"):
        mtp = f", {short(counted['mtp'])} more in MTP layers" if counted.get("mtp") else ""
        yield short(counted["total"]), "parameters", f"{short(counted['active'])} active for a token{mtp}"
    if tokens := {stage: lines[-1]["tokens"] for stage, lines in found.metrics.items()}:
        yield short(sum(tokens.values())), "tokens seen", ", ".join(f"{s} {short(n)}" for s, n in tokens.items())
    if seconds := found.summary.get("seconds"):
        yield duration(sum(seconds.values())), "in all", ", ".join(f"{s} {duration(n)}" for s, n in seconds.items())
    if rates := _column(found, "tokens_per_second"):
        yield short(median(rates)), "tokens a second in training", "median over the steps"
    if shares := _column(found, "mfu"):
        yield f"{median(shares):.0%}", "of the machine's peak used", "MFU in the dtype it trains in, median"
    if machine := found.summary.get("machine"):
        remark = f"float32 matmul, {machine.get('threads')} threads, torch {machine.get('torch')}"
        yield f"{machine['matmul_gflops']:,.0f}", "GFLOP/s, this machine", remark
    if length := _evaluated(found, "accept_length"):
        yield f"{length:.2f}", "tokens a step when drafting", "accept length of the MTP layers, on its own answers"


def short(number: float) -> str:
    """4321 as 4.3k: two digits, or three before the point."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            value = number / size
            return f"{value:.0f}{unit}" if abs(value) >= 10 else f"{value:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _column(found: Found, key: str) -> list[float]:
    return [line[key] for lines in found.metrics.values() for line in lines if isfinite(line.get(key, float("nan")))]


def _evaluated(found: Found, key: str) -> Any:
    return found.summary.get(key) or found.done.get("evaluate", {}).get(key)


# -- sections ---------------------------------------------------------------------------------------------------------


def skills(found: Found) -> Iterator[Plot]:
    if domains := _evaluated(found, "domains"):
        note = "Share of held-out tasks solved, each checked by its domain's verifier. Chance is a guesser's share."
        yield Plot("Tasks solved", note, bars(domains, MODELS, "{:.0%}".format, limit=1.0))


def knowledge(found: Found) -> Iterator[Plot]:
    rows: dict[str, dict[str, float]] = {}
    for stage in found.metrics:
        for source, measured in held_out(found, stage).items():
            rows.setdefault(source, {})[stage] = measured["loss"]
    if rows:
        note = "Nats a token on documents that training never saw; in conversations, on the assistant's tokens only."
        yield Plot("Held-out loss by source", note, bars(rows, MODELS, "{:.2f}".format))


def held_out(found: Found, stage: str) -> dict[str, dict[str, float]]:
    """By source: loss and MTP agreement at the end of the stage, or the last losses logged if it did not get there."""
    if finished := found.done.get(stage, {}).get("training", {}).get("held_out"):
        return finished
    logged = {key: value for line in found.metrics[stage] for key, value in line.items()}
    return {key.removeprefix("held_out/"): {"loss": v} for key, v in logged.items() if key.startswith("held_out/")}


def losses(found: Found) -> Iterator[Plot]:
    for stage, lines in found.metrics.items():
        figure = Figure((WIDTH, 3.2), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=[5, 1])
        for layer, colour in reversed(MTP_LAYERS.items()):
            curve(above, lines, layer.replace("MTP layer ", "mtp_loss_"), colour, layer)
        curve(above, lines, "loss", INK, "next token")
        figure.legend(loc="outside upper left", ncols=5, reverse=True)
        curve(below, lines, "lr", MUTED, "_")
        top = max(line.get("lr", 0.0) for line in lines) or 1.0
        below.set_ylim(0, 1.1 * top)
        below.set_yticks([0, top], ["0", f"{top:.2g}"])
        yield Plot(f"Loss, {stage}", "Nats a token over tokens seen; the thin panel is the learning rate.", figure)


def drafts(found: Found) -> Iterator[Plot]:
    for stage in found.metrics:
        rows = {
            source: {key.replace("mtp_agreement_", "MTP layer "): value for key, value in measured.items()}
            for source, measured in held_out(found, stage).items()
        }
        if any(MTP_LAYERS.keys() & row.keys() for row in rows.values()):
            note = "Share of held-out tokens for which the layer names the token that the model itself would choose."
            yield Plot(f"MTP agreement, {STAGES[stage]}", note, bars(rows, MTP_LAYERS, "{:.0%}".format, limit=1.0))


def experts(found: Found) -> Iterator[Plot]:
    note = "Busiest expert over the mean, averaged over layers; 1 is balance."
    yield from timeline(found, "expert_imbalance", "Expert imbalance", note)
    for stage in STAGES:
        if loads := found.done.get(stage, {}).get("expert_load"):
            figure = Figure((WIDTH, 0.8 + 0.35 * len(loads)), layout="constrained")
            axes = figure.add_subplot()
            for layer, load in enumerate(np.array(loads, dtype=float)):
                axes.scatter(load / max(load.mean(), 1e-9), np.full(load.size, layer), 40, MODELS[stage], alpha=0.5)
            axes.axvline(1, color=MUTED, linewidth=0.8)
            axes.set(xlim=(0, None), xlabel="tokens taken / mean of the layer")
            axes.set_yticks(range(len(loads)), [f"MoE layer {layer + 1}" for layer in range(len(loads))])
            axes.set_ylim(len(loads) - 0.4, -0.6)
            yield Plot(f"Load by layer, {STAGES[stage]}", "Each dot is an expert; all at 1 is balance.", figure)


def gradients(found: Found) -> Iterator[Plot]:
    yield from timeline(found, "grad_norm", "Gradient norm", "Before clipping.")
    yield from timeline(found, "num_zeros", "Zeros in the gradient", "Entries that are exactly zero.")
    yield from timeline(found, "tokens_per_second", "Speed", "Tokens a second.")


def timeline(found: Found, key: str, title: str, note: str) -> Iterator[Plot]:
    """One value over the stages, one after the other."""
    figure = Figure((WIDTH, 2.2), layout="constrained")
    axes = figure.add_subplot()
    start = 0.0
    for stage, lines in found.metrics.items():
        curve(axes, lines, key, MODELS[stage], stage, start)
        start += lines[-1]["tokens"]
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=5)
        yield Plot(title, note, figure)


# -- drawing ----------------------------------------------------------------------------------------------------------


def curve(axes: Axes, lines: list[dict[str, float]], key: str, colour: str, label: str, start: float = 0) -> None:
    """`key` over tokens, faint, and its moving mean over a fortieth of the stage; nothing where it was not logged."""
    points = [(start + line["tokens"], line[key]) for line in lines if isfinite(line.get(key, float("nan")))]
    if not points:
        return
    x, y = np.array(points).T
    window = np.ones(max(1, len(x) // 40))
    smooth = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
    few = slice(None, None, -(-len(x) // 500))  # points: more are not seen
    axes.plot(x[few], y[few], color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(x[few], smooth[few], color=colour, linewidth=1.6, label=label)
    axes.grid(visible=True)
    axes.xaxis.set_major_formatter(tick)
    axes.yaxis.set_major_formatter(tick)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def tick(value: float, _: object) -> str:
    return EngFormatter(sep="")(value) if abs(value) >= 1000 else f"{value:g}"


def bars(
    rows: dict[str, dict[str, float]], colours: dict[str, str], show: Callable[[float], str], limit: float | None = None
) -> Figure:
    """Horizontal bars, for each row those of `colours` that it has."""
    kinds = [kind for kind in colours if any(row.get(kind) is not None for row in rows.values())]
    figure = Figure((WIDTH, 0.6 + len(rows) * (0.15 + 0.22 * len(kinds))), layout="constrained")
    axes = figure.add_subplot()
    thick = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        known = [(y, row[kind]) for y, row in enumerate(rows.values()) if row.get(kind) is not None]
        places = [y + (i - (len(kinds) - 1) / 2) * thick for y, _ in known]
        values = [value for _, value in known]
        drawn = axes.barh(places, values, 0.82 * thick, color=colours[kind], label=STAGES.get(kind, kind))
        axes.bar_label(drawn, [show(value) for value in values], padding=3, fontsize=8.5)
    axes.set_yticks(range(len(rows)), [name if len(name) <= 24 else name[:23] + "…" for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlim=(0, limit or 1.15 * axes.get_xlim()[1]), xticks=[])
    axes.spines["bottom"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=5)
    return figure


def inline_svg(plot: Plot) -> Markup:
    """The figure as an SVG element of the page, in the page's colours and with ids of its own."""
    drawn = io.StringIO()
    plot.figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    own = re.sub(r"\W+", "-", plot.title.lower())
    text = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{own}-", text)
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{own}">', text)
    return Markup(text)
