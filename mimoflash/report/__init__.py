"""A run's folder as one page, report.html: what was made, how it went, what it can do. The page needs no network."""

import json
import os
from pathlib import Path

import jinja2
import matplotlib

from mimoflash.report import post_training, training
from mimoflash.report.drawing import LOOK, inline_svg
from mimoflash.report.found import find
from mimoflash.report.numbers import as_text, duration, key_figures, short

__all__ = ["duration", "short", "write_report"]


def write_report(out: Path) -> Path:
    """Writes report.html into the run's folder `out`, from what is there, whole or not at all."""
    found = find(out)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # a message may lack any of its keys
    )
    environment.filters |= {"svg": inline_svg, "text": as_text}
    with matplotlib.rc_context(LOOK):
        page = environment.get_template("page.html.jinja").render(
            name=found.recipe.get("name") or out.resolve().name,
            unfinished=[(stage, lines[-1]) for stage, lines in found.metrics.items() if stage not in found.done],
            figures=list(key_figures(found)),
            table=post_training.table(found),
            sections={
                "What it can do": [*training.skills(found), *training.knowledge(found)],
                "Teachers and their student": list(post_training.plots(found)),
                "Training": list(training.losses(found)),
                "Drafting ahead": list(training.drafts(found)),
                "Health": [*training.experts(found), *training.gradients(found)],
            },
            conversations=found.conversations,
            recipe=json.dumps(found.recipe, indent=2, ensure_ascii=False) if found.recipe else "",
        )
    file, temporary = out / "report.html", out / "report.html.tmp"
    temporary.write_text(page, encoding="utf-8", errors="replace")  # a model can write half a surrogate pair
    os.replace(temporary, file)
    return file
