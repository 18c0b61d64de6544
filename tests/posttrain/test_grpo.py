"""GRPO on tasks that are learnt in seconds."""

import copy

import pytest
import torch
from small_world import CAPITALS, DIGITS, FEW_BITS, Log, Say, small_model, small_tokenizer
from torch.testing import assert_close

from mimoflash.checkpoint import load_delta
from mimoflash.engine import Engine
from mimoflash.posttrain import GRPOSettings, Rollout, train_grpo
from mimoflash.posttrain.groups import deal, group_metrics, has_signal, samples_of, sound

KL, FAR, AVERAGE = "train_infer_diff/kl", "F(tau=2)", "dynsam/avg@n"


def train(domain, *, dtype=None, model=None, **changes):
    model = model or small_model()
    log, settings = Log(), {"steps": 1, "lr": 3e-3, "groups": 4, "group_size": 8, "max_tokens": 4} | changes
    train_grpo(Engine(model, small_tokenizer(), dtype=dtype), {domain.name: domain}, GRPOSettings(**settings), log)
    return model, log


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_reward_rises():
    _, log = train(Say("a", DIGITS), steps=22)
    assert log.mean(AVERAGE, slice(0, 3)) < 0.4
    assert log.mean(AVERAGE, slice(-3, None)) > 0.7
    drift = [metrics[KL] for metrics in log if KL in metrics]
    assert max(drift) < 1e-6  # rollouts are drawn from what is trained: temperature 1, nothing cut
    assert all(metrics[FAR] == 0 for metrics in log if FAR in metrics)
    assert [m["tokens"] for m in log] == sorted(m["tokens"] for m in log)
    assert all(m["actor/num_zeros_in_grad"] > 0 and m["actor/grad_norm"] > 0 for m in log if KL in m)


def test_the_reward_rises_with_an_engine_in_few_bits_and_several_updates():
    """The engine takes over the weights after each step, or the drift would grow."""
    _, log = train(Say("a", DIGITS), dtype=FEW_BITS, steps=16, updates=2, lr=5e-3, micro_tokens=200)
    assert log.mean(AVERAGE, slice(-3, None)) > log.mean(AVERAGE, slice(0, 3)) + 0.3
    drift = [metrics[KL] for metrics in log if KL in metrics]
    assert min(drift) > 0
    assert max(drift) < 1e-3
    assert max(metrics["actor/clipped"] for metrics in log if KL in metrics) > 0  # the second update moves on


@pytest.mark.parametrize(("wanted", "rate"), [("", "zero"), ([""], "one")])
def test_without_signal_nothing_changes(wanted, rate):
    model = small_model()
    before = weights(model)
    _, log = train(Say("a", wanted), model=model, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert all(metrics[f"dynsam/passrate/{rate}"] == 1.0 for metrics in log)
    assert all(KL not in metrics for metrics in log)


def test_a_broken_environment_costs_its_own_rollouts():
    _, log = train(Say("a", DIGITS, broken=lambda seed, answer: seed % 2 == 0), groups=8)
    assert 0 < log[0]["env/broken"] < 1
    assert log[0]["actor/grad_norm"] > 0
    with pytest.raises(ValueError, match="a: its environment broke every rollout; the first by RuntimeError: the env"):
        train(Say("a", DIGITS, broken=lambda seed, answer: True))


def test_a_rollout_that_an_environment_broke_is_no_worse_than_others():
    _, log = train(Say("a", [""], broken=lambda seed, answer: len(answer.encode()) % 2))
    assert 0 < log[0]["env/broken"] < 1
    assert log[0]["dynsam/passrate/one"] == 1.0
    assert KL not in log[0]


def test_micro_batches_do_not_change_a_step():
    (whole, one), (cut, many) = (train(Say("a", DIGITS), max_tokens=24, micro_tokens=n) for n in (10**6, 1000))
    assert one[0]["actor/grad_norm"] == pytest.approx(many[0]["actor/grad_norm"], rel=1e-4)
    assert one[0]["loss"] == pytest.approx(many[0]["loss"], abs=1e-5)
    for name, tensor in weights(cut).items():  # a gradient of nearly 0 may fall on the other side of it
        assert (tensor - whole.state_dict()[name]).abs().mean() < 1e-5


def test_adapters_are_trained_and_merged_at_the_end(tmp_path):
    """The frozen weights and what the file adds to them are the teacher."""
    model = small_model()
    base = copy.deepcopy(model)
    settings = GRPOSettings(steps=22, lr=2e-2, groups=8, group_size=8, max_tokens=4, lora_rank=8)
    log, domains = Log(), {"a": Say("a", DIGITS)}
    train_grpo(Engine(model, small_tokenizer()), domains, settings, log, folder=tmp_path)
    assert log.mean(AVERAGE, slice(-3, None)) > log.mean(AVERAGE, slice(0, 3)) + 0.2
    trained = weights(model)
    assert trained.keys() == weights(base).keys()
    assert torch.equal(trained["lm_head.weight"], base.lm_head.weight)
    assert not torch.equal(trained["model.layers.0.self_attn.q_proj.weight"], weights(base)[
        "model.layers.0.self_attn.q_proj.weight"])
    load_delta(tmp_path / "lora.safetensors", base)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(base).items())


def test_the_experts_correction_biases_stay():
    model = small_model()
    biases = {name: tensor for name, tensor in weights(model).items() if "e_score_correction_bias" in name}
    train(Say("a", DIGITS), model=model)
    assert len(biases) == 3
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in biases.items())


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="lower lr"):
        train(Say("a", DIGITS), steps=5, lr=1e20)


def test_an_engine_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="tokenizer"):
        train_grpo(Engine(small_model()), {"a": Say("a", CAPITALS)}, GRPOSettings(steps=1, lr=1e-3), Log())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("groups", 0), ("group_size", 1), ("updates", 0), ("max_tokens", 0), ("max_turns", 0),
        ("micro_tokens", 0), ("lr", 0.0), ("first_task", -1), ("seed", -1), ("clip", (0.0, 0.2)), ("clip", (1.0, 0.2)),
        ("clip", (0.2, 0.0)), ("truncation", 0.9),
    ],
)
def test_settings_that_cannot_be_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        GRPOSettings(**{"steps": 1, "lr": 1e-3, field: value})


def group(*rewards):
    """None: the environment broke."""
    info = [{"error": "broken"} if reward is None else {} for reward in rewards]
    return [
        Rollout(0, tokens=[1, 2], turns=[(1, 2)], reward=reward or 0.0, info=each)
        for reward, each in zip(rewards, info, strict=True)
    ]


def test_metrics_of_groups():
    groups = [group(1.0, 0.0, 0.0, 0.0), group(0.0, 0.5), group(1.0, None), group(None, None), group(1.0, 1.0)]
    assert group_metrics(groups) == {
        "env/broken": pytest.approx(3 / 12),
        AVERAGE: pytest.approx((0.25 + 0.25 + 1 + 1) / 4),
        "dynsam/passrate/zero": pytest.approx(1 / 4),
        "dynsam/passrate/one": pytest.approx(2 / 4),
    }


def test_what_a_group_teaches():
    assert not has_signal(group(1.0, 1.0))
    assert not has_signal([])
    assert has_signal(group(0.0, 0.5))
    assert not has_signal(sound(group(1.0, None, 1.0)))
    assert sound([Rollout(0, tokens=[1])]) == []
    outcomes = [sample.outcome for sample in samples_of(sound(group(1.0, None, 0.0)))]
    assert_close(outcomes, [1.0, -1.0], atol=1e-5, rtol=0)


def test_samples_are_dealt_once():
    samples = samples_of(group(*range(11)))
    parts = deal(samples, 4, seed=1)
    assert sorted(len(part) for part in parts) == [2, 3, 3, 3]
    assert sorted(s.rollout.reward for part in parts for s in part) == list(range(11))
    assert deal([], 2, seed=1) == [[], []]
