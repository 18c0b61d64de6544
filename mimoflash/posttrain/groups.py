"""What GRPO and MOPD share: groups of rollouts of the same task, what they say of the policy, and steps on them."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer
from mimoflash.posttrain.batch import RolloutBatch, Sample, filter_empty
from mimoflash.posttrain.losses import Metrics, group_advantage
from mimoflash.posttrain.policy import score
from mimoflash.posttrain.rollout import Rollout, play_tasks
from mimoflash.text import Tokenizer
from mimoflash.train import LossOutput, Trainer
from mimoflash.train.settings import check_least
from mimoflash.world import Domain

Item = TypeVar("Item")
Group = list[Rollout]  # of one task
Log = Callable[[int, int, Metrics], None]  # of a step: its number, own tokens trained on so far, metrics


@dataclass(frozen=True)
class GroupSettings:
    """`steps` of: `groups` tasks (of each domain), each played `group_size` times, and `updates` optimizer steps on
    them at rate `lr`, on a part of the rollouts each. A turn has `max_tokens` at most, a task `max_turns`. No more than
    `micro_tokens` are in one forward pass. Tasks are taken from seed `first_task` on.

    Rollouts are drawn at temperature 1 from the whole vocabulary: there the policy that samples is the one trained.
    """

    steps: int
    lr: float
    groups: int = 8
    group_size: int = 8
    updates: int = 1
    max_tokens: int = 256
    max_turns: int = 4
    thinking: bool = True
    micro_tokens: int = 8192
    first_task: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, 1, "steps", "groups", "group_size", "updates", "max_tokens", "max_turns", "micro_tokens")
        check_least(self, 0, "first_task", "seed")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}: it must be above 0")


def play_groups(
    engine: Engine, domain: Domain, tasks: Iterator[int], settings: GroupSettings, step: int
) -> list[Group]:
    """The next `settings.groups` tasks, each played `group_size` times."""
    size = settings.group_size
    played = [task for task in islice(tasks, settings.groups) for _ in range(size)]
    seed = (settings.seed << 32) + step  # a task that comes again is played otherwise
    params = SamplingParams(max_tokens=settings.max_tokens, temperature=1.0, seed=seed)
    rollouts = play_tasks(
        engine, tokenizer_of(engine), domain, played, params, max_turns=settings.max_turns, thinking=settings.thinking
    )
    return [rollouts[start : start + size] for start in range(0, len(rollouts), size)]


def tokenizer_of(engine: Engine) -> Tokenizer:
    """Raises ValueError where the engine has none."""
    if engine.tokenizer is None:
        raise ValueError("tasks are played in text: give the engine a tokenizer, Engine(model, tokenizer)")
    return engine.tokenizer


def sound(group: Group) -> Group:
    """Without the rollouts that an environment broke, whose reward says nothing, and those without an own token."""
    return filter_empty([rollout for rollout in group if "error" not in rollout.info])


def has_signal(group: Group) -> bool:
    """Whether rewards differ: else no rollout of the task is better than another."""
    return any(rollout.reward != group[0].reward for rollout in group)


def samples_of(group: Group) -> list[Sample]:
    """Each rollout with its reward, normalised within the group."""
    if not group:
        return []
    outcome_N = group_advantage(torch.tensor([rollout.reward for rollout in group], dtype=torch.float64))
    return [Sample(rollout, outcome) for rollout, outcome in zip(group, outcome_N.tolist(), strict=True)]


def group_metrics(groups: Sequence[Group]) -> Metrics:
    """`dynsam/avg@n`: mean over tasks of the mean reward of its n rollouts. `dynsam/passrate/zero` and `/one`: the
    shares of tasks that none and that all of them pass (reward 1 or more). `env/broken`: the share of rollouts that an
    environment broke, which are not counted in the others. Those alone where nothing else is left."""
    rollouts = [rollout for group in groups for rollout in group]
    metrics = {"env/broken": sum("error" in rollout.info for rollout in rollouts) / len(rollouts)}
    rewards = [[rollout.reward for rollout in kept] for group in groups if (kept := sound(group))]
    if not rewards:
        return metrics
    rates = [sum(reward >= 1 for reward in group) / len(group) for group in rewards]
    return metrics | {
        "dynsam/avg@n": sum(sum(group) / len(group) for group in rewards) / len(rewards),
        "dynsam/passrate/zero": rates.count(0.0) / len(rates),
        "dynsam/passrate/one": rates.count(1.0) / len(rates),
    }


def make_trainer(model: Transformer) -> Trainer[Transformer]:
    """In the dtype that the model has. The experts' correction biases stay: a step on them would choose other experts
    than those that were sampled with."""
    return Trainer(model, weight_decay=0.0, dtype=model.lm_head.weight.dtype)


def deal(samples: Sequence[Sample], parts: int, seed: int) -> list[list[Sample]]:
    """Into `parts` of equal size but for one sample, by chance."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    return [shuffled[start::parts] for start in range(parts)]


def sampling_policy(model: Transformer, batches: Sequence[RolloutBatch], updates: int) -> Sequence[Tensor | None]:
    """The log-probabilities of the policy that sampled, before the first of several updates moves it. None for a single
    update: its own forward pass gives them."""
    return [None] * len(batches) if updates == 1 else score(model, batches, replay=True)


def update(
    trainer: Trainer[Transformer], parts: Sequence[Sequence[Item]],
    loss_fn: Callable[[Transformer, Item], LossOutput], lr: float,
) -> Metrics:
    """An optimizer step on each part that is not empty; the mean of their metrics, none where all are empty. Raises
    ValueError where the loss is no longer finite."""
    steps: list[Metrics] = []
    for items in filter(None, parts):
        try:
            metrics = trainer.step(items, loss_fn, lr)
        except FloatingPointError as error:
            raise ValueError(f"{error}; begin again from the last checkpoint with a lower lr than {lr}") from None
        metrics["actor/num_zeros_in_grad"] = metrics.pop("num_zeros")
        metrics["actor/grad_norm"] = metrics.pop("grad_norm")
        steps.append(metrics)
    return {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else {})}
