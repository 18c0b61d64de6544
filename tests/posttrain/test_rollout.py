"""Playing tasks: what one rollout, one environment or one seed does, the others do not notice."""

import pytest
import torch

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer
from mimoflash.posttrain import play_tasks
from mimoflash.text import train_tokenizer
from mimoflash.world.protocol import Step


class Talk:
    """Answers every message with more text, `longer[seed]` words of it."""

    def __init__(self, longer, closed):
        self.longer, self.closed = longer, closed

    def environment(self):
        return self

    def reset(self, seed):
        self.seed = seed
        return [{"role": "user", "content": "go"}], []

    def step(self, message):
        more = [{"role": "user", "content": "word " * self.longer}]
        return Step(observation=more, reward=1.0, done=False, info={})

    def close(self):
        self.closed.append(self)
        raise RuntimeError("an environment that breaks at its end")


class Domain:
    def __init__(self, longer):
        self.longer, self.closed = iter(longer), []

    def environment(self):
        return Talk(next(self.longer), self.closed)


@pytest.fixture(scope="module")
def played():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["go word " * 20], 300)
    config = ModelConfig.tiny(vocab_size=-(-tokenizer.vocab_size // 64) * 64, max_position_embeddings=512)
    model = Transformer(config).eval()

    engine = Engine(model, tokenizer)

    def play(longer, seeds):
        domain = Domain(longer)
        params = SamplingParams(
            max_tokens=60, temperature=1.0, seed=1, logit_bias={tokenizer.special.im_end: 4.0}
        )
        return play_tasks(engine, tokenizer, domain, seeds, params, max_turns=3), domain

    return play


def test_equal_tasks_are_played_differently(played):
    rollouts, _ = played([1] * 6, [5] * 6)
    assert len({tuple(r.tokens) for r in rollouts}) > 3
    again, _ = played([1] * 6, [5] * 6)
    assert [r.tokens for r in again] == [r.tokens for r in rollouts]


def test_a_rollout_that_outgrows_the_context_ends_alone_and_all_environments_close(played):
    rollouts, domain = played([1, 2000, 1, 1], [1, 2, 3, 4])
    assert "context" in rollouts[1].info["error"]
    assert all("error" not in r.info for i, r in enumerate(rollouts) if i != 1)
    assert len(domain.closed) == 4
