"""A folder of safetensors shards, checked before anything is read: which tensor is where, its shape and its type."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Shards:
    """The tensors of a folder by name. Raises ValueError, naming file and tensor, for everything that is not whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        index = folder / INDEX
        weight_map = _read_index(index) if index.exists() else None
        files = sorted(set(weight_map.values())) if weight_map is not None else sorted(
            file.name for file in folder.glob("*.safetensors")
        )
        if not files:
            raise ValueError(_nothing_there(folder))
        for name in files:
            self._add(folder / name)
        if weight_map is not None:
            self._check_index(index, weight_map)
            # multi-token-prediction layers may stand in a file that the index does not name
            for file in sorted(folder.glob("*.safetensors")):
                if file.name not in files:
                    self._add(file, only="model.mtp.")

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def by_file(self) -> dict[Path, list[str]]:
        """Names by shard, so that one shard at a time is open."""
        files: dict[Path, list[str]] = {}
        for name, entry in self.entries.items():
            files.setdefault(entry.file, []).append(name)
        return files

    def read(self, name: str) -> Tensor:
        """One tensor, its shard opened for it alone."""
        with open_shard(self.entries[name].file) as shard:
            return shard.get_tensor(name).clone()

    def _add(self, file: Path, only: str = "") -> None:
        with open_shard(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                if not name.startswith(only):
                    continue
                view = shard.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise ValueError(f"{file}: {name} is of type {view.get_dtype()}; known are {', '.join(_DTYPES)}")
                if name in self.entries:
                    raise ValueError(f"{file}: {name} is also in {self.entries[name].file.name}: remove one of them")
                self.entries[name] = Entry(file, tuple(view.get_shape()), _DTYPES[view.get_dtype()])

    def _check_index(self, index: Path, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.entries or self.entries[name].file.name != file:
                raise ValueError(f"{index}: says that {file} holds {name}, which it does not")
        for name, entry in self.entries.items():
            if name not in weight_map:
                raise ValueError(f"{entry.file}: holds {name}, which {INDEX} does not name")


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """The shard, memory-mapped. Raises ValueError naming it where it is cut off or not a safetensors file."""
    try:
        shard = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cut off or not a safetensors file ({error}): fetch it again") from None
    with shard as opened:
        yield opened


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not an index: JSON with a weight_map of tensor to file is expected") from None
    for name in sorted(names, key=str):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the plain name of a .safetensors file in this folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index}: names {name}, which is missing: fetch it again")
    return weight_map


def _nothing_there(folder: Path) -> str:
    pickled = next((file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLES), None)
    return f"{folder}: no .safetensors file" if pickled is None else refusal(folder / pickled)


def refusal(file: Path) -> str:
    """What to say to a pickled checkpoint."""
    return (
        f"{file}: pickled weights can run code when opened, so they are not read: convert them where you trust "
        "them (transformers: from_pretrained, then save_pretrained, writes safetensors)"
    )


def is_pickle(file: Path) -> bool:
    return file.suffix in _PICKLES
