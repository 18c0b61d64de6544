"""A run's folder: recipe.json, a folder for each stage with its done.json, summary.json; of a new model tokenizer/ and
data/ too."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mimoflash.data import Prepared, open_prepared
from mimoflash.models import find_model
from mimoflash.recipe import HeadsRecipe, PostTrainingRecipe, Recipe
from mimoflash.text import Tokenizer, load_tokenizer

Kind = TypeVar("Kind", bound=Recipe | PostTrainingRecipe | HeadsRecipe, covariant=True)
Say = Callable[[str], None]


@dataclass
class Run(Generic[Kind]):
    """A recipe, and the folder `out` that it is run into. `ray_workers`: so many actors of Ray play rollouts; 0: this
    process does."""

    recipe: Kind
    out: Path
    ray_workers: int = 0

    def tokenizer(self) -> Tokenizer:
        """The run's own, or that of the model that it is about."""
        model = self.recipe.model
        return load_tokenizer(find_model(model) if isinstance(model, str) else self.out / "tokenizer")

    def start(self) -> Path:
        """The model that post-training begins with."""
        model = self.recipe.model
        return find_model(model) if isinstance(model, str) else self.done("sft") / "model"

    def data(self) -> Prepared:
        """The shards that the tokenizer stage prepared, verified. Raises ValueError if they are other ones by now."""
        made = self.result("tokenizer")
        if made is None:
            raise ValueError(f"{self.out} has no finished stage tokenizer: run it first (--only tokenizer)")
        data = open_prepared(self.out / "data")
        if data.manifest["fingerprint"] != made["data"]:
            raise ValueError(f"{self.out / 'data'} is not the data that this run began with: give another --out")
        return data

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left in done.json; None if it has not finished."""
        file = self.out / stage / "done.json"
        return json.loads(file.read_text()) if file.exists() else None

    def done(self, stage: str) -> Path:
        """The folder of a finished stage. Raises ValueError if it has not finished."""
        if self.result(stage) is None:
            raise ValueError(f"{self.out} has no finished stage {stage}: run it first (--only {stage})")
        return self.out / stage

    def forget(self, stage: str, later: Sequence[str]) -> None:
        """From now on none of these stages counts as done. What `stage` has begun and not finished is gone on with; not
        so that of `later` ones, which began with what is about to change."""
        is_begun = self.result(stage) is None
        later = [*later, "coevolve"] if stage != "evaluate" else later  # which goes on from the student
        for name in later if is_begun else (stage, *later):
            for file in (self.out / name).rglob("done.json"):
                file.unlink()
            for states in list((self.out / name).rglob("states")):
                shutil.rmtree(states)

    def finish(self, stage: str, result: dict[str, Any]) -> None:
        write_json(self.out / stage / "done.json", result)
        for states in list((self.out / stage).rglob("states")):  # only now: a kill before goes on from them
            shutil.rmtree(states)


TrainingRun = Run[Recipe | PostTrainingRecipe]  # one with teachers


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)
