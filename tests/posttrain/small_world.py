"""Domains that are learnt in seconds, and a model with random weights to learn them."""

import functools
import itertools
import math

import torch

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, SamplingParams
from mimoflash.kernels import native
from mimoflash.model import Transformer
from mimoflash.posttrain import Sample, play_tasks
from mimoflash.text import train_tokenizer
from mimoflash.world.protocol import Step

FEW_BITS = "int8" if native.available() else "bf16"
DIGITS, CAPITALS = "0123456789", "ABCDEFGHIJ"


class Say:
    """One turn: right if the answer has one of the `wanted` words. It fails where `broken(seed, answer)`."""

    chance = 0.1

    def __init__(self, word, wanted, broken=lambda seed, answer: False):
        self.name, self.wanted, self.broken, self.seed = word, wanted, broken, 0

    def environment(self):
        return Say(self.name, self.wanted, self.broken)

    def reset(self, seed):
        self.seed = seed
        return [{"role": "user", "content": f"{self.name} {seed}"}], []

    def step(self, message):
        if self.broken(self.seed, message["content"]):
            raise RuntimeError("the environment breaks")
        return Step([], float(any(word in message["content"] for word in self.wanted)), True, {})

    def close(self):
        pass


class Chat(Say):
    """Three turns; what the user says in between is not the model's."""

    def environment(self):
        return Chat(self.name, self.wanted, self.broken)

    def step(self, message):
        more = [{"role": "user", "content": "go word " * (1 + self.seed % 3)}]
        return Step(more, 1.0, False, {})


@functools.cache
def small_tokenizer(words="go word"):
    """What every prompt begins with takes few tokens in it."""
    return train_tokenizer([f"system\nYou are a helpful assistant.user\n{words} assistant\n" * 20], 300)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    vocabulary = -(-small_tokenizer().vocab_size // 64) * 64
    return Transformer(ModelConfig.tiny(vocab_size=vocabulary, max_position_embeddings=512, **changes))


def chats(model, *, tasks=range(5), dtype=None, temperature=1.0, max_tokens=12):
    """Samples of several turns and lengths, with some outcome."""
    tokenizer = small_tokenizer()
    special = tokenizer.special
    # no reasoning: it would not be shown again after a user's turn
    bias = {special.im_end: 3.0, special.think: -math.inf, special.end_think: -math.inf}
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=1, logit_bias=bias)
    engine = Engine(model, tokenizer, dtype=dtype)
    rollouts = play_tasks(engine, Chat("go", ""), tasks, params, max_turns=3)
    return [Sample(rollout, outcome) for rollout, outcome in zip(rollouts, itertools.cycle([1.0, -1.0]), strict=False)]


class Log(list):
    """The metrics of each step."""

    def __call__(self, step, tokens, metrics):
        assert step == len(self) + 1
        self.append({"tokens": tokens} | metrics)

    def mean(self, name, steps):
        return sum(metrics[name] for metrics in self[steps]) / len(self[steps])
