"""Groups of rollouts of the same task: what they say of the policy, and what a step learns from."""

import random
from collections.abc import Mapping, Sequence

import torch

from mimoflash.posttrain.batch import Sample, filter_empty
from mimoflash.posttrain.losses import Metrics, group_advantage
from mimoflash.posttrain.rollout import Rollout
from mimoflash.posttrain.scheduler import Group


def sound(group: Group) -> Group:
    """Without the rollouts that an environment broke, whose reward says nothing, and those without an own token."""
    return filter_empty([rollout for rollout in group if "error" not in rollout.info])


def check_not_all_broken(rollouts: Sequence[Rollout], name: str) -> None:
    """Raises ValueError, with what the first one said, where the domain's environment broke them all."""
    if rollouts and all("error" in rollout.info for rollout in rollouts):
        raise ValueError(f"{name}: its environment broke every rollout; the first by {rollouts[0].info['error']}")


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


def domain_metrics(groups: Mapping[str, Sequence[Group]]) -> Metrics:
    """`group_metrics` of all domains together, and where there are several, of each under its name."""
    metrics = group_metrics([group for each in groups.values() for group in each])
    if len(groups) > 1:
        for name, each in groups.items():
            metrics |= {f"{name}/{metric}": value for metric, value in group_metrics(each).items()}
    return metrics


def deal(samples: Sequence[Sample], parts: int, seed: int) -> list[list[Sample]]:
    """Into `parts` of equal size but for one sample, by chance."""
    shuffled = random.Random(seed).sample(samples, len(samples))
    return [shuffled[start::parts] for start in range(parts)]
