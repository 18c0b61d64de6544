"""Low-rank adapters (LoRA, arXiv 2106.09685): post-training that moves W = W0 + alpha / rank * B A by A and B alone.

They are parametrizations of the weights (torch.nn.utils.parametrize): whoever reads `.weight`, as the engine's packing
does, sees W, and trainer and engine round and route by the very same W. Computing A x and B (A x) beside W0 x, as is
usual, saves no time here, and would have to be done again in the experts' grouped products.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from mimoflash.checkpoint.delta import LowRank, read_delta, save_delta
from mimoflash.model import Transformer
from mimoflash.model.moe import Experts

_PARAMETRIZED = ".parametrizations."


class LowRankUpdate(nn.Module):
    """W0 (.., R, C) -> W0 + scale * b @ a; a stack of matrices has a pair for each. b is 0 at first."""

    def __init__(self, weight: Tensor, rank: int, scale: float):
        super().__init__()
        *stack, rows, columns = weight.shape
        bound = columns**-0.5  # as torch initialises a linear layer
        self.a = nn.Parameter(weight.new_empty(*stack, rank, columns).uniform_(-bound, bound))
        self.b = nn.Parameter(weight.new_zeros(*stack, rows, rank))
        self.scale = scale

    @property
    def pair(self) -> LowRank:
        return LowRank(self.a, self.b, self.scale)

    def forward(self, weight: Tensor) -> Tensor:
        return self.pair.added_to(weight)


def add_lora(model: Transformer, rank: int, alpha: float = 32.0) -> None:
    """Freezes the model and adds an adapter to each matrix of the trunk's layers: attention's projections, dense FFN,
    and every expert's two (gate and up are one). Routers, norms, sinks, embedding, head and MTP layers stay as they
    are. What the model computes does not change.

    A matrix of R x C has rank * (R + C) to train. The scale alpha / rank lets the best learning rate, about ten times
    that of full training, depend little on the rank. Make Trainer and Engine afterwards; where the loss counts experts,
    Trainer(expert_bias_step=0), for the routers' correction biases are part of the base. Raises ValueError for a rank
    below 1, and for a model that has adapters.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}: it must be at least 1")
    if _adapters(model):
        raise ValueError("the model has adapters already: merge them first (merge_lora)")
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name in _matrices(module):
            parametrize.register_parametrization(module, name, LowRankUpdate(getattr(module, name), rank, alpha / rank))


def lora_state(model: Transformer) -> dict[str, LowRank]:
    """The adapters by the names of their weights in the plain state_dict, in the model's own memory. Raises ValueError
    where there are none."""
    if not (adapters := _adapters(model)):
        raise ValueError("the model has no adapters: add them first (add_lora)")
    return {name: LowRank(each[0].a.detach(), each[0].b.detach(), each[0].scale) for name, each in adapters.items()}


@torch.no_grad()
def merged_state(model: Transformer) -> dict[str, Tensor]:
    """The state_dict that the model would have after `merge_lora`; the model stays. What has no adapter is in the
    model's own memory, what has one is new."""
    return _plain_state(model) | {name: each() for name, each in _adapters(model).items()}


@torch.no_grad()
def merge_lora(model: Transformer) -> None:
    """Makes the adapters part of their weights, in place: a plain model, all of whose parameters train, and which
    `save_model` can save. Trainers and engines of the adapted one end here."""
    for name, each in _adapters(model).items():
        each.original.copy_(each())
        path, _, own = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(path), own, leave_parametrized=False)
    model.requires_grad_(True)


def save_lora(model: Transformer, file: str | Path) -> None:
    """Writes the adapters as a delta to the weights under them (see `checkpoint.save_delta`): `load_delta` merges them
    into a model that holds these. Raises ValueError where there are none."""
    save_delta(lora_state(model), _frozen_state(model), file)


def read_lora(file: str | Path, model: Transformer) -> dict[str, LowRank]:
    """Adapters that `save_lora` wrote, of any rank, for `using_lora`. Raises ValueError, naming the file, where they do
    not belong to the weights under the model's own or are no adapters."""
    adapters = _adapters(model)
    pairs: dict[str, LowRank] = {}
    for name, change in read_delta(file, _frozen_state(model)).items():
        if not isinstance(change, LowRank) or name not in adapters:
            raise ValueError(f"{file}: {name} is no adapter of this model's: load it into a plain one (load_delta)")
        pairs[name] = change
    return pairs


@contextmanager
def using_lora(model: Transformer, pairs: Mapping[str, LowRank]) -> Iterator[None]:
    """In the block the model computes with these adapters in the place of its own: teachers that were trained on the
    student's base are scored without another model. Not to train or generate in. Raises ValueError where `pairs` are
    not for the same weights as the model's."""
    updates = {name: each[0] for name, each in _adapters(model).items()}
    if pairs.keys() != updates.keys():
        unlike = min(pairs.keys() ^ updates.keys())
        raise ValueError(f"{unlike} has an adapter on one side only: teacher and model must be made by add_lora")
    own = lora_state(model)
    try:
        _put(updates, pairs)
        yield
    finally:
        _put(updates, own)


def _put(updates: Mapping[str, Any], pairs: Mapping[str, LowRank]) -> None:
    for name, update in updates.items():
        update.a.data, update.b.data, update.scale = pairs[name].a, pairs[name].b, pairs[name].scale


def _matrices(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, Experts):
        return ("gate_up_proj", "down_proj")
    return ("weight",) if isinstance(module, nn.Linear) else ()


def _adapters(model: Transformer) -> dict[str, Any]:
    """torch's ParametrizationList of each weight that has an adapter, by the weight's plain name: calling it gives W,
    `.original` is W0, [0] the LowRankUpdate."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            parametrizations: Any = module.parametrizations
            found |= {f"{path}.{name}": each for name, each in parametrizations.items()}
    return found


def _plain_state(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if _PARAMETRIZED not in name}


def _frozen_state(model: Transformer) -> dict[str, Tensor]:
    return _plain_state(model) | {name: each.original.detach() for name, each in _adapters(model).items()}
