"""Rollouts side by side: every tensor says of a token what the rollout said of it."""

import dataclasses
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_world import chats, small_model

from mimoflash.posttrain import Rollout, Sample, filter_empty, make_batch
from mimoflash.posttrain.batch import micro_batches


@pytest.fixture(scope="module")
def model():
    return small_model(initializer_range=0.1)


@pytest.fixture(scope="module")
def samples(model):
    return chats(model, temperature=0.7)


def test_what_stands_in_the_batch_is_what_was_played(model, samples):
    batch = make_batch(samples, model.config)
    assert max(len(sample.rollout.turns) for sample in samples) == 3
    for row, sample in enumerate(samples):
        rollout, end = sample.rollout, sample.rollout.turns[-1][1]
        start, prompt = int(batch.start_B[row]), int(batch.prompt_B[row])
        own = {place for begin, stop in rollout.turns for place in range(begin, stop)}
        assert batch.outcome_B[row] == sample.outcome
        assert (batch.mask_BT[row].nonzero()[:, 0] + start).tolist() == sorted(own)
        assert batch.prompts_GP[prompt, :start].tolist() == rollout.tokens[:start]
        assert batch.tokens_BT[row, : end - start].tolist() == rollout.tokens[start:end]
        assert batch.whole_row(row) == rollout.tokens[:end]
        for place in own:  # under the policy that sampled, at its temperature
            got = batch.rollout_logp_BT[row, place - start].item()
            assert got == pytest.approx(rollout.sampling_logprobs[place])
        assert torch.equal(batch.prompt_routes_GPMK[prompt, :start], rollout.routes[:start])
        assert torch.equal(batch.routes_BSMK[row, : end - 1 - start], rollout.routes[start:])
        assert not batch.rollout_logp_BT[row][batch.mask_BT[row] == 0].any()
        assert not batch.routes_BSMK[row, end - 1 - start :].any()
    longest = max(sample.length - int(start) for sample, start in zip(samples, batch.start_B, strict=True))
    assert batch.tokens_BT.shape[1] == longest
    assert batch.own_tokens == batch.mask_BT.sum()


def test_rollouts_of_a_task_share_their_prompt_and_nothing_of_their_answers(model):
    """As far as an MTP layer, which looks 1 + k tokens ahead, does not see what only one of them says."""
    samples = chats(model, tasks=[0, 1, 0, 0])
    batch = make_batch(samples, model.config)
    assert batch.prompt_B.tolist() == [0, 1, 0, 0]
    for sample, start in zip(samples, batch.start_B.tolist(), strict=True):
        assert start == sample.rollout.turns[0][0] - 1 - model.config.num_nextn_predict_layers


def test_prompts_that_ran_by_other_routes_are_not_shared(model):
    one, other = chats(model, tasks=[0, 0])
    other.rollout.routes[0] = (other.rollout.routes[0] + 1) % 8
    assert make_batch([one, other], model.config).prompt_B.tolist() == [0, 1]


def test_what_follows_the_last_turn_is_left_out(model, samples):
    """An environment may have the last word."""
    assert any(sample.length < len(sample.rollout.tokens) for sample in samples)
    assert all(len(make_batch([sample], model.config).whole_row(0)) == sample.length for sample in samples)


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(0, 3)), max_size=12), st.integers(1, 100))
def test_micro_batches_hold_every_sample_once_within_the_limit(lengths, limit):
    samples = [
        Sample(Rollout(seed, tokens=[task, task, *[9] * length], turns=[(2, 2 + length)]), 0.0)
        for seed, (length, task) in enumerate(lengths)
    ]
    parts = list(micro_batches(samples, limit))
    assert sorted(s.rollout.seed for part in parts for s in part) == list(range(len(lengths)))

    def padded(part):
        return 2 * len({s.rollout.tokens[0] for s in part}) + len(part) * max(s.length - 2 for s in part)

    for part in parts:
        assert len(part) == 1 or padded(part) <= limit
    for part, following in pairwise(parts):  # no room was left
        assert padded([*part, following[0]]) > limit
    tasks = [s.rollout.tokens[0] for part in parts for s in part]
    assert len([task for task, _ in groupby(tasks)]) == len(set(tasks))  # those of a task together


def test_filter_empty_keeps_what_has_a_token_of_the_model():
    kept = Rollout(1, tokens=[1, 2], turns=[(1, 2)])
    assert filter_empty([Rollout(0, tokens=[1, 2]), kept, Rollout(2, tokens=[1], turns=[(1, 1)])]) == [kept]


def with_dense_layer(routes):
    return torch.cat([routes[:, :1], routes], dim=1)


SPOILT = {
    "a place too few": (lambda r: {"routes": r.routes[:-1]}, r"routes \(.*places that ran"),
    "a place too many": (lambda r: {"routes": torch.cat([r.routes, r.routes[:1]])}, "has not run"),
    "the dense layer's too": (lambda r: {"routes": with_dense_layer(r.routes)}, "Dense layers have no routes"),
    "no such expert": (lambda r: {"routes": r.routes + 8}, "not among the 8"),
    "never filled in": (lambda r: {"routes": torch.zeros_like(r.routes)}, "names an expert twice"),
    "no own token": (lambda r: {"turns": []}, "no token of its own.*filter_empty"),
    "own turn empty": (lambda r: {"turns": [(1, 1)]}, "no token of its own"),
    "logprobs shifted": (lambda r: {"sampling_logprobs": r.sampling_logprobs[1:]}, "sampling_logprobs"),
    "turns in disorder": (lambda r: {"turns": r.turns[::-1]}, "follow each other"),
    "turns behind the end": (lambda r: {"tokens": r.tokens[:9], "sampling_logprobs": [0.0] * 9}, "follow each other"),
    "no prompt": (lambda r: {"turns": [(0, r.turns[-1][1])]}, "a prompt comes before"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_rollout_that_does_not_fit_is_an_error(model, samples, name):
    spoil, message = SPOILT[name]
    whole = max((sample.rollout for sample in samples), key=lambda rollout: len(rollout.turns))
    assert len(whole.turns) > 1
    spoilt = dataclasses.replace(whole, **spoil(whole))
    with pytest.raises(ValueError, match=message):
        make_batch([samples[0], Sample(spoilt, 0.0)], model.config)
