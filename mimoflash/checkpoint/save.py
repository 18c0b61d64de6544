"""Saving a model in the published format, so that transformers and the family's servers read it."""

import fnmatch
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from mimoflash.checkpoint import fp8
from mimoflash.checkpoint.files import new_folder
from mimoflash.checkpoint.layout import is_float32, is_quantised, published_tensors
from mimoflash.checkpoint.load import as_dtype
from mimoflash.checkpoint.shards import INDEX
from mimoflash.config import ModelConfig
from mimoflash.model import Transformer

_REPLACED = ("*.safetensors", INDEX, "config.json")
_KEPT = ("README.md", "LICENSE*", "*.json", "*.jinja", "*.txt")


class Tokenizer(Protocol):
    """What is asked of a tokenizer here: to write its files beside the model's."""

    def save(self, folder: Path) -> object: ...


def save_model(
    model: Transformer, folder: str | Path, *, dtype: torch.dtype | str | None = None, max_shard_bytes: float = 5e9,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes config.json (both spellings), model*.safetensors (several with an index, above `max_shard_bytes`; MTP
    layers in shards of their own), and the tokenizer's files.

    `dtype`: None as the model has it, a float type, or "fp8": e4m3 in blocks of 128 x 128, the rest bfloat16. Routers
    are float32 always. The folder appears whole or not at all: it is written beside its place, flushed and renamed. An
    earlier checkpoint there is replaced (its tokenizer and README stay). Raises ValueError where the folder holds
    anything else, OSError where the disk is full.
    """
    target = Path(folder)
    kept = _files_to_keep(target)
    quantise = dtype == "fp8"
    kind = torch.bfloat16 if quantise else as_dtype(dtype) or model.model.embed_tokens.weight.dtype
    with new_folder(target) as new:
        for file in kept:
            shutil.copy2(file, new / file.name)
        tensors = published_tensors(model)
        shards = list(_plan(tensors, kind, quantise, max_shard_bytes))
        weight_map: dict[str, str] = {}
        total = 0
        for number, names in enumerate(shards, 1):
            one = len(shards) == 1
            file_name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
            stored = dict(pair for name in names for pair in _stored(name, tensors[name], kind, quantise))
            save_file(stored, new / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(stored, file_name)
            total += sum(tensor.nbytes for tensor in stored.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (new / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config = model.config.to_dict() | {"dtype": str(kind).removeprefix("torch.")}
        config |= {"quantization_config": _quantization_config(model.config)} if quantise else {}
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(new)


def _files_to_keep(target: Path) -> list[Path]:
    """What stays of an earlier checkpoint; ValueError if the folder is something else."""
    files = sorted(target.iterdir()) if target.exists() else []
    matches = lambda file, patterns: any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)  # noqa: E731
    for file in files:
        if not file.is_file() or not matches(file, _REPLACED + _KEPT):
            raise ValueError(f"{target}: holds {file.name}, which is no part of a checkpoint: give a folder of its own")
    return [file for file in files if not matches(file, _REPLACED)]


def _plan(
    tensors: dict[str, Tensor], kind: torch.dtype, quantise: bool, max_shard_bytes: float
) -> Iterator[list[str]]:
    """The names of each shard; a new one begins where the size is reached and where MTP begins."""
    shard: list[str] = []
    size, mtp = 0, False
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].startswith("model.mtp.")):
        width = 4 if is_float32(name) else 1 if quantise and is_quantised(name) else kind.itemsize
        begins_mtp = name.startswith("model.mtp.") and not mtp
        if shard and (size + tensor.numel() * width > max_shard_bytes or begins_mtp):
            yield shard
            shard, size = [], 0
        mtp = mtp or begins_mtp
        shard.append(name)
        size += tensor.numel() * width
    yield shard


def _stored(name: str, tensor: Tensor, kind: torch.dtype, quantise: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a file holds for one of the model's."""
    if quantise and is_quantised(name):
        try:
            weight, scale = fp8.quantise(tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        yield name, weight.cpu()
        yield f"{name}_scale_inv", scale.cpu()
    else:
        yield name, tensor.to("cpu", torch.float32 if is_float32(name) else kind).contiguous()


def _quantization_config(config: ModelConfig) -> dict[str, object]:
    ignored = [f"model.layers.{i}.self_attn.o_proj" for i in range(config.layers)]
    if config.num_nextn_predict_layers:
        ignored.append("model.decoder.self_attn.o_proj")  # the name that the published config gives MTP's blocks
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [fp8.BLOCK, fp8.BLOCK], "ignored_layers": ignored,
    }
