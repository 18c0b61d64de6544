"""Which published tensor is which part of a model's memory: the one table behind reading and writing."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from mimoflash.config import ModelConfig
from mimoflash.model import Transformer
from mimoflash.model.moe import Experts, Router

LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOAT32 = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")  # routers: a rounded score changes the choice
_QUANTISED = tuple(f"{matrix}_proj.weight" for matrix in ("q", "k", "v", "gate", "up", "down"))


def published_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of the published format by its name, as a view of the model's own memory.

    Experts, which the model keeps stacked, appear one by one; a tied head does not appear. Raises ValueError for a
    model with low-rank adapters, whose weights are not in one place.
    """
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if is_parametrized(module):
            raise ValueError("the model has low-rank adapters: merge them first (merge_lora)")
        if isinstance(module, Experts):
            stacked = zip(module.gate_up_proj.detach(), module.down_proj.detach(), strict=True)
            for e, (gate_up, down) in enumerate(stacked):
                gate, up = gate_up.chunk(2)
                for name, view in (("gate", gate), ("up", up), ("down", down)):
                    tensors[f"{path}.{e}.{name}_proj.weight"] = view
            continue
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        tensors |= {f"{path}.{name}": tensor.detach() for name, tensor in own.items()}
    if model.config.tie_word_embeddings:
        del tensors[LM_HEAD]
    return tensors


def is_float32(name: str) -> bool:
    """Routers' weights and correction biases keep float32 whatever the rest has."""
    return name.endswith(_FLOAT32)


def is_quantised(name: str) -> bool:
    """Whether an FP8 checkpoint stores this tensor as FP8: all matrices but attention's outputs, embedding, head,
    routers and MTP's `eh_proj`."""
    return name.endswith(_QUANTISED)


def empty_model(config: ModelConfig) -> Transformer:
    """A model without memory: shapes only."""
    with torch.device("meta"), _NoRandomNumbers():
        return Transformer(config)


class _NoRandomNumbers(TorchFunctionMode):
    """Passes over random initialisation, for which torch imports its compiler on the meta device (seconds)."""

    RANDOM = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if function in self.RANDOM else function(*args, **(kwargs or {}))


def materialise(model: Transformer, dtype: torch.dtype, device: torch.device | str) -> None:
    """Gives an `empty_model` its memory, not yet filled."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            kind = torch.float32 if isinstance(module, Router) else dtype
            memory = torch.empty(parameter.shape, dtype=kind, device=device)
            setattr(module, name, nn.Parameter(memory))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, nn.Buffer(torch.empty(buffer.shape, dtype=torch.float32, device=device)))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
