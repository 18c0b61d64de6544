"""mimoflash: make, improve, serve and use a MiMo-V2-Flash kind of language model.

The names below are what programs import; they load on first use, so that `import mimoflash` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimoflash.checkpoint import load_model, save_model
    from mimoflash.config import ModelConfig
    from mimoflash.engine import Engine, SamplingParams
    from mimoflash.model import Transformer
    from mimoflash.text import load_tokenizer

__all__ = ["Engine", "ModelConfig", "SamplingParams", "Transformer", "load_model", "load_tokenizer", "save_model"]

_ROOMS = {
    "Engine": "engine", "ModelConfig": "config", "SamplingParams": "engine", "Transformer": "model",
    "load_model": "checkpoint", "load_tokenizer": "text", "save_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f"mimoflash.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'mimoflash' has no attribute {name!r}")
