"""A player without a model, and what a training loop does with the scheduler."""

import asyncio
import random
import time

from small_world import Say

from mimoflash.engine import SamplingParams
from mimoflash.posttrain.rollout import Rollout
from mimoflash.posttrain.scheduler import DataScheduler, Source

MODEL = object()  # a fake player takes any


class FakePlayer:
    """Three turns of random length. A rollout's info says what it was played for and which weights sampled it. `fails`
    says whether an environment breaks in the task's attempt; while weights are exchanged, some play with old ones."""

    def __init__(self, delays=None, longest=0.004, fails=lambda task: False):
        self.delays, self.longest, self.fails = delays or random.Random(0), longest, fails
        self.version, self.running = -1, 0  # 0 with the first weights
        self.begun, self.finished, self.first_version = [], [], {}

    async def play(self, task):
        self.begun.append(task)
        self.first_version.setdefault((task.domain, task.seed), self.version)
        self.running += 1
        try:
            sampled_by = [self.version]
            for _ in range(3):
                await asyncio.sleep(self.delays.uniform(0, self.longest))
                sampled_by.append(self.version)
        finally:
            self.running -= 1
        self.finished.append(task)
        error = {"error": "broken"} if self.fails(task) else {}
        return Rollout(task.seed, info={"for": task.params.seed, "sampled_by": sampled_by} | error)

    async def update(self, model):
        await asyncio.sleep(self.delays.uniform(0, 0.004))
        self.version += 1
        await asyncio.sleep(self.delays.uniform(0, 0.004))


def source(name="go", groups=2, **changes):
    settings = {"max_turns": 3, "thinking": False, "timeout": None, "priority": 0} | changes
    return Source(Say(name, ""), groups, SamplingParams(), **settings)


def steps_of(player, sources, *, steps=6, group_size=2, pause=0.0, **changes):
    """Each step's groups by source, all steps."""
    scheduler = DataScheduler(player, sources, steps=steps, group_size=group_size, seed=5, **changes)
    taken = []
    with scheduler:
        scheduler.begin(MODEL)
        for step in range(steps):
            assert scheduler.version == player.version == step
            taken.append(scheduler.take())
            time.sleep(pause)
            scheduler.update(MODEL)
    return taken, scheduler


def rollouts_of(step):
    return [rollout for groups in step.values() for group in groups for rollout in group]
