"""The stages of all kinds of recipes: each takes a run, does its part in the run's folder, tells what came of it."""

from collections.abc import Callable
from typing import Any

from mimoflash.recipe import AnyRecipe, ComparisonRecipe, HeadsRecipe, PostTrainingRecipe, Recipe
from mimoflash.run_folder import Say
from mimoflash.stages import comparison, evaluation, mtp_layers, new_model, post_training

Stage = Callable[[Any, Say], dict[str, Any]]

_POST_TRAINING: dict[str, Stage] = {
    "teachers": post_training.teachers, "mopd": post_training.mopd, "rivals": post_training.rivals,
    "evaluate": evaluation.evaluate,
}
_STAGES: dict[type[AnyRecipe], dict[str, Stage]] = {
    Recipe: {
        "tokenizer": new_model.make_tokenizer, "pretrain": new_model.pretrain, "sft": new_model.sft, **_POST_TRAINING,
    },
    PostTrainingRecipe: _POST_TRAINING,
    ComparisonRecipe: {"tune": comparison.tune, "compare": comparison.compare},
    HeadsRecipe: {
        "generate": mtp_layers.generate, "first": mtp_layers.first, "mtp": mtp_layers.mtp,
        "evaluate": mtp_layers.evaluate,
    },
}


def stages_of(recipe: AnyRecipe) -> dict[str, Stage]:
    """In order; without those that the recipe leaves out."""
    return {name: stage for name, stage in _STAGES[type(recipe)].items() if getattr(recipe, name) is not None}
