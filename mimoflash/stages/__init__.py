"""The stages of both kinds of recipes: each takes a run, does its part in the run's folder, tells what came of it."""

from collections.abc import Callable
from typing import Any

from mimoflash.recipe import HeadsRecipe, Recipe
from mimoflash.run_folder import Say
from mimoflash.stages import evaluation, mtp_layers, new_model, post_training

Stage = Callable[[Any, Say], dict[str, Any]]

_NEW_MODEL: dict[str, Stage] = {
    "tokenizer": new_model.make_tokenizer, "pretrain": new_model.pretrain, "sft": new_model.sft,
    "teachers": post_training.teachers, "mopd": post_training.mopd, "rivals": post_training.rivals,
    "evaluate": evaluation.evaluate,
}
_MTP_LAYERS: dict[str, Stage] = {
    "generate": mtp_layers.generate, "first": mtp_layers.first, "mtp": mtp_layers.mtp, "evaluate": mtp_layers.evaluate,
}


def stages_of(recipe: Recipe | HeadsRecipe) -> dict[str, Stage]:
    """In order; without those that the recipe leaves out."""
    stages = _NEW_MODEL if isinstance(recipe, Recipe) else _MTP_LAYERS
    return {name: stage for name, stage in stages.items() if getattr(recipe, name) is not None}
