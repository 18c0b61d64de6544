"""Plots as SVG. Their colours are the page's CSS variables, so that they follow its light or dark theme; matplotlib
draws with stand-ins for them."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mimoflash.report.found import LABELS, Lines

NAMES = ("ink", "muted", "line", "blue", "orange", "green", "purple", "red")
VARIABLES = {f"#0000{n:02}": f"var(--{name})" for n, name in enumerate(NAMES, 1)}  # a stand-in, and what it becomes
INK, MUTED, LINE, BLUE, ORANGE, GREEN, PURPLE, RED = VARIABLES
MODELS = {"chance": MUTED, "pretrain": BLUE, "sft": ORANGE, "teacher": GREEN, "student": PURPLE, "mix_rl": RED}
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
class Plot:
    title: str
    note: str
    figure: Figure


def curve(
    axes: Axes, lines: Lines, key: str, colour: str, label: str, start: float = 0, part: int = 40
) -> None:
    """`key` over tokens, faint, and its moving mean over a `part`-th of the stage; nothing where it was not logged."""
    points = [(start + line["tokens"], line[key]) for line in lines if isfinite(line.get(key, float("nan")))]
    if not points:
        return
    x, y = np.array(points).T
    window = np.ones(max(1, len(x) // part))
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
        drawn = axes.barh(places, values, 0.82 * thick, color=colours[kind], label=LABELS.get(kind, kind))
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
