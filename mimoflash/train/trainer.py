"""One optimizer step, whatever the loss: pre-training, SFT and post-training all call `Trainer.step`."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from mimoflash.kernels.memory import keep_freed_memory
from mimoflash.train.losses import LossOutput
from mimoflash.train.optimizer import imbalance, parameter_groups, update_expert_bias

Item = TypeVar("Item")
Network = TypeVar("Network", bound=nn.Module)  # a Transformer, or a part of one whose rest stays as it is


class Trainer(Generic[Network]):
    """The model with its AdamW state. In bfloat16 the optimizer keeps float32 copies of the weights."""

    def __init__(
        self, model: Network, *, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8, clip: float = 1.0, expert_bias_step: float = 1e-3, dtype: torch.dtype = torch.float32,
    ):
        keep_freed_memory()
        self.clip, self.expert_bias_step = clip, expert_bias_step
        self.expert_counts: Tensor | None = None  # of the last step: (MoE layers, experts)
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.has_masters = dtype != torch.float32
        self.masters = [p.detach().clone().float() for p in self.parameters] if self.has_masters else self.parameters
        self.model = to_training_dtype(model, dtype).train()
        groups = parameter_groups(self.masters, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def step(
        self, batches: Sequence[Item], loss_fn: Callable[[Network, Item], LossOutput], lr: float
    ) -> dict[str, float]:
        """Accumulates the gradient of the mean loss over `batches`, clips it and takes one step at `lr`.

        Returns the loss's metrics and `grad_norm` (before clipping), `num_zeros` (gradient entries that are zero),
        `expert_imbalance`. Raises FloatingPointError, before anything changes, if the loss or the gradient is not
        finite, and ValueError if no batch has anything to learn from.
        """
        metrics, weight, counts = self._accumulate(batches, loss_fn)
        grads = [p.grad for p in self.masters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item() / weight  # gradients are still sums over `weight` units
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        metrics["grad_norm"] = norm
        metrics["num_zeros"] = float(sum(g.numel() - int(torch.count_nonzero(g)) for g in grads))
        torch._foreach_mul_(grads, min(1.0, self.clip / (norm + 1e-6)) / weight)
        self._update(lr)
        self.expert_counts = counts
        if counts is not None:
            metrics["expert_imbalance"] = imbalance(counts)
            update_expert_bias(self.model, counts, self.expert_bias_step)
        return metrics

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit by bit."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"masters": self.masters} if self.has_masters else state

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for own, stored in zip(self.masters, state.get("masters", []), strict=False):
            own.copy_(stored)

    def _accumulate(
        self, batches: Sequence[Item], loss_fn: Callable[[Network, Item], LossOutput]
    ) -> tuple[dict[str, float], float, Tensor | None]:
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        weight, counts = 0.0, None
        for batch in batches:
            out = loss_fn(self.model, batch)
            if not torch.isfinite(out.total):
                raise FloatingPointError(f"the loss is {out.total.item()}")
            if out.weight:
                out.total.backward()
                self._collect_gradients()
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, 0.0) + value * out.weight
            weight += out.weight
            if out.expert_counts is not None:
                counts = out.expert_counts if counts is None else counts + out.expert_counts
        if not weight:
            raise ValueError("no batch of this step has a token to learn from: check the sources' loss masks")
        return {name: value / weight for name, value in sums.items()}, weight, counts

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.has_masters:
            for master, p in zip(self.masters, self.parameters, strict=True):
                p.copy_(master)

    def _collect_gradients(self) -> None:
        """In bfloat16 gradients add up in float32, beside the float32 weights."""
        if not self.has_masters:
            return
        for master, p in zip(self.masters, self.parameters, strict=True):
            if p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None


def to_training_dtype(model: Network, dtype: torch.dtype) -> Network:
    """Casts all but the routers, which stay in float32 as in the published checkpoint."""
    for name, p in model.named_parameters():
        if ".mlp.gate." not in name:
            p.data = p.data.to(dtype)
    return model
