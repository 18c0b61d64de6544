"""What is minimised: next-token loss, MTP loss and the sequence-wise balance loss (arXiv 2601.02780, sections 2 and 3).

`LossOutput.total` is a sum over `weight` units, every term over the same ones, so that micro-batches add up: the step's
one division by all the weights gives the mean over all of them, however they were cut.
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
    """Next-token loss + mtp_weight x mean over the MTP layers of theirs + balance_weight x balance loss.

    All are divided by the next-token weights, also the MTP layers', which have fewer targets (arXiv 2412.19437, eq. 24
    divides by the sequence's length for every depth); the balance loss of a sequence counts by its weight.
    """
    out = model.trunk(batch.tokens, batch.positions, batch.document_ids)
    total, weight_B = summed_cross_entropy(model, model.model.norm(out.hidden), batch, ahead=1)
    weight = weight_B.sum().item()
    sums = {"loss": total}
    if mtp_weight and len(model.model.mtp.layers):
        drafts = model.mtp_hidden(out.hidden, batch.tokens, batch.positions, batch.document_ids)
        losses = [summed_cross_entropy(model, h, batch, ahead=2 + k)[0] for k, h in enumerate(drafts)]
        sums |= {f"mtp_loss_{k + 1}": value for k, value in enumerate(losses)}
        total = total + mtp_weight * torch.stack(losses).mean()
    counts = None
    if out.routings:
        balance_B, counts = balance_loss(out, batch.document_ids >= 0)
        sums["balance_loss"] = (balance_B * weight_B).sum()
        total = total + balance_weight * sums["balance_loss"]
    metrics = {name: value.item() / weight if weight else 0.0 for name, value in sums.items()}
    return LossOutput(total, weight, metrics, counts)


def summed_cross_entropy(model: Transformer, normed: Tensor, batch: Batch, ahead: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of the tokens `ahead` places later within each document, weighted and summed; the sum of the
    weights of each row (B,). `normed` (B, L, H) are hidden states as the head takes them."""
    weight_BT = batch.loss_weight[:, ahead:] * (batch.document_ids[:, ahead:] == batch.document_ids[:, :-ahead])
    row, place = (weight_BT > 0).nonzero(as_tuple=True)  # the head is not asked about the rest
    if not row.numel():
        return normed.sum() * 0.0, weight_BT.sum(1)
    chosen = normed.flatten(0, 1).index_select(0, row * normed.shape[1] + place)
    losses_N = cross_entropy(model.lm_head(chosen), batch.tokens[:, ahead:][row, place])
    return (losses_N * weight_BT[row, place]).sum(), weight_BT.sum(1)


def balance_loss(out: TrunkOutput, own: Tensor) -> tuple[Tensor, Tensor]:
    """Balance loss of each sequence, summed over the MoE layers (arXiv 2412.19437, eq. 17-20): sum over experts of
    f_i P_i, with f_i = E / (K T) x the tokens that chose i and P_i the mean normalised score.

    `own` (B, L) is False on padding. Returns the losses (B,) and the tokens of each expert (MoE layers, E).
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
        losses.append((frequency_BE * share_BE).sum(1))
        counts.append(chosen_BE.sum(0))
    return torch.stack(losses).sum(0), torch.stack(counts)
