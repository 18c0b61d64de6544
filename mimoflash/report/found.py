"""What a run's folder holds, read for its report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimoflash.train.monitor import read_metrics

STAGES = {"pretrain": "pre-trained", "sft": "fine-tuned"}  # those that train on text, in order, and what comes of them
LABELS = STAGES | {
    "mix_rl": "RL over all", "cascade_rl": "RL in turn", "off_policy": "off-policy", "param_merge": "merged",
    "naive_mopd": "MOPD unbalanced",
}
Lines = list[dict[str, float]]


@dataclass
class Found:
    """Empty where a stage has not come so far."""

    recipe: dict[str, Any]
    summary: dict[str, Any]
    done: dict[str, dict[str, Any]]  # by stage
    metrics: dict[str, Lines]  # by stage that trains on text
    teachers: dict[str, Lines]  # by domain
    students: dict[str, Lines]  # MOPD and its rivals
    conversations: list[dict[str, Any]]

    def evaluated(self, key: str) -> Any:
        return self.summary.get(key) or self.done.get("evaluate", {}).get(key)


def find(out: Path) -> Found:
    """Reads the run's folder. A file that is missing or broken counts as not there."""

    def read(path: str, nothing: Any) -> Any:
        try:
            value = json.loads((out / path).read_text())
        except (OSError, ValueError):
            return nothing
        return value if isinstance(value, type(nothing)) else nothing

    def logged(folders: dict[str, Path]) -> dict[str, Lines]:
        every = {name: list(read_metrics(folder / "metrics.jsonl")) for name, folder in folders.items()}
        return {name: lines for name, lines in every.items() if lines}

    done = {stage: read(f"{stage}/done.json", {}) for stage in (*STAGES, "evaluate")}
    rivals = {folder.name: folder for folder in sorted((out / "rivals").glob("*/"))}
    return Found(
        read("recipe.json", {}),
        read("summary.json", {}),
        {stage: result for stage, result in done.items() if result},
        logged({stage: out / stage for stage in STAGES}),
        logged({folder.name: folder for folder in sorted((out / "teachers").glob("*/"))}),
        logged({"mopd": out / "mopd"} | rivals),
        read("evaluate/conversations.json", []),
    )
