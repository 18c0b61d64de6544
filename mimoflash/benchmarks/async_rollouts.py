"""Training beside rollouts against training after them, where environments take their time: steps a minute, in turn.

    python -m mimoflash.benchmarks.async_rollouts [pairs]
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mimoflash.benchmarks.pairs import compare, described, machine, run_in_turn
from mimoflash.config import ModelConfig
from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.posttrain.grpo import GRPOSettings, train_grpo
from mimoflash.posttrain.rollout import Rollout, Task
from mimoflash.posttrain.scheduler import LocalPlayer
from mimoflash.text import Tokenizer, train_tokenizer
from mimoflash.world import Message
from mimoflash.world.protocol import Demonstration, Step

STEPS = 8  # of a run; the first are not measured: beside training they have more to play than they take
UNMEASURED = 3
TURNS = 3
SETTINGS = GRPOSettings(
    steps=STEPS, lr=1e-6, groups=4, group_size=4, max_tokens=64, max_turns=TURNS, timeout=60.0, micro_tokens=1024
)
VOCABULARY = 512


class Waiting:
    """Three turns, of which each answer comes after 0.1 to 1 s; the reward is drawn by chance."""

    name, chance = "waiting", 0.5

    def __init__(self, waits: list[float]):
        self.waits, self.turns, self.waited = waits, 0, 0.0  # `waits`: of all rollouts that have come to their end

    def environment(self) -> "Waiting":
        return Waiting(self.waits)

    def reset(self, seed: int) -> tuple[list[Message], list[Any]]:
        self.turns, self.waited = 0, 0.0
        return [{"role": "user", "content": f"What comes after {seed}?"}], []

    def step(self, message: Message) -> Step:
        seconds = random.uniform(0.1, 1.0)
        time.sleep(seconds)
        self.turns, self.waited = self.turns + 1, self.waited + seconds
        if self.turns == TURNS:
            self.waits.append(self.waited)
        return Step([{"role": "user", "content": "And then?"}], float(random.random() < 0.5), self.turns == TURNS, {})

    def close(self) -> None:
        pass

    def demonstration(self, seed: int) -> Demonstration:
        raise NotImplementedError


class _Brief(LocalPlayer):
    """A model with random weights comes to an end of its turns."""

    async def play(self, task: Task) -> Rollout:
        assert self.engine.tokenizer is not None
        special = self.engine.tokenizer.special
        assert special.im_end is not None
        never = [token for token in (special.think, special.end_think) if token is not None]
        bias = {special.im_end: 4.0} | dict.fromkeys(never, -float("inf"))
        return await super().play(replace(task, params=replace(task.params, logit_bias=bias)))


def measure(staleness: int, pair: int) -> dict[str, Any]:
    """Steps a minute of one run."""
    torch.manual_seed(pair)
    random.seed(pair)
    tokenizer, waits, ends = _tokenizer(), list[float](), list[float]()
    metrics_of: list[Mapping[str, float]] = []
    engine = Engine(Transformer(_config()), tokenizer)
    domains = {"waiting": Waiting(waits)}

    def log(step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        ends.append(time.monotonic())
        metrics_of.append(metrics)

    train_grpo(engine, domains, replace(SETTINGS, max_staleness=staleness), log, player=_Brief(engine, domains))
    engine.close()
    return {
        "rate": 60 * (STEPS - UNMEASURED) / (ends[-1] - ends[UNMEASURED - 1]),
        "update": statistics.median(metrics["seconds/update"] for metrics in metrics_of[UNMEASURED:]),
        "wait": statistics.mean(waits),
    }


def bench_async_rollouts(pairs: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Steps a minute with `max_staleness` 1 and 2 against none, `pairs` times each."""
    results = []
    for staleness in (1, 2):
        say(f"max_staleness {staleness} against synchronous")
        sides = {"ours": partial(measure, staleness), "peer": partial(measure, 0)}
        done = run_in_turn(sides, pairs, say, "steps/min")
        result = compare(done["ours"], done["peer"]) | {"unit": "steps/min", "machine": machine()}
        update, beside, wait = (
            statistics.median(one[name] for one in done[side])
            for side, name in (("peer", "update"), ("ours", "update"), ("ours", "wait"))
        )
        say(described(result, "synchronous"))
        say(f"  a rollout waits {wait:.2f} s on average; a training step takes {update:.2f} s, {beside:.2f} s beside")
        results.append(result | {"update": update, "update_beside": beside, "wait": wait, "runs": done})
    return results


def _config() -> ModelConfig:
    return ModelConfig.tiny(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, moe_intermediate_size=512, head_dim=48,
        v_head_dim=48, num_attention_heads=8, num_key_value_heads=2, sliding_window=32,
    )


def _tokenizer() -> Tokenizer:
    return train_tokenizer(["What comes after 0123456789? And then? You are a helpful assistant.\n" * 20], 300)


if __name__ == "__main__":
    bench_async_rollouts(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
