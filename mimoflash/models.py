"""What a name means: a model in a folder or a file, one that a run has made, one of the hub; opened, and converted."""

import json
from pathlib import Path

import torch

from mimoflash.checkpoint import HEADS, gguf_bits, load_heads, load_model, resolve, save_gguf, save_model
from mimoflash.config import WINDOW
from mimoflash.engine import Engine
from mimoflash.kernels import native
from mimoflash.model import Transformer
from mimoflash.text import load_tokenizer
from mimoflash.train.monitor import fastest_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def find_model(name: str) -> Path:
    """The model folder or .gguf file that `name` means: itself, that of a run's folder (where the run makes MTP layers,
    that of their trunk), a hub id's, or `smol`. Raises ValueError where there is none."""
    return _find(name)[0]


def open_model(name: str, *, dtype: torch.dtype | str | None = None, device: str = "cpu") -> Transformer:
    """The model that `name` means (see `find_model`), with the MTP layers that the run or, for `smol`, the package has
    for it. `dtype` and errors as in `load_model`."""
    place, heads = _find(name)
    model = load_model("smol" if name == "smol" else place, dtype=dtype, device=device)
    if heads is not None:
        load_heads(model, heads, place)
    return model


def open_engine(
    name: str, *, dtype: str | None = None, speculate: int | None = None, max_running: int = 64,
    share_prefixes: bool = False,
) -> Engine:
    """An engine for the model that `name` means (see `find_model`), with its tokenizer. By default all its MTP layers
    draft, and weights are as they are stored (see `stored_dtype`); in float32 where the machine is slow at what they
    are. `max_running`, `share_prefixes` and errors: see Engine."""
    place = find_model(name)
    slow = not _has_kernels() and fastest_dtype(DEVICE) == torch.float32
    model = open_model(name, dtype="float32" if slow else None, device=DEVICE)
    if speculate is None:
        speculate = min(model.config.num_nextn_predict_layers, 3)
    return Engine(
        model, load_tokenizer(place), speculate=speculate, dtype=dtype or stored_dtype(place), max_running=max_running,
        share_prefixes=share_prefixes,
    )


def stored_dtype(place: Path) -> str | None:
    """What an engine makes of the weights of a model read from `place`: of a .gguf file with about 4 or 8 bits each,
    "int4" or "int8", where the machine has kernels for them; None: what they are in memory."""
    if place.suffix != ".gguf" or not _has_kernels():
        return None
    bits = gguf_bits(place)
    return "int4" if bits < 7 else "int8" if bits < 12 else None


def convert(source: str, target: Path, *, format: str, dtype: str) -> None:
    """Writes the model `source` (see `find_model`) as a published folder ("hf") or for llama.cpp ("gguf")."""
    model, tokenizer = open_model(source), load_tokenizer(find_model(source))
    if format == "hf":
        save_model(model, target, dtype=dtype, tokenizer=tokenizer)
    else:
        if WINDOW not in model.config.layer_types:
            model.set_mtp_layers(0)  # GGUF's `llama` has none
        save_gguf(model, target, dtype=dtype, tokenizer=tokenizer.gguf_fields())


def _has_kernels() -> bool:
    return DEVICE == "cpu" and native.available()


def _find(name: str) -> tuple[Path, Path | None]:
    """The model's place, and the file of MTP layers that a run has made for it."""
    folder = Path(name)
    recipe = folder / "recipe.json"
    if name == "smol" or not recipe.exists():
        return resolve(name), None
    described = json.loads(recipe.read_text())
    trunk = described["model"]
    if isinstance(trunk, str) and Path(trunk).resolve() == folder.resolve():
        raise ValueError(f"{folder} is a run about itself: its recipe's model has to be another")
    if isinstance(trunk, str) and "teachers" not in described:  # the run makes MTP layers for it
        return find_model(trunk), _newest(folder, "mtp", "first") / HEADS
    evolved = folder / "coevolve" / "done.json"
    if evolved.exists():
        return folder / json.loads(evolved.read_text())["best"], None
    return _newest(folder, "mopd", "sft", "pretrain") / "model", None


def _newest(folder: Path, *stages: str) -> Path:
    """The folder of the first of these stages that has finished."""
    for stage in stages:
        if (folder / stage / "done.json").exists():
            return folder / stage
    raise ValueError(f"{folder}: no stage of this run has finished a model yet")
