"""A model as the difference to another one, its base, in one file: so many teachers take the memory of one.

What differs is stored whole, not subtracted: base + (new - base) is not `new` in floating point. Where the change is
known to be a product of two narrow matrices (LoRA, train/lora.py), these two are stored instead.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mimoflash.checkpoint.files import sync
from mimoflash.checkpoint.layout import published_tensors
from mimoflash.checkpoint.shards import Shards, open_shard
from mimoflash.config import ModelConfig
from mimoflash.model import Transformer

_BASE = "base_sha256"
_A, _B, _SCALE = ".lora_a", ".lora_b", ".lora_scale"


@dataclass(frozen=True)
class LowRank:
    """A weight's change by scale * b @ a: a (.., rank, columns), b (.., rows, rank), for one matrix or a stack."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.b.shape[:-1], self.a.shape[-1]])

    def to(self, device: torch.device) -> "LowRank":
        return LowRank(self.a.to(device), self.b.to(device), self.scale)

    def added_to(self, weight: Tensor) -> Tensor:
        """weight + scale * b @ a, rounded once. Training computes it here too, so that files give the same bits: on one
        machine, that is. Others may add up the products in another order, which the last bit shows."""
        product = torch.addmm if weight.dim() == 2 else torch.baddbmm
        return product(weight, self.b, self.a, alpha=self.scale)


Change = Tensor | LowRank
Kind = TypeVar("Kind", bound=Change)


def save_delta(state: Mapping[str, Change], base: Mapping[str, Tensor], file: str | Path) -> None:
    """Writes what makes `state` out of `base`, both by the names of the model's state_dict; names that `state` lacks
    are as in the base. The file says by a fingerprint what its base is.

    Tensors come back bit for bit; those of equal bits are not stored. The file appears whole or not at all: what stood
    there stands until then. Raises ValueError, naming the tensor, for one that the base has not or has otherwise, and
    OSError where the file cannot be written.
    """
    own, file = _own(base), Path(file)
    tensors: dict[str, Tensor] = {}
    for name, new in _own(state).items():
        _check_fits(name, new, own)
        if isinstance(new, LowRank):
            scale = torch.tensor(new.scale, dtype=torch.float64)
            tensors |= {name + _A: new.a, name + _B: new.b, name + _SCALE: scale}
        elif not torch.equal(_bytes(new), _bytes(own[name])):
            tensors[name] = new
    temporary = file.with_name(f".new-{file.name}")
    try:
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, temporary, metadata={"format": "pt", _BASE: fingerprint(base)})
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except SafetensorError as error:
        raise OSError(f"{file} was not written, and what stood there stands ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def load_delta(file: str | Path, model: Transformer) -> None:
    """Makes of `model`, which holds the base, what `save_delta` was given; in place.

    Raises ValueError, and changes nothing, naming both where the model holds another base, and the file where it is
    damaged. Reads all of the model once for its fingerprint.
    """
    own = _own(model.state_dict())
    changes = read_delta(file, own)
    for name, change in changes.items():
        new = change.added_to(own[name]) if isinstance(change, LowRank) else change
        own[name].copy_(new)


def read_delta(file: str | Path, base: Mapping[str, Tensor]) -> dict[str, Change]:
    """What `file` changes in `base`, by name, where the base is; raises as `load_delta` does."""
    own = _own(base)
    try:
        with safe_open(file, "pt") as opened:
            theirs = (opened.metadata() or {}).get(_BASE)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dictionary
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}): write it again (save_delta)") from None
    if theirs is None:
        raise ValueError(f"{file}: does not say what its base is, so it is no delta: save_delta writes them")
    if theirs != (ours := fingerprint(base)):
        raise ValueError(
            f"{file}: is a delta to the base {theirs[:16]}, but the model holds {ours[:16]}: load the weights that it "
            "was made from, of the same dtype, first"
        )
    try:
        return _changes(tensors, own)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: is damaged ({error}): write it again (save_delta)") from None


@torch.no_grad()
def swap_in(model: Transformer, folder: str | Path, delta: str | Path | None = None) -> None:
    """Fills the model's own memory with the checkpoint in `folder`, and changes it by `delta` if given: one model takes
    the weights of many in turn, whatever it held before.

    `folder` is as `save_model` writes it, of the model's very config, not FP8; types convert to the model's. Raises
    ValueError, and changes nothing, where it is not; for a delta as `load_delta`, and then the model holds the folder's
    weights.
    """
    folder = Path(folder)
    shards, targets = Shards(folder), published_tensors(model)
    _check_same(folder, shards, model, targets)
    for file, names in shards.by_file().items():
        with open_shard(file) as shard:
            for name in names:
                targets[name].copy_(shard.get_tensor(name))
    if delta is not None:
        load_delta(delta, model)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of all tensors: names, types, shapes and bits. Tied ones, which share their memory, count once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_own(state).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _changes(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Change]:
    """A file's tensors, pairs put together, where the base's are."""
    changes: dict[str, Change] = {}
    for name, tensor in tensors.items():
        if name.endswith(_A):
            weight = name.removesuffix(_A)
            changes[weight] = LowRank(tensor, tensors[weight + _B], tensors[weight + _SCALE].item())
        elif not name.endswith((_B, _SCALE)):
            changes[name] = tensor
    for name, change in changes.items():
        _check_fits(name, change, base)
        changes[name] = change.to(base[name].device)
    return changes


def _own(state: Mapping[str, Kind]) -> dict[str, Kind]:
    """Without second names of the same memory."""
    found: dict[str, Kind] = {}
    seen = set()
    for name, tensor in state.items():
        memory = (tensor.data_ptr(), tensor.shape) if isinstance(tensor, Tensor) else name
        if memory not in seen:
            found[name] = tensor
        seen.add(memory)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    """Bits, not values: NaN is unlike itself, and 0 like -0."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _check_fits(name: str, new: Change, base: Mapping[str, Tensor]) -> None:
    if name not in base:
        raise ValueError(f"{name}: the base has no such tensor of its own")
    dtypes = {new.a.dtype, new.b.dtype} if isinstance(new, LowRank) else {new.dtype}
    if new.shape != base[name].shape or dtypes != {base[name].dtype}:
        had = f"{base[name].dtype} {tuple(base[name].shape)}"
        raise ValueError(f"{name}: is {dtypes.pop()} {tuple(new.shape)}, in the base {had}")


def _check_same(folder: Path, shards: Shards, model: Transformer, targets: Mapping[str, Tensor]) -> None:
    """The checkpoint is of the model's config, and has its tensors and no others."""
    theirs, ours = ModelConfig.load(folder), model.config
    other = [field.name for field in fields(ours) if getattr(theirs, field.name) != getattr(ours, field.name)]
    if other:
        raise ValueError(f"{folder}: config.json has other {', '.join(other)} than the model it is to be swapped into")
    if unlike := sorted(shards.entries.keys() ^ targets.keys()):
        where = "missing" if unlike[0] in targets else "not in the model"
        raise ValueError(f"{folder}: {unlike[0]} is {where}: swap_in takes what save_model writes, and no FP8; "
                         "load_model reads other kinds, save_model converts them")
    for name, target in targets.items():
        if shards.entries[name].shape != target.shape:
            entry = shards.entries[name]
            raise ValueError(f"{entry.file}: {name} is {entry.shape}, but config.json makes it {tuple(target.shape)}")
