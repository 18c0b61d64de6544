"""What is minimised: next-token loss, MTP loss and the sequence-wise balance loss (arXiv 2601.02780, sections 2 and 3).

Every loss is a mean over its own weight; `LossOutput.total` is that mean times the weight, so that micro-batches add up
and one division by the sum of weights gives the mean over all of them.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mimoflash.data import Batch
from mimoflash.kernels.cross_entropy import cross_entropy
from mimoflash.model import Transformer, TrunkOutput


@dataclass
class LossOutput:
    """`total`: with gradient, summed over `weight` units (tokens here). `metrics` are means over the same units.
    `expert_counts` (MoE layers, experts): tokens that each expert took, padding left out."""

    total: Tensor
    weight: float
    metrics: dict[str, float] = field(default_factory=dict)
    expert_counts: Tensor | None = None


def language_model_loss(
    model: Transformer, batch: Batch, *, mtp_weight: float = 0.0, balance_weight: float = 0.0
) -> LossOutput:
    """Next-token loss + mtp_weight x mean over the MTP layers of theirs + balance_weight x balance loss."""
    out = model.trunk(batch.tokens, batch.positions, batch.document_ids)
    loss, weight = weighted_cross_entropy(model, model.model.norm(out.hidden), batch, ahead=1)
    metrics = {"loss": loss.item()}
    total = loss
    if mtp_weight and len(model.model.mtp.layers):
        drafts = model.mtp_hidden(out.hidden, batch.tokens, batch.positions, batch.document_ids)
        losses = [weighted_cross_entropy(model, h, batch, ahead=2 + k)[0] for k, h in enumerate(drafts)]
        metrics |= {f"mtp_loss_{k + 1}": value.item() for k, value in enumerate(losses)}
        total = total + mtp_weight * torch.stack(losses).mean()
    counts = None
    if out.routings:
        balance, counts = balance_loss(out, batch.document_ids >= 0)
        metrics["balance_loss"] = balance.item()
        total = total + balance_weight * balance
    return LossOutput(total * weight, weight, metrics, counts)


def weighted_cross_entropy(model: Transformer, normed: Tensor, batch: Batch, ahead: int) -> tuple[Tensor, float]:
    """Mean cross entropy of the tokens `ahead` places later, by their loss weights, within each document; the weights'
    sum. `normed` (B, L, H) are hidden states as the head takes them. Zero where nothing is to be predicted."""
    weight_BT = batch.loss_weight[:, ahead:] * (batch.document_ids[:, ahead:] == batch.document_ids[:, :-ahead])
    row, place = (weight_BT > 0).nonzero(as_tuple=True)  # the head is not asked about the rest
    if not row.numel():
        return normed.sum() * 0.0, 0.0
    weight_N = weight_BT[row, place]
    flat = row * normed.shape[1] + place
    chosen = normed if flat.numel() == normed.shape[0] * normed.shape[1] else normed.flatten(0, 1).index_select(0, flat)
    losses_N = cross_entropy(model.lm_head(chosen), batch.tokens[:, ahead:][row, place])
    total = weight_N.sum()
    return (losses_N * weight_N).sum() / total, total.item()


def balance_loss(out: TrunkOutput, own: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence-wise balance loss, summed over the MoE layers and averaged over sequences (arXiv 2412.19437, eq. 17-20):
    sum over experts of f_i P_i, with f_i = E / (K T) x the tokens that chose i and P_i the mean normalised score.

    `own` (B, L) is False on padding. Returns the loss and the tokens of each expert (MoE layers, E).
    """
    batch, length = own.shape
    weight_BL = own.float()
    tokens_B = weight_BL.sum(1).clamp(min=1)
    losses, counts = [], []
    for routing in out.routings:
        experts, per_token = routing.scores.shape[-1], routing.indices.shape[-1]
        scores_BLE = (routing.scores / routing.scores.sum(-1, keepdim=True)).view(batch, length, experts)
        share_BE = torch.einsum("ble,bl->be", scores_BLE, weight_BL) / tokens_B[:, None]
        chosen_BE = torch.zeros(batch, experts, device=own.device).scatter_add_(
            1, routing.indices.view(batch, -1), weight_BL.repeat_interleave(per_token, dim=1)
        )
        frequency_BE = chosen_BE * experts / (per_token * tokens_B[:, None])
        losses.append((frequency_BE * share_BE).sum(1).mean())
        counts.append(chosen_BE.sum(0))
    return torch.stack(losses).sum(), torch.stack(counts)
