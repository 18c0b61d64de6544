"""Loss on what training never saw, for each source, and how often the MTP layers would have drafted rightly."""

from collections import defaultdict

import torch
from torch import Tensor

from mimoflash.data import Batch, PackedLoader, Prepared
from mimoflash.model import Transformer
from mimoflash.train.losses import summed_cross_entropy


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
        sums: defaultdict[str, float] = defaultdict(float)
        weights: defaultdict[str, float] = defaultdict(float)
        for start in range(0, count, rows_at_once):
            batch = loader.batch(start, min(rows_at_once, count - start)).to(model.lm_head.weight.device)
            for key, (total, weight) in _measure(model, batch).items():
                sums[key] += total
                weights[key] += weight
        results[name] = {key: sums[key] / weight for key, weight in weights.items() if weight}
    model.train(was_training)
    return {name: found for name, found in results.items() if found}


def _measure(model: Transformer, batch: Batch) -> dict[str, tuple[float, float]]:
    """(sum, weight) by metric."""
    hidden = model.trunk(batch.tokens, batch.positions, batch.document_ids).hidden
    normed = model.model.norm(hidden)
    loss, weight_B = summed_cross_entropy(model, normed, batch, ahead=1)
    metrics = {"loss": (loss.item(), weight_B.sum().item())}
    drafts = model.mtp_hidden(hidden, batch.tokens, batch.positions, batch.document_ids)
    if drafts:
        choice_BT = model.lm_head(normed).argmax(-1)  # place t: the trunk's choice of token t + 1
        for k, draft in enumerate(drafts):
            metrics[f"mtp_agreement_{k + 1}"] = _agreement(choice_BT, model.lm_head(draft).argmax(-1), batch, k + 1)
    return metrics


def _agreement(choice_BT: Tensor, draft_BT: Tensor, batch: Batch, ahead: int) -> tuple[float, float]:
    """Layer `ahead` - 1 at place t drafts token t + 1 + ahead, which the trunk chooses at place t + ahead."""
    counted = batch.loss_weight[:, 1 + ahead :] > 0
    counted &= batch.document_ids[:, 1 + ahead :] == batch.document_ids[:, : -1 - ahead]
    same = draft_BT[:, : -1 - ahead] == choice_BT[:, ahead:-1]
    return (same & counted).sum().item(), counted.sum().item()
