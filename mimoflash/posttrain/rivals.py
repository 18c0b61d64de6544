"""What MOPD is compared with (arXiv 2606.30406): other ways to one model that is good in several domains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch
from mimoflash.posttrain.groups import deal, domain_metrics, samples_of, sound
from mimoflash.posttrain.grpo import GRPOSettings, train_grpo
from mimoflash.posttrain.policy import mtp_loss, view
from mimoflash.posttrain.rollout import Rollout, Task
from mimoflash.posttrain.scheduler import LocalPlayer, Player
from mimoflash.posttrain.training import Log, RolloutSettings, Training
from mimoflash.train import LossOutput
from mimoflash.world import Domain


def cascade_rl(
    engine: Engine, domains: Mapping[str, Domain], settings: GRPOSettings, log: Log | None = None, *,
    folder: Path | None = None, player: Player | None = None,
) -> None:
    """One domain after the other, in their order, each for its share of `settings.steps` and with the groups of all, so
    that as much is played as by the others. Raises ValueError where there are fewer steps than domains."""
    names = list(domains)
    if settings.steps < len(names):
        raise ValueError(f"steps is {settings.steps}: each of {len(names)} domains needs one at least")
    for number, name in enumerate(names):
        steps = settings.steps * (number + 1) // len(names) - settings.steps * number // len(names)
        sources = {at: own for at, own in settings.sources.items() if at == name}
        own = replace(
            settings, steps=steps, groups=settings.groups * len(names), tokens=settings.tokens // len(names),
            sources=sources,
        )
        train_grpo(engine, {name: domains[name]}, own, log, folder=folder / name if folder else None, player=player)


@dataclass(frozen=True)
class OffPolicySettings(RolloutSettings):
    """`passed_only`: of the teachers' rollouts only those with full reward are learnt from."""

    passed_only: bool = True


class _TeacherPlayer:
    """Each domain's tasks are played by its teacher, which does not learn."""

    def __init__(self, teachers: Mapping[str, Engine], domains: Mapping[str, Domain]):
        self.players = {name: LocalPlayer(engine, domains) for name, engine in teachers.items()}

    async def play(self, task: Task) -> Rollout:
        return await self.players[task.domain].play(task)

    async def update(self, model: Transformer) -> None:
        pass


def off_policy_finetune(
    engine: Engine, domains: Mapping[str, Domain], teachers: Mapping[str, Engine], settings: OffPolicySettings,
    log: Log | None = None, *, folder: Path | None = None,
) -> None:
    """Fine-tuning on what the teachers write: cross entropy of their tokens, every domain with the same weight."""
    player = _TeacherPlayer(teachers, domains)
    with Training(engine, domains, settings, log, folder=folder, player=player) as training:
        for step in training:
            groups = training.groups()
            parts: list[list[tuple[RolloutBatch, float]]] = [[] for _ in range(settings.updates)]
            for each in groups.values():
                samples = [sample for group in each for sample in samples_of(sound(group))]
                if settings.passed_only:
                    samples = [sample for sample in samples if sample.rollout.reward >= 1]
                for part, dealt in zip(parts, deal(samples, settings.updates, step), strict=True):
                    batches = training.batches(dealt)
                    tokens = sum(batch.own_tokens for batch in batches)
                    part += [(batch, batch.own_tokens / tokens) for batch in batches]
            training.update(parts, partial(_cross_entropy, settings=settings), domain_metrics(groups))


def _cross_entropy(
    model: Transformer, item: tuple[RolloutBatch, float], settings: OffPolicySettings
) -> LossOutput:
    batch, weight = item
    seen = view(model, batch, replay=False)  # the routes are another model's
    loss = -seen.token_logp().sum() / batch.own_tokens
    metrics = {"loss": loss.item()}
    if settings.mtp_weight:
        loss = loss + settings.mtp_weight * mtp_loss(model, seen)
    return LossOutput(loss * weight, weight, metrics)


@torch.no_grad()
def merge_parameters(engine: Engine, teachers: Sequence[Transformer]) -> None:
    """The engine's model gets the mean of the teachers' weights."""
    states = [teacher.state_dict() for teacher in teachers]
    for name, tensor in engine.model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name].float() for state in states]).mean(0))
    engine.update_weights()
