"""MOPD: one student learns from the teachers of several domains, on what it writes itself (arXiv 2601.02780, section
4.3; 2606.30406)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch, Sample
from mimoflash.posttrain.groups import deal, domain_metrics, samples_of, sound
from mimoflash.posttrain.losses import mopd_loss, reverse_kl_loss, rollout_drift, topk_reverse_kl_loss
from mimoflash.posttrain.policy import View, mtp_loss, view
from mimoflash.posttrain.scheduler import Player
from mimoflash.posttrain.teachers import Scores, Teacher, check_teachers
from mimoflash.posttrain.training import Log, RolloutSettings, Training
from mimoflash.train import LossOutput
from mimoflash.world import Domain

Balance = Literal["domains", "sequences", "tokens"]


@dataclass(frozen=True, kw_only=True)
class MOPDSettings(RolloutSettings):
    """`alpha`: how much the group-normalised reward counts beside the teacher's log-probability. `gate`: sampled tokens
    whose probability under the trainer is less or more than this much of the rollout engine's teach nothing.

    `top`: 0 takes the teacher's word on the sampled tokens alone, as the report does; K its K likeliest tokens at each
    place, with a tail for the rest, and the vocabulary's size all of them: then the reverse KL at every own place is
    the loss, beside the outcomes'.
    `balance`: what weighs the same: every domain, however many and long its rollouts; every sequence; every token.
    """

    alpha: float
    gate: tuple[float, float] = (0.2, 5.0)
    top: int = 0
    balance: Balance = "domains"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}: 0 or more is needed")
        if not 0 <= self.gate[0] < 1 < self.gate[1]:
            raise ValueError(f"gate is {self.gate}: the first must be below 1, the second above")
        if self.top < 0:
            raise ValueError(f"top is {self.top}: 0 (the sampled token) or more is needed")
        if self.balance not in get_args(Balance):
            raise ValueError(f"balance is {self.balance!r}: it must be one of {', '.join(get_args(Balance))}")


@dataclass(frozen=True)
class _Item:
    batch: RolloutBatch
    scores: Scores
    weight: float  # beside the step's others


def train_mopd(
    engine: Engine, domains: Mapping[str, Domain], teachers: Mapping[str, Teacher], settings: MOPDSettings,
    log: Log | None = None, *, folder: Path | None = None, player: Player | None = None,
) -> None:
    """Trains the engine's model in place on the training tasks of all domains. Arguments and errors as in `Training`;
    raises ValueError, before anything starts, where teachers and domains do not go together or a teacher does not speak
    the student's tokens."""
    check_teachers(engine, domains, teachers)
    with Training(engine, domains, settings, log, folder=folder, player=player) as training:
        for step in training:
            groups = training.groups()
            parts: list[list[_Item]] = [[] for _ in range(settings.updates)]
            for name, teacher in teachers.items():
                samples = [sample for group in groups[name] for sample in samples_of(sound(group))]
                for part, dealt in zip(parts, deal(samples, settings.updates, step), strict=True):
                    part += _items(dealt, training, teacher, settings)
            training.update(parts, partial(_loss, settings=settings), domain_metrics(groups))


def _items(samples: Sequence[Sample], training: Training, teacher: Teacher, settings: MOPDSettings) -> list[_Item]:
    """Of one domain."""
    batches = training.batches(samples)
    scores = teacher.score(batches, settings.top)
    weights = {
        "domains": [len(batch.tokens_BT) / len(samples) for batch in batches],
        "sequences": [float(len(batch.tokens_BT)) for batch in batches],
        "tokens": [batch.own_tokens for batch in batches],
    }[settings.balance]
    return [_Item(*each) for each in zip(batches, scores, weights, strict=True)]


def _loss(model: Transformer, item: _Item, settings: MOPDSettings) -> LossOutput:
    batch, scores = item.batch, item.scores
    own = view(model, batch, replay=True)
    logp_BT = own.token_logp()
    own_logp_BT = logp_BT.detach()
    # where the KL is the loss, the sampled token's advantage has nothing to add to it but the outcome
    teacher_logp_BT = own_logp_BT if settings.top else scores.logp_BT
    loss, metrics = mopd_loss(
        logp_BT, own_logp_BT, batch.rollout_logp_BT, teacher_logp_BT, batch.outcome_B, batch.mask_BT,
        alpha=settings.alpha, gate=settings.gate, per_token=settings.balance == "tokens",
    )
    if settings.top:
        loss = loss + _reverse_kl(own, scores, batch.mask_BT, per_token=settings.balance == "tokens")
    reverse_kl = (own_logp_BT - scores.logp_BT).sum().item() / batch.own_tokens  # both are 0 outside of the mask
    metrics |= {"loss": loss.item(), "mopd/reverse_kl": reverse_kl}
    metrics |= rollout_drift(own_logp_BT, batch.rollout_logp_BT, batch.mask_BT)
    if settings.mtp_weight:
        drafting = mtp_loss(model, own)
        metrics["mtp_loss"] = drafting.item()
        loss = loss + settings.mtp_weight * drafting
    return LossOutput(loss * item.weight, item.weight, metrics)


def _reverse_kl(own: View, scores: Scores, mask_BT: Tensor, *, per_token: bool) -> Tensor:
    assert scores.top_logp_NK is not None
    assert scores.top_ids_NK is not None
    if scores.top_logp_NK.shape == own.logp_NV.shape:
        return reverse_kl_loss(own.logp_NV, scores.top_logp_NK, mask_BT, per_token=per_token)
    logp_NK = own.logp_NV.gather(-1, scores.top_ids_NK)
    return topk_reverse_kl_loss(logp_NK, scores.top_logp_NK, mask_BT, per_token=per_token)
