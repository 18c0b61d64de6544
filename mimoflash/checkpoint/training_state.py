"""The state of a run, to go on from exactly where it was: written whole or not at all, checked when it is read.

A checkpoint is a folder `step-00000100` with `tensors.safetensors` (the tensors), `state.json` (everything else, with
the tensors' places) and `manifest.json` (format version, size and SHA-256 of the other two). Nothing is pickled.
"""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimoflash.checkpoint.files import new_folder

FORMAT = 1
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_TENSOR, _PAIRS = "__tensor__", "__pairs__"  # marks in state.json: a tensor; a dictionary with keys that are no strings


def save_training_state(folder: str | Path, step: int, state: dict[Any, Any], *, keep: int = 2) -> Path:
    """Writes the checkpoint of `step` into `folder` and deletes all but the newest `keep`. Returns its path.

    `state`: dictionaries (keys: strings or ints), lists and tuples (which come back as lists) of tensors, numbers,
    strings, booleans and None. Killed at any moment, the newest complete checkpoint is still there. Raises ValueError
    for another value, OSError naming the folder where the disk is full: the earlier checkpoints stand.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep is {keep} and step {step}: at least one checkpoint is kept, and steps count from 0")
    parent = Path(folder)
    target = parent / f"step-{step:08}"
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "state", tensors, set())
    with new_folder(target) as new:
        save_file(tensors, new / _TENSORS)
        (new / _STATE).write_text(json.dumps(tree))
        written = [new / _TENSORS, new / _STATE]
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in written}
        (new / _MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2) + "\n")
    for left_over in (*parent.glob(".new-step-*"), *parent.glob(".old-step-*")):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    for old in _checkpoints(parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_training_state(folder: str | Path, device: torch.device | str = "cpu") -> tuple[int, dict[Any, Any]] | None:
    """(step, state) of the newest whole checkpoint in `folder`, None where there is none at all.

    A damaged one is passed over with a warning, for the one before. Raises ValueError where all are damaged.
    """
    path = latest(folder)
    if path is None:
        return None
    tensors = load_file(path / _TENSORS, device=str(device))
    step = json.loads((path / _MANIFEST).read_text())["step"]
    return step, _unpack(json.loads((path / _STATE).read_text()), tensors)


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in `folder`, as `load_training_state` takes it."""
    candidates = _checkpoints(Path(folder))
    for path in candidates:
        damage = _damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path}: {damage}; the checkpoint before it is taken", stacklevel=2)
    if candidates:
        raise ValueError(f"{folder}: every checkpoint in it is damaged: delete them to start from the beginning")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint. Raises ValueError if a later version of this program wrote it."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} is missing or damaged"
    if version != FORMAT:
        raise ValueError(f"{path}: format {version!r}; this version reads {FORMAT}: use the version that wrote it")
    for name in (_TENSORS, _STATE):
        file = path / name
        if not file.is_file() or file.stat().st_size != files[name]["bytes"]:
            return f"{name} is missing or cut off"
        if _sha256(file) != files[name]["sha256"]:
            return f"{name} is damaged (its SHA-256 is another one)"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# -- a tree of tensors and plain values -------------------------------------------------------------------------------


def _pack(value: Any, place: str, tensors: dict[str, Tensor], memories: set[int]) -> Any:
    """`value` as JSON, its tensors taken out into `tensors`."""
    if isinstance(value, Tensor):
        tensor = value.detach().to("cpu").contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[str(len(tensors))] = tensor.clone() if memory in memories else tensor  # each its own, as files want it
        memories.add(memory)
        return {_TENSOR: str(len(tensors) - 1)}
    if isinstance(value, dict):
        pairs = {key: _pack(item, f"{place}.{key}", tensors, memories) for key, item in value.items()}
        if all(isinstance(key, str) for key in pairs) and not pairs.keys() & {_TENSOR, _PAIRS}:
            return pairs
        if not all(isinstance(key, str | int) for key in pairs):
            raise ValueError(f"{place}: a key is neither a string nor an int")
        return {_PAIRS: [[key, item] for key, item in pairs.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{place}[{i}]", tensors, memories) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{place}: a {type(value).__name__} cannot be stored; tensors, numbers, strings, lists, dicts can")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _PAIRS in tree:
        return {key: _unpack(item, tensors) for key, item in tree[_PAIRS]}
    return {key: _unpack(item, tensors) for key, item in tree.items()}
