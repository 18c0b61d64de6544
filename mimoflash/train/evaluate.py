"""Loss on what training never saw, for each source, and how often the MTP layers would have drafted rightly."""

import torch
from torch import Tensor

from mimoflash.data import Batch, PackedLoader, Prepared
from mimoflash.model import Transformer
from mimoflash.train.losses import weighted_cross_entropy


@torch.no_grad()
def held_out_losses(
    model: Transformer, data: Prepared, sequence_length: int, *, rows: int, rows_at_once: int = 8
) -> dict[str, dict[str, float]]:
    """By source: `loss` (nats a token; of conversations, on the assistant's tokens only) over at most `rows` rows, and
    for each MTP layer `mtp_agreement_k`, the share of those tokens for which it names the trunk's first choice."""
    results = {}
    was_training = model.training
    model.eval()
    for name in data.held_out:
        loader = PackedLoader(data.held_out, {name: 1.0}, sequence_length)
        count = min(rows, loader.packing[name].rows)
        sums: dict[str, float] = {}
        total = 0.0
        for start in range(0, count, rows_at_once):
            batch = loader.batch(start, min(rows_at_once, count - start))
            metrics, weight = _measure(model, batch.to(model.lm_head.weight.device))
            total += weight
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + value * weight
        if total:
            results[name] = {key: value / total for key, value in sums.items()}
    model.train(was_training)
    return results


def _measure(model: Transformer, batch: Batch) -> tuple[dict[str, float], float]:
    hidden = model.trunk(batch.tokens, batch.positions, batch.document_ids).hidden
    normed = model.model.norm(hidden)
    loss, weight = weighted_cross_entropy(model, normed, batch, ahead=1)
    metrics = {"loss": loss.item()}
    drafts = model.mtp_hidden(hidden, batch.tokens, batch.positions, batch.document_ids)
    if drafts:
        choice_BT = model.lm_head(normed).argmax(-1)  # place t: the trunk's choice of token t + 1
        for k, draft in enumerate(drafts):
            metrics[f"mtp_agreement_{k + 1}"] = _agreement(choice_BT, model.lm_head(draft).argmax(-1), batch, k + 1)
    return metrics, weight


def _agreement(choice_BT: Tensor, draft_BT: Tensor, batch: Batch, ahead: int) -> float:
    """Layer `ahead` - 1 at place t drafts token t + 1 + ahead, which the trunk chooses at place t + ahead."""
    counted = batch.loss_weight[:, 1 + ahead :] > 0
    counted &= batch.document_ids[:, 1 + ahead :] == batch.document_ids[:, : -1 - ahead]
    same = draft_BT[:, : -1 - ahead] == choice_BT[:, ahead:-1]
    return (same & counted).sum().item() / max(1, int(counted.sum()))
