"""Playing tasks: what one rollout, one environment or one seed does, the others do not notice."""

import pytest
import torch

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer
from mimoflash.posttrain import play_tasks
from mimoflash.posttrain import rollout as rollout_module
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
        more = [{"role": "user", "content": "word " * self.longer[self.seed]}]
        return Step(observation=more, reward=1.0, done=False, info={})

    def close(self):
        self.closed.append(self)
        raise RuntimeError("an environment that breaks at its end")


class Domain:
    name = "talk"

    def __init__(self, longer):
        self.longer, self.closed = longer, []

    def environment(self):
        return Talk(self.longer, self.closed)


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["go word " * 20], 300)
    config = ModelConfig.tiny(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64, max_position_embeddings=512, initializer_range=0.1,
        num_nextn_predict_layers=1,
    )
    return Transformer(config).eval(), tokenizer


@pytest.fixture(scope="module")
def played(setting):
    model, tokenizer = setting
    engine = Engine(model, tokenizer)

    def play(longer, seeds, engine=engine, **more):
        domain = Domain(dict(zip(seeds, longer, strict=True)))
        params = SamplingParams(
            max_tokens=60, temperature=1.0, seed=1, logit_bias={tokenizer.special.im_end: 4.0}, **more
        )
        return play_tasks(engine, domain, seeds, params, max_turns=3), domain

    return play


def test_equal_tasks_are_played_differently(played):
    rollouts, _ = played([1] * 6, [5] * 6)
    assert len({tuple(r.tokens) for r in rollouts}) > 3
    again, _ = played([1] * 6, [5] * 6)
    assert [r.tokens for r in again] == [r.tokens for r in rollouts]


def test_a_rollout_that_outgrows_the_context_ends_alone_and_all_environments_close(played):
    rollouts, domain = played([1, 2000, 1, 1], [1, 2, 3, 4])
    assert "context" in rollouts[1].info["truncated"]
    assert rollouts[1].reward == 1.0  # what it has earned stays: it is no accident
    assert all(not r.info for i, r in enumerate(rollouts) if i != 1)
    assert len(domain.closed) == 4


def test_a_template_that_changes_what_was_said_costs_that_rollout_only(played, monkeypatch):
    render = rollout_module.render_chat

    def changing(tokenizer, messages, *rest, **more):
        text = render(tokenizer, messages, *rest, **more)
        return f"otherwise {text}" if messages[-1]["content"] == "word word " else text

    monkeypatch.setattr(rollout_module, "render_chat", changing)
    (one, other), _ = played([2, 1], [1, 2])
    assert "earlier turns otherwise" in one.info["error"]
    assert "error" not in other.info
    assert other.turns


@torch.no_grad()
def replayed(model, rollout):
    """Log-probabilities of the tokens after the first, by the routes that were recorded, as far as these go."""
    known = len(rollout.routes)
    tokens = torch.tensor([rollout.tokens[: known + 1]])
    logits = model(tokens[:, :-1], routes=rollout.routes[None].long())
    return logits[0].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("speculate", [0, 1])
def test_log_probabilities_and_routes_are_aligned_over_turns(setting, played, speculate):
    model, tokenizer = setting
    engine = Engine(model, tokenizer, speculate=speculate)
    rollouts, _ = played([1, 5, 20, 2], [1, 2, 3, 4], engine)
    assert engine.stats()["tokens_reused"] > 0
    assert sum(len(rollout.turns) == 3 for rollout in rollouts) >= 2
    for rollout in rollouts:
        own = [place for start, end in rollout.turns for place in range(start, end)]
        assert len(rollout.logprobs) == len(rollout.sampling_logprobs) == len(rollout.tokens)
        assert all((rollout.logprobs[i] < 0) == (i in own) for i in range(len(rollout.tokens)))
        assert all((rollout.sampling_logprobs[i] != 0) == (i in own) for i in range(len(rollout.tokens)))
        assert len(rollout.routes) == own[-1]  # the last token has not run
        want = replayed(model, rollout)
        assert [rollout.logprobs[i] for i in own] == pytest.approx([float(want[i - 1]) for i in own], abs=1e-4)
        biased = rollout.sampling_logprobs[own[0]]  # im_end is likelier in what it is sampled from
        assert biased != pytest.approx(rollout.logprobs[own[0]], abs=1e-3)


def test_routes_are_those_that_its_tokens_were_sampled_by(setting, played, monkeypatch):
    """What an earlier turn ran by stays, also where it has to run again, by other routes."""
    model, tokenizer = setting
    engine = Engine(model, tokenizer)
    answer, outputs = engine.answer, []

    async def forgetful(*args, **more):
        outputs.append(await answer(*args, **more))
        engine.update_weights()  # drops what is kept
        outputs[-1].routes += len(outputs)  # as if each turn had chosen other experts
        return outputs[-1]

    monkeypatch.setattr(engine, "answer", forgetful)
    (rollout,), _ = played([5], [3], engine)
    assert len(rollout.turns) > 1
    known = 0
    for output in outputs:
        assert output.cached_tokens == 0
        assert torch.equal(rollout.routes[known : len(output.routes)], output.routes[known:])
        known = len(output.routes)
    assert known == len(rollout.routes)
