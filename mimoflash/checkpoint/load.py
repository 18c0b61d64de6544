"""Loading a model: from a folder in the published format, a GGUF file, the hub, or the embedded model's name."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mimoflash.checkpoint import fp8
from mimoflash.checkpoint.gguf_in import read_gguf
from mimoflash.checkpoint.heads import SMOL_HEADS, OtherTrunk, load_heads
from mimoflash.checkpoint.layout import EMBEDDING, LM_HEAD, empty_model, materialise, published_tensors
from mimoflash.checkpoint.shards import Entry, Shards, is_pickle, open_shard, refusal
from mimoflash.checkpoint.smol import smol_path
from mimoflash.config import ModelConfig
from mimoflash.model import Transformer

DTYPES = {
    "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """The model at `path` (see `resolve`), each tensor read straight into its place.

    `dtype`: of the weights; None keeps the stored one (FP8 becomes bfloat16, GGUF's quantised types float32). Routers
    stay float32. Needs the model's memory and one shard's. `smol` gets the MTP layers that the package has for it.
    Raises ValueError naming file and tensor where the checkpoint is damaged or is of another shape than its config.
    """
    place, wanted = resolve(path), as_dtype(dtype)
    model = read_gguf(place, wanted, device) if place.suffix == ".gguf" else _read_folder(place, wanted, device)
    if str(path) == "smol" and SMOL_HEADS.is_file():
        try:
            load_heads(model, SMOL_HEADS, place)
        except OtherTrunk as error:  # MIMOFLASH_SMOL may name any file
            warnings.warn(f"{error}: loaded without them", stacklevel=2)
    return model


def resolve(path: str | Path) -> Path:
    """The folder or .gguf file that `path` names: itself, `smol` (the embedded model), or a hub id such as
    `XiaomiMiMo/MiMo-V2-Flash` (fetched into huggingface_hub's cache). Raises ValueError where it is none of them."""
    if str(path) == "smol":
        return smol_path()
    place = Path(path).expanduser()
    if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
        return place
    if place.is_file():
        raise ValueError(refusal(place) if is_pickle(place) else f"{place}: give the model's folder, or a .gguf file")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith("."):
        return _download(str(path))
    raise ValueError(f"{path}: no such folder or .gguf file, and not a hub id (owner/name) nor 'smol'")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name; ValueError if it is not one that a model can compute in."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return found


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as error:  # its own types, and those of whatever HTTP client it uses
        raise ValueError(
            f"{hub_id}: no such folder here, and it could not be fetched from the hub ({error}): "
            "check the name and the network, or give a local folder"
        ) from error


def _read_folder(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> Transformer:
    config = ModelConfig.load(folder)
    shards = Shards(folder)
    config = _with_mtp_layers(config, shards)
    fused = json.loads((folder / "config.json").read_text()).get("attention_projection_layout") == "fused_qkv"
    model = empty_model(config)
    sources = _sources(published_tensors(model), fused)
    _check(folder, sources, published_tensors(model), shards)

    stored = shards.entries[EMBEDDING].dtype
    materialise(model, dtype or (torch.bfloat16 if stored == fp8.E4M3 else stored), device)
    targets = published_tensors(model)
    for file, names in shards.by_file().items():
        with open_shard(file) as shard:
            for name in names:
                if name in sources:
                    views = [targets[target] for target in sources[name]]
                    try:
                        _fill(views, shard.get_tensor(name).to(device), _scale(shards, name, device), config)
                    except ValueError as error:
                        raise ValueError(f"{file}: {name}: {error}") from None
    if config.tie_word_embeddings and LM_HEAD in shards:
        _check_tied(folder, shards)
    return model


def _with_mtp_layers(config: ModelConfig, shards: Shards) -> ModelConfig:
    """As many multi-token-prediction layers as there are tensors of; a config that names another number is wrong."""
    found = [int(match[1]) for name in shards.entries if (match := re.match(r"model\.mtp\.layers\.(\d+)\.", name))]
    layers, named = max(found, default=-1) + 1, config.num_nextn_predict_layers
    if layers and named and layers != named:
        raise ValueError(f"{shards.folder}: config.json names {named} MTP layers, the tensors {layers}")
    if named and not layers:
        warnings.warn(f"{shards.folder}: no tensors of the {named} MTP layers: loaded without them", stacklevel=4)
    return replace(config, num_nextn_predict_layers=layers)


def _sources(wanted: dict[str, Tensor], fused: bool) -> dict[str, tuple[str, ...]]:
    """The stored tensor's name -> those of ours that it holds: one, or q, k and v."""
    sources: dict[str, tuple[str, ...]] = {}
    for name in wanted:
        match = re.fullmatch(r"(.*\.)[qkv]_proj\.weight", name)
        if fused and match:
            sources[f"{match[1]}qkv_proj.weight"] = tuple(f"{match[1]}{letter}_proj.weight" for letter in "qkv")
        else:
            sources[name] = (name,)
    return sources


def _check(folder: Path, sources: dict[str, tuple[str, ...]], wanted: dict[str, Tensor], shards: Shards) -> None:
    """Everything is there, of the right shape, and nothing besides: before memory is taken."""
    for name, targets in sources.items():
        if name not in shards:
            raise ValueError(f"{folder}: {name} is missing: the checkpoint is not complete, or config.json not its own")
        entry = shards.entries[name]
        shape = (sum(wanted[target].shape[0] for target in targets), *wanted[targets[0]].shape[1:])
        if entry.shape != shape:
            raise ValueError(f"{entry.file}: {name} is {entry.shape}, but config.json makes it {shape}")
        if entry.dtype == fp8.E4M3 and f"{name}_scale_inv" not in shards:
            raise ValueError(f"{entry.file}: {name} is FP8 but its {name}_scale_inv is missing")
    for name, entry in shards.entries.items():
        weight = name.removesuffix("_scale_inv")
        scale = weight != name and weight in sources and shards.entries[weight].dtype == fp8.E4M3
        if name not in sources and not scale and name != LM_HEAD and not name.endswith("rotary_emb.inv_freq"):
            _refuse_extra(name, entry)


def _refuse_extra(name: str, entry: Entry) -> None:
    if not name.startswith("model."):  # the towers of the family's models that see and hear
        warnings.warn(f"{entry.file}: {name} is no part of the language model and is passed over", stacklevel=5)
        return
    hint = ' (config.json has no "attention_projection_layout": "fused_qkv")' if "qkv_proj" in name else ""
    raise ValueError(f"{entry.file}: {name} has no place in the model that config.json describes{hint}")


def _scale(shards: Shards, name: str, device: torch.device | str) -> Tensor | None:
    fp8_weight = shards.entries[name].dtype == fp8.E4M3
    return shards.read(f"{name}_scale_inv").to(device) if fp8_weight else None


def _fill(views: list[Tensor], tensor: Tensor, scale: Tensor | None, config: ModelConfig) -> None:
    if len(views) == 3:
        sizes = (views[0].shape[0], views[1].shape[0], views[2].shape[0])
        parts = fp8.split_fused_qkv(tensor, scale, config.num_key_value_heads, sizes)
    else:
        parts = [tensor if scale is None else fp8.dequantise(tensor, scale)]
    for view, part in zip(views, parts, strict=True):
        view.copy_(part)


def _check_tied(folder: Path, shards: Shards) -> None:
    if not torch.equal(shards.read(LM_HEAD), shards.read(EMBEDDING)):
        raise ValueError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but {LM_HEAD} is not equal"
        )
