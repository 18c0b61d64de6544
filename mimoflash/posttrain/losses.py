"""What post-training minimises, as pure functions of log-probabilities.

Axes: B sequences, T tokens, V the vocabulary, K tokens of it, N rollouts of one task or own tokens. Log-probabilities
are natural, at temperature 1. `logp_..` is the trained model's and carries the gradient, nothing else does. `mask_BT`
is 1 on the model's own tokens, 0 on prompt, tool and environment tokens and on padding: whatever stands there in the
other tensors, NaN too, counts for nothing. Where a sequence has no token of its own, that is a ValueError.
"""

import math

import torch
from torch import Tensor

Metrics = dict[str, float]
_SMALLEST_TAIL = 1e-7  # what is left of a float32 sum of probabilities near 1 is not exact to more


def group_advantage(reward_N: Tensor) -> Tensor:
    """(reward - mean) / standard deviation (population) over the rollouts of one task (GRPO, arXiv 2402.03300, section
    4.1.2); zeros where all rewards are the same. float32, whatever the rewards are."""
    reward_N = reward_N.double()
    deviation_N = reward_N - reward_N.mean()
    return (deviation_N / (deviation_N.square().mean().sqrt() + 1e-6)).float()


def grpo_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, rollout_logp_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor, *,
    clip: tuple[float, float], truncation: float,
) -> tuple[Tensor, Metrics]:
    """The clipped objective, with its two sides set apart and every token counting the same (DAPO, arXiv 2503.14476,
    eq. 8), times the truncated importance weight of trainer against rollout engine ("Your efficient RL framework
    secretly brings you off-policy RL training", Yao et al. 2025).

    `old_logp_BT`: the policy that sampled, as the trainer computes it; `rollout_logp_BT`: the same policy as the engine
    sampled from it. Ratios to the old policy beyond 1 - clip[0] and 1 + clip[1] gain nothing more; the weight is
    `truncation` at most. Returns the mean over all own tokens, and metrics.
    """
    own_BT = _own(mask_BT)
    advantage_B1 = advantage_B[:, None]
    ratio_BT = (logp_BT - old_logp_BT).masked_fill(~own_BT, 0.0).exp()
    free_BT = ratio_BT * advantage_B1
    clipped_BT = ratio_BT.clamp(1 - clip[0], 1 + clip[1]) * advantage_B1
    weight_BT = (old_logp_BT - rollout_logp_BT).exp().clamp(max=truncation).masked_fill(~own_BT, 0.0)

    loss = -(weight_BT * torch.minimum(free_BT, clipped_BT)).sum() / own_BT.sum()
    return loss, {"actor/clipped": _share(clipped_BT < free_BT, own_BT)}


def mopd_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, rollout_logp_BT: Tensor, teacher_logp_BT: Tensor, outcome_B: Tensor,
    mask_BT: Tensor, *, alpha: float, gate: tuple[float, float], per_token: bool = False,
) -> tuple[Tensor, Metrics]:
    """Multi-teacher on-policy distillation on the tokens that the student sampled (arXiv 2601.02780, section 4.3).

    `old_logp_BT`: the student's, as the trainer computes it, without gradient; `rollout_logp_BT`: what the engine
    sampled from. `outcome_B` is the group-normalised reward. Tokens whose ratio of the two lies outside of `gate`, on
    either side, teach nothing. Returns the mean over sequences of the mean over their own tokens (`per_token`: the mean
    over all own tokens), and metrics.
    """
    own_BT = _own(mask_BT)
    advantage_BT = teacher_logp_BT - old_logp_BT + alpha * outcome_B[:, None]
    ratio_BT = (old_logp_BT - rollout_logp_BT).exp()  # trainer against rollout engine
    kept_BT = own_BT & (ratio_BT >= gate[0]) & (ratio_BT <= gate[1])

    # chosen, not multiplied by 0: a ratio far outside may be infinite
    coefficient_BT = torch.where(kept_BT, ratio_BT * advantage_BT, 0.0)
    return _mean(-coefficient_BT * logp_BT, own_BT, per_token), {"mopd/gated": _share(~kept_BT, own_BT)}


def reverse_kl_loss(
    logp_NV: Tensor, teacher_logp_NV: Tensor, mask_BT: Tensor, *, per_token: bool = False
) -> Tensor:
    """KL(student || teacher) over the whole vocabulary at each of the N own tokens, in the order of the mask's rows:
    what `mopd_loss` without outcomes estimates from the sampled token alone. Entry n is the distribution that token n
    is drawn from. Returns a mean as `mopd_loss`, in nats."""
    own_BT = _own(mask_BT)
    kl_N = (logp_NV.exp() * (logp_NV - teacher_logp_NV)).sum(-1)
    return _mean(mask_BT.to(kl_N).masked_scatter(own_BT, kl_N), own_BT, per_token)


def topk_reverse_kl_loss(
    logp_NK: Tensor, teacher_logp_NK: Tensor, mask_BT: Tensor, *, per_token: bool = False
) -> Tensor:
    """`reverse_kl_loss` from K different tokens a place, and one more that stands for all others with what probability
    is left: never more than the whole vocabulary's.

    A loss, with its gradient through the student's probabilities. As an advantage of the sampled token it would be a
    constant at its place, whose expected gradient is zero.
    """
    return reverse_kl_loss(_with_tail(logp_NK), _with_tail(teacher_logp_NK), mask_BT, per_token=per_token)


def rollout_drift(logp_BT: Tensor, rollout_logp_BT: Tensor, mask_BT: Tensor) -> Metrics:
    """How far the trainer is from the engine on the sampled tokens: `train_infer_diff/kl`, an estimate of KL(rollout ||
    trainer) in nats that is never negative (ratio - 1 - log ratio), and `F(tau=2)`, the share of the tokens whose ratio
    is off by more than a factor of 2 (above 0.1 is the danger sign)."""
    own_BT = _own(mask_BT)
    log_ratio_N = (logp_BT - rollout_logp_BT)[own_BT].detach()
    kl = (log_ratio_N.exp() - 1 - log_ratio_N).mean().item()
    return {"train_infer_diff/kl": kl, "F(tau=2)": (log_ratio_N.abs() > math.log(2)).float().mean().item()}


def _own(mask_BT: Tensor) -> Tensor:
    own_BT = mask_BT > 0
    if not own_BT.any(-1).all():
        raise ValueError("a sequence without a token of its own: drop it before the loss (filter_empty)")
    return own_BT


def _mean(value_BT: Tensor, own_BT: Tensor, per_token: bool) -> Tensor:
    value_B, own_B = value_BT.masked_fill(~own_BT, 0.0).sum(-1), own_BT.sum(-1)
    return value_B.sum() / own_B.sum() if per_token else value_B.div(own_B).mean()


def _share(which_BT: Tensor, own_BT: Tensor) -> float:
    return ((which_BT & own_BT).sum() / own_BT.sum()).item()


def _with_tail(logp: Tensor) -> Tensor:
    """(.., K + 1): the log-probability of all other tokens behind."""
    tail = (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=_SMALLEST_TAIL)
    return torch.cat([logp, tail.log()], dim=-1)
