"""A model whose matrices are FP8: e4m3 in blocks of 128 x 128 with a scale each, as the published checkpoint has them.

Embedding, head, attention output projections, MTP layers' `eh_proj`, routers and norms keep their type, as there.
"""

import copy
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mimoflash.checkpoint.fp8 import quantise
from mimoflash.kernels.grouped import decode_experts, fp8_linear
from mimoflash.model import Transformer
from mimoflash.model.moe import Experts, MoE, Router, Routing

MATRICES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


class FP8Linear(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        quantised, scale = quantise(weight)
        self.weight, self.scale = nn.Buffer(quantised), nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.scale)

    def requantise(self, weight: Tensor) -> None:
        for ours, new in zip((self.weight, self.scale), quantise(weight), strict=True):
            ours.copy_(new)


class FP8Experts(nn.Module):
    """The experts' matrices, and `scales` as `kernels.grouped.decode_experts` takes them."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.gate_up_proj, self.gate_up_scale = _quantised_each(experts.gate_up_proj)
        self.down_proj, self.down_scale = _quantised_each(experts.down_proj)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        return self.gate_up_scale, self.down_scale

    def requantise(self, experts: Experts) -> None:
        for ours, scales, new in (
            (self.gate_up_proj, self.gate_up_scale, experts.gate_up_proj),
            (self.down_proj, self.down_scale, experts.down_proj),
        ):
            for matrix, scale, weight in zip(ours, scales, new, strict=True):
                for to, value in zip((matrix, scale), quantise(weight), strict=True):
                    to.copy_(value)


class FP8MoE(MoE):
    experts: Any

    def __init__(self, mixture: MoE):
        nn.Module.__init__(self)
        self.gate, self.experts = copy.deepcopy(mixture.gate), FP8Experts(mixture.experts)

    def forward(self, x: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Routing]:
        flat, e = x.flatten(0, 1), self.experts
        routing, weights = self.gate(flat, None if indices is None else indices.flatten(0, 1).long())
        y = decode_experts(flat, e.gate_up_proj, e.down_proj, routing.indices, weights, e.scales)
        return y.view(x.shape), routing


@torch.no_grad()
def quantised(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy with FP8 matrices and the rest in `dtype`. The original stays; no second copy of its matrices is made."""
    replaced = {name: module for name, module in model.named_modules() if _is_replaced(name, module)}
    memo = {id(module): nn.Identity() for module in replaced.values()}
    result = copy.deepcopy(model, memo)
    for module in result.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    for name, module in replaced.items():
        parent, _, own = name.rpartition(".")
        setattr(result.get_submodule(parent), own, _fp8(module))
    return result


@torch.no_grad()
def requantise(source: Transformer, result: Transformer) -> None:
    """The source's weights, as they are now, into what `quantised` has made of it."""
    theirs: dict[str, Any] = dict(source.named_modules())
    for name, module in result.named_modules():
        if isinstance(module, FP8Linear):
            module.requantise(theirs[name].weight)
        elif isinstance(module, FP8Experts):
            module.requantise(theirs[name])
        for parameter_name, parameter in module.named_parameters(recurse=False):
            parameter.copy_(theirs[name].get_parameter(parameter_name))
        if isinstance(module, Router):
            module.e_score_correction_bias.copy_(theirs[name].e_score_correction_bias)


def _is_replaced(name: str, module: nn.Module) -> bool:
    return isinstance(module, MoE) or (isinstance(module, nn.Linear) and name.rpartition(".")[2] in MATRICES)


def _fp8(module: nn.Module) -> nn.Module:
    if isinstance(module, MoE):
        return FP8MoE(module)
    assert isinstance(module, nn.Linear)
    return FP8Linear(module.weight)


def _quantised_each(matrices: Tensor) -> tuple[nn.Buffer, nn.Buffer]:
    """(E, R, C) -> e4m3 (E, R, C) and scales (E, R / 128, C / 128), rounded up."""
    weights, scales = zip(*(quantise(matrix) for matrix in matrices), strict=True)
    return nn.Buffer(torch.stack(weights)), nn.Buffer(torch.stack(scales))
