"""Log-probabilities of rollouts: exact, by the routes that were sampled with, and never of more than is needed."""

import copy
import dataclasses

import pytest
import torch
from small_world import FEW_BITS, chats, small_model
from torch.testing import assert_close

from mimoflash.model.moe import Router
from mimoflash.posttrain import make_batch, score, token_logp
from mimoflash.posttrain.batch import micro_batches


@pytest.fixture(scope="module")
def model():
    return small_model(initializer_range=0.1)


@pytest.fixture(scope="module")
def samples(model):
    """Some of the same task, so that they share its prompt."""
    return chats(model, tasks=[0, 1, 2, 0, 3, 0])


def whole(batch, row, values_BT):
    """What a row's tensor says of a rollout's tokens, zeros for the prompt that is held apart."""
    start = int(batch.start_B[row])
    return torch.cat([values_BT.new_zeros(start), values_BT[row]])


@pytest.fixture(scope="module")
def batch(model, samples):
    return make_batch(samples, model.config)


@torch.no_grad()
@pytest.mark.parametrize("replay", [True, False])
def test_each_token_has_its_log_probability_at_temperature_1(model, samples, batch, replay):
    got = token_logp(model, batch, replay=replay)
    exact = copy.deepcopy(model).double()
    for row, sample in enumerate(samples):
        tokens = torch.tensor([sample.rollout.tokens])
        routes = sample.rollout.routes[None].long() if replay else None
        probabilities = exact(tokens[:, : sample.length - 1], routes=routes)[0].softmax(-1)
        for place, logp in enumerate(whole(batch, row, got).tolist()):
            own = any(start <= place < end for start, end in sample.rollout.turns)
            want = probabilities[place - 1, tokens[0, place]].log().item() if own else 0.0
            assert logp == pytest.approx(want, abs=1e-4)


@torch.no_grad()
def test_over_several_turns_it_is_what_the_engine_said(model, samples, batch):
    got = token_logp(model, batch, replay=True)
    for row, sample in enumerate(samples):
        want = torch.tensor(sample.rollout.logprobs[: sample.length])
        assert_close(whole(batch, row, got)[: sample.length], want, atol=1e-4, rtol=0)


def test_it_does_not_depend_on_what_is_scored_beside_it(model, samples, batch):
    together = token_logp(model, batch, replay=True)
    parts = list(micro_batches(samples, 150))
    assert len(parts) > 1
    batches = [make_batch(part, model.config) for part in parts]
    for part, each, logp_BT in zip(parts, batches, score(model, batches, replay=True), strict=True):
        assert not logp_BT.requires_grad
        for row, sample in enumerate(part):
            want = whole(batch, samples.index(sample), together.detach())
            assert_close(whole(each, row, logp_BT)[: sample.length], want[: sample.length])


def test_shared_prompts_have_the_gradient_of_all_that_go_on_from_them(model, samples, batch):
    def gradient(batches):
        model.zero_grad()
        sum((token_logp(model, each, replay=True) * each.outcome_B[:, None]).sum() for each in batches).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert len(batch.prompts_GP) < len(samples)
    apart = gradient([make_batch([sample], model.config) for sample in samples])
    for name, grad in gradient([batch]).items():
        assert_close(grad, apart[name], rtol=1e-3, atol=1e-5)


def test_the_head_is_asked_about_own_tokens_only(model, batch):
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[:-1].numel()))
    token_logp(model, batch, replay=True)
    handle.remove()
    assert rows == [batch.own_tokens]


def elsewhere(batch, experts=8):
    """The batch with other routes than a router would choose."""

    def others(routes):
        return torch.rand(*routes.shape[:3], experts).topk(routes.shape[3], dim=-1).indices

    return dataclasses.replace(
        batch, routes_BSMK=others(batch.routes_BSMK), prompt_routes_GPMK=others(batch.prompt_routes_GPMK)
    )


def test_every_replayed_expert_has_a_gradient(model, batch):
    """Scores looked up among those of the top k would be 0 for an expert that is not of them."""
    replayed = elsewhere(batch)
    model.zero_grad()
    token_logp(model, replayed, replay=True).sum().backward()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert len(routers) == replayed.routes_BSMK.shape[2]
    for router in routers:
        assert (router.weight.grad.abs().sum(-1) > 0).all()
    model.zero_grad()


@torch.no_grad()
def test_a_replayed_score_is_not_taken_from_the_biased_one(model, batch):
    """Biased minus bias is 0 where the bias is large."""
    biased = copy.deepcopy(model)
    for module in biased.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias.uniform_(1e8, 2e8)
    assert torch.equal(token_logp(biased, batch, replay=True), token_logp(model, batch, replay=True))


@pytest.mark.parametrize("spoil", ["another layer's", "free choice"])
def test_a_route_that_is_not_replayed_in_its_layer_is_noticed(model, batch, monkeypatch, spoil):
    """As where the dense first layer is counted among those with routes, or where they are not handed on."""
    trunk = model.trunk
    given = {"another layer's": lambda routes: routes.roll(1, dims=2), "free choice": lambda routes: None}[spoil]
    monkeypatch.setattr(model, "trunk", lambda *args, routes, **more: trunk(*args, routes=given(routes), **more))
    with pytest.raises(AssertionError, match="replayed"):
        token_logp(model, elsewhere(batch), replay=True)


@torch.no_grad()
def test_a_teacher_routes_freely(model, batch):
    free, other = token_logp(model, batch, replay=False), token_logp(model, elsewhere(batch), replay=False)
    assert torch.equal(free, other)
    assert not torch.equal(free, token_logp(model, elsewhere(batch), replay=True))


@torch.no_grad()
@pytest.mark.parametrize("dtype", sorted({"bf16", FEW_BITS}))
def test_replay_keeps_the_trainer_near_the_engine(model, dtype):
    """Rollout in few bits, training in float32."""
    samples = chats(model, tasks=range(16), dtype=dtype, max_tokens=20)
    batch = make_batch(samples, model.config)
    own_BT = batch.mask_BT > 0
    engine_N = torch.tensor([r.logprobs[place] for r in (s.rollout for s in samples) for place in own_places(r)])

    def differing(replay):
        count = 0
        for rollout in (sample.rollout for sample in samples):
            tokens, routes = torch.tensor([rollout.tokens[: len(rollout.routes)]]), rollout.routes[None].long()
            got = model.trunk(tokens, routes=routes if replay else None).routes
            count += int((got.sort(-1).values != routes.sort(-1).values).any(-1).sum())
        return count

    def gap(replay):
        return (token_logp(model, batch, replay=replay)[own_BT] - engine_N).abs().mean().item()

    assert differing(replay=False) > 0
    assert differing(replay=True) == 0
    assert gap(replay=True) < 0.8 * gap(replay=False)


def own_places(rollout):
    return [place for start, end in rollout.turns for place in range(start, end)]
