"""GRPO: a model becomes a domain's teacher by the rewards of its own rollouts (arXiv 2402.03300, 2503.14476). Over
several domains at once it is the reinforcement learning that MOPD is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch, Sample
from mimoflash.posttrain.groups import deal, domain_metrics, has_signal, samples_of, sound
from mimoflash.posttrain.losses import grpo_loss, rollout_drift
from mimoflash.posttrain.policy import mtp_loss, view
from mimoflash.posttrain.scheduler import Player
from mimoflash.posttrain.training import Log, RolloutSettings, Training, sampling_policy
from mimoflash.train import LossOutput
from mimoflash.world import Domain


@dataclass(frozen=True)
class GRPOSettings(RolloutSettings):
    """`clip`: how far below and above 1 a token's ratio to the policy that sampled may go; the upper side is wider so
    that unlikely tokens can become likely. `truncation`: the most that a token's weight of trainer against rollout
    engine may be."""

    clip: tuple[float, float] = (0.2, 0.28)
    truncation: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: rollouts of a task are compared, 2 at least")
        if not (0 < self.clip[0] < 1 and self.clip[1] > 0):
            raise ValueError(f"clip is {self.clip}: the first must be between 0 and 1, the second above 0")
        if self.truncation < 1:
            raise ValueError(f"truncation is {self.truncation}: 1 or more is needed")


@dataclass(frozen=True)
class _Item:
    batch: RolloutBatch
    old_logp_BT: Tensor | None  # see sampling_policy


def train_grpo(
    engine: Engine, domains: Mapping[str, Domain], settings: GRPOSettings, log: Log | None = None, *,
    folder: Path | None = None, player: Player | None = None,
) -> None:
    """Trains the engine's model in place on the training tasks of the domains. A step in which no task has signal
    changes nothing. Arguments and errors as in `Training`."""
    with Training(engine, domains, settings, log, folder=folder, player=player) as training:
        for step in training:
            groups = training.groups()
            played = [sound(group) for each in groups.values() for group in each]
            samples = [sample for group in played if has_signal(group) for sample in samples_of(group)]
            parts = [_items(training, part, settings) for part in deal(samples, settings.updates, step)]
            training.update(parts, partial(_loss, settings=settings), domain_metrics(groups))


def _items(training: Training, samples: Sequence[Sample], settings: GRPOSettings) -> list[_Item]:
    batches = training.batches(samples)
    old_logps = sampling_policy(training.model, batches, settings.updates)
    return [_Item(*each) for each in zip(batches, old_logps, strict=True)]


def _loss(model: Transformer, item: _Item, settings: GRPOSettings) -> LossOutput:
    """Summed over tokens, so that each counts the same in whichever micro-batch it is."""
    batch = item.batch
    own = view(model, batch, replay=True)
    logp_BT = own.token_logp()
    old_logp_BT = logp_BT.detach() if item.old_logp_BT is None else item.old_logp_BT
    loss, metrics = grpo_loss(
        logp_BT, old_logp_BT, batch.rollout_logp_BT, batch.outcome_B, batch.mask_BT,
        clip=settings.clip, truncation=settings.truncation,
    )
    metrics |= {"loss": loss.item()} | rollout_drift(old_logp_BT, batch.rollout_logp_BT, batch.mask_BT)
    if settings.mtp_weight:
        drafting = mtp_loss(model, own)
        metrics["mtp_loss"] = drafting.item()
        loss = loss + settings.mtp_weight * drafting
    return LossOutput(loss * batch.own_tokens, batch.own_tokens, metrics)
