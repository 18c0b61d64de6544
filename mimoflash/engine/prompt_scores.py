"""Log-probabilities of prompts: where a pass makes logits for them, and what is read off these."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mimoflash.engine.request import Request

LOGITS_BYTES = 64 << 20  # of the logits that a pass makes for them: chunks of such prompts are cut so


def most_rows(vocab_size: int) -> int:
    """Rows of float32 logits in LOGITS_BYTES."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))


def scored_positions(request: Request, count: int) -> range:
    """Those of the next `count` to run whose logits are wanted: each tells the prompt's token after it. None where that
    is known from before a preemption."""
    if not request.is_unscored:
        return range(0)
    first = len(request.prompt_logprobs) - 1
    return range(max(request.run, first), min(request.run + count, request.prompt_tokens - 1))


def fitting(request: Request, count: int, rows: int) -> int:
    """The most of the next `count` tokens for which `rows` of logits are enough; may be none."""
    excess = len(scored_positions(request, count)) - rows
    if excess <= 0:
        return count
    return scored_positions(request, count).stop - excess - request.run


def record(scores: Mapping[Request, range], logits: Tensor) -> None:
    """`logits` (N, vocabulary) float32 are those of the positions in `scores`, one request after the other."""
    sizes = [len(positions) for positions in scores.values()]
    for (request, positions), its in zip(scores.items(), logits.split(sizes), strict=True):
        assert positions.start + 1 == len(request.prompt_logprobs), "each token once, in their order"
        logp = its.log_softmax(-1)
        tokens = torch.tensor(request.text[positions.start + 1 : positions.stop + 1], device=logp.device)
        own = logp.gather(1, tokens[:, None])[:, 0]
        values, ids = logp.topk(min(request.params.prompt_logprobs or 0, logp.shape[1]))
        likeliest = (tuple(zip(*each, strict=True)) for each in zip(ids.tolist(), values.tolist(), strict=True))
        request.prompt_logprobs += list(zip(own.tolist(), likeliest, strict=True))  # in one go, as `settled`
