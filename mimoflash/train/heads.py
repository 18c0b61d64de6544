"""MTP layers for a model that is finished: the trunk stays as it is, and they learn what it would write.

The trunk runs once over what it has written itself; its hidden states are kept, and all epochs after cost the heads
only. They learn the trunk's own distribution at the place that they look ahead to, which says more than the token drawn
from it, over a draft vocabulary of the tokens that the text has most.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimoflash.checkpoint import load_training_state, save_training_state
from mimoflash.data import Batch, HiddenBatch, HiddenRows
from mimoflash.model import Transformer
from mimoflash.model.transformer import MTP
from mimoflash.train.losses import LossOutput
from mimoflash.train.monitor import Monitor
from mimoflash.train.optimizer import learning_rate
from mimoflash.train.settings import check_least, check_rates
from mimoflash.train.trainer import Trainer

_ROWS = 128  # a chunk's logits over a few thousand tokens stay in the processor's cache


@dataclass(frozen=True)
class HeadsSettings:
    """How MTP layers are trained: over `tokens` in all, in rows of `sequence_length`, `batch` rows a step.

    The learning rate is linear over `warmup_tokens`, then a cosine to `final_lr`. `draft_tokens` is the size of the
    draft vocabulary, `prompt_weight` the loss weight of what the assistant did not write; `fit_tokens` of the text fit
    the first weights.
    """

    tokens: int
    layers: int = 3
    draft_tokens: int = 8192
    sequence_length: int = 256
    batch: int = 4
    peak_lr: float = 1e-3
    final_lr: float = 1e-4
    warmup_tokens: int = 20_000
    prompt_weight: float = 0.3
    fit_tokens: int = 20_000
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100  # steps
    evaluate_rows: int = 64
    evaluate_every: int = 100  # steps

    def __post_init__(self) -> None:
        check_least(self, 1, "tokens", "layers", "draft_tokens", "batch", "fit_tokens")
        check_least(self, 1, "save_every", "evaluate_rows", "evaluate_every")
        check_least(self, 0, "warmup_tokens")
        check_rates(self.peak_lr, self.final_lr)
        if self.sequence_length < self.layers + 2:
            raise ValueError(
                f"sequence_length is {self.sequence_length}: {self.layers} layers look {self.layers + 1} places ahead"
            )

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.batch * self.sequence_length))

    def lr(self, step: int) -> float:
        """Of step 1, 2, .."""
        tokens = step * self.batch * self.sequence_length
        return learning_rate(
            tokens, peak=self.peak_lr, final=self.final_lr, warmup_tokens=self.warmup_tokens, constant_tokens=0,
            total_tokens=self.tokens,
        )


def train_heads(
    model: Transformer, train: HiddenRows, held_out: HiddenRows, settings: HeadsSettings, folder: Path
) -> dict[str, Any]:
    """Trains the MTP layers of `model` in place, its trunk frozen; goes on from the newest training state in `folder`.

    The model brings its draft vocabulary. Returns steps, tokens, seconds, and the held-out metrics of `draft_loss` at
    the end. Raises ValueError where the loss is no longer finite.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("model.mtp."))
    head = model.lm_head.weight[model.model.mtp.draft_tokens].detach()
    trainer = Trainer(model.model.mtp, weight_decay=settings.weight_decay, clip=settings.clip)
    states = folder / "states"
    done, state = load_training_state(states, head.device) or (0, None)
    spent = 0.0
    if state is not None:
        trainer.load_state(state["trainer"])
        spent = state["seconds"]
    started = time.monotonic() - spent
    row = settings.batch * settings.sequence_length

    def loss_fn(_: MTP, item: HiddenBatch) -> LossOutput:
        return draft_loss(model, item, head)

    with Monitor(folder, "mtp", settings.steps * row, first_step=done, done=done * row) as monitor:
        for step in range(done + 1, settings.steps + 1):
            batch = train.batch((step - 1) * settings.batch, settings.batch).to(head.device)
            try:
                metrics = trainer.step([batch], loss_fn, settings.lr(step))
            except FloatingPointError as error:
                raise ValueError(f"mtp step {step}: {error}; begin again with a lower peak_lr or clip") from None
            monitor.log(step, step * row, metrics | {"lr": settings.lr(step)})
            if step % settings.evaluate_every == 0 or step == settings.steps:
                found = evaluate_heads(model, held_out, settings.evaluate_rows)
                monitor.log(step, step * row, {f"held_out/{name}": value for name, value in found.items()})
            if step % settings.save_every == 0 and step < settings.steps:
                save_training_state(
                    states, step, {"trainer": trainer.state(), "seconds": time.monotonic() - started}
                )
    seconds = time.monotonic() - started
    return {"steps": settings.steps, "tokens": settings.steps * row, "seconds": seconds, "held_out": found}


@torch.no_grad()
def evaluate_heads(model: Transformer, data: HiddenRows, rows: int) -> dict[str, float]:
    """The metrics of `draft_loss` over the first rows."""
    head = model.lm_head.weight[model.model.mtp.draft_tokens]
    sums: dict[str, float] = defaultdict(float)
    weight = 0.0
    for sample in range(min(rows, data.rows)):
        out = draft_loss(model, data.batch(sample, 1).to(head.device), head)
        weight += out.weight
        for name, value in out.metrics.items():
            sums[name] += value * out.weight
    return {name: value / weight for name, value in sums.items()}


def draft_loss(model: Transformer, item: HiddenBatch, head: Tensor) -> LossOutput:
    """Mean over the MTP layers of the cross entropy to the trunk's distribution, on the draft vocabulary.

    `head` (D, H): the rows of the shared head for the draft vocabulary. Layer k at place t answers for what the trunk
    says at t + 1 + k. Metrics: `loss`, and for each layer its loss and `agreement_k`, how often both have the same
    first choice.
    """
    batch, hidden = item.batch, item.hidden
    length = batch.tokens.shape[1]
    with torch.no_grad():
        trunk_ND = F.linear(model.model.norm(hidden).flatten(0, 1), head).softmax(-1)
    drafts = model.mtp_hidden(hidden, batch.tokens, batch.positions, batch.document_ids)
    total = hidden.new_zeros(())
    metrics: dict[str, float] = {}
    weight = _weights(batch, 2).sum().item()
    for k, draft_BLH in enumerate(drafts):
        weight_BT = _weights(batch, 2 + k)
        row, place = (weight_BT > 0).nonzero(as_tuple=True)
        weight_N = weight_BT[row, place]
        loss, agreed = soft_cross_entropy(draft_BLH[row, place], trunk_ND, row * length + place + 1 + k, head, weight_N)
        own = weight_N.sum().item()
        total = total + loss / len(drafts)
        metrics |= {f"loss_{k + 1}": loss.item() / max(own, 1e-9), f"agreement_{k + 1}": agreed / max(own, 1e-9)}
    return LossOutput(total, weight, {"loss": total.item() / max(weight, 1e-9)} | metrics)


def _weights(batch: Batch, ahead: int) -> Tensor:
    """(B, L - ahead): of the token `ahead` places later, if it is of the same document."""
    return batch.loss_weight[:, ahead:] * (batch.document_ids[:, ahead:] == batch.document_ids[:, :-ahead])


def soft_cross_entropy(
    hidden: Tensor, target: Tensor, rows: Tensor, head: Tensor, weight: Tensor
) -> tuple[Tensor, float]:
    """Sum over n of weight x cross entropy from target[rows[n]] to softmax(hidden[n] . head^T), and of the weights
    where both have the same largest entry. hidden (N, H), target (M, D) probabilities, rows (N,), head (D, H), weight
    (N,); only `hidden` has a gradient."""
    loss, agreed = _SoftCrossEntropy.apply(hidden, target, rows, head, weight)
    return loss, agreed.item()


class _SoftCrossEntropy(torch.autograd.Function):
    """The gradient is made along with the loss, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, rows: Tensor, head: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(hidden)
        loss, agreed = hidden.new_zeros(()), hidden.new_zeros(())
        for start in range(0, len(hidden), _ROWS):
            part = slice(start, start + _ROWS)
            logits_RD, p_RD = F.linear(hidden[part], head), target[rows[part]]
            agreed += weight[part][logits_RD.argmax(-1) == p_RD.argmax(-1)].sum()
            normaliser_R = logits_RD.logsumexp(-1)
            loss += (weight[part] * (normaliser_R - torch.linalg.vecdot(p_RD, logits_RD))).sum()
            q_RD = logits_RD.sub_(normaliser_R[:, None]).exp_()
            grad[part] = q_RD.sub_(p_RD).mul_(weight[part, None]) @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(agreed)
        return loss, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, None, None, None, None
