"""Plots of what was trained on text: losses, drafts, experts, gradients; and of what the models can do."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from mimoflash.report.drawing import INK, MODELS, MTP_LAYERS, MUTED, WIDTH, Plot, bars, curve
from mimoflash.report.found import STAGES, Found


def skills(found: Found) -> Iterator[Plot]:
    if domains := found.evaluated("domains"):
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
