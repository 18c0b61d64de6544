"""MOPD on tasks that are learnt in seconds."""

import copy
import dataclasses

import pytest
import torch
from small_world import CAPITALS, DIGITS, FEW_BITS, Log, Say, small_model, small_tokenizer
from torch.testing import assert_close

from mimoflash.engine import Engine
from mimoflash.posttrain import (
    GRPOSettings,
    ModelTeacher,
    MOPDSettings,
    make_batch,
    mopd,
    mopd_loss,
    score,
    token_logp,
    train_grpo,
    train_mopd,
    training,
)
from mimoflash.posttrain.groups import samples_of, sound
from mimoflash.text import Tokenizer

DOMAINS = {"digits": Say("go", DIGITS), "capitals": Say("word", CAPITALS)}
SHAPE = {"groups": 4, "group_size": 8, "max_tokens": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def teachers(tokenizer):
    """Trained from the same model as the student, each in its own domain."""
    taught = {}
    for name, domain in DOMAINS.items():
        model = small_model(initializer_range=0.1)
        train_grpo(Engine(model, tokenizer), {name: domain}, GRPOSettings(steps=14, lr=3e-3, **SHAPE), Log())
        taught[name] = ModelTeacher(model, tokenizer)
    return taught


def train(teachers, tokenizer, *, model=None, domains=DOMAINS, dtype=None, **changes):
    model, log = model or small_model(initializer_range=0.1), Log()
    settings = MOPDSettings(**{"steps": 1, "lr": 3e-3, "alpha": 0.0} | SHAPE | changes)
    train_mopd(Engine(model, tokenizer, dtype=dtype), domains, teachers, settings, log)
    return model, log


def test_the_student_becomes_both_teachers(teachers, tokenizer):
    """Without a reward of its own (alpha 0), and with a rollout engine in few bits."""
    _, log = train(teachers, tokenizer, steps=20, dtype=FEW_BITS, updates=2)
    for name in DOMAINS:
        assert log.mean(f"{name}/dynsam/avg@n", slice(0, 2)) < 0.4
        assert log.mean(f"{name}/dynsam/avg@n", slice(-3, None)) > 0.8
    assert log.mean("mopd/reverse_kl", slice(-3, None)) < 0.2 * log.mean("mopd/reverse_kl", slice(0, 1))
    assert all(metrics["train_infer_diff/kl"] > 0 for metrics in log)  # of few bits, and of a second update
    assert max(metrics["mopd/gated"] for metrics in log) > 0  # of both: the second update has moved on


def test_every_domain_has_the_same_share_of_the_loss(teachers, tokenizer, monkeypatch):
    """Also where most of its rollouts are lost, its answers are longer, and micro-batches are cut otherwise."""
    seen, played, groups_of = [], [], mopd.Training.groups

    def groups(training):
        played.append(groups_of(training))
        return played[-1]

    def update(training, parts, loss_fn, metrics):
        seen.append((parts, loss_fn))
        training.log(1, training.tokens, metrics)

    monkeypatch.setattr(mopd.Training, "groups", groups)
    monkeypatch.setattr(mopd.Training, "update", update)
    domains = DOMAINS | {"digits": Say("go", DIGITS, broken=lambda seed, answer: seed % 3 > 0)}
    model, log = train(teachers, tokenizer, domains=domains, alpha=0.5, micro_tokens=200)
    assert log[0]["digits/env/broken"] > 0
    assert log[0]["capitals/env/broken"] == 0
    (((items,), loss_fn),) = seen
    outs = [loss_fn(model, item) for item in items]
    got = sum(out.total for out in outs) / sum(out.weight for out in outs)

    settings, losses = MOPDSettings(steps=1, lr=1.0, alpha=0.5, **SHAPE), []
    for name in domains:
        batch = make_batch([s for each in played[0][name] for s in samples_of(sound(each))], model.config)
        logp_BT = token_logp(model, batch, replay=True)
        (teacher_logp_BT,) = score(teachers[name].model, [batch], replay=False)
        loss, _ = mopd_loss(
            logp_BT, logp_BT.detach(), batch.rollout_logp_BT, teacher_logp_BT, batch.outcome_B, batch.mask_BT,
            alpha=0.5, gate=settings.gate,
        )
        losses.append(loss)
    assert_close(got, sum(losses) / 2, rtol=1e-3, atol=1e-5)


def test_a_teacher_like_the_student_has_nothing_to_say(tokenizer, talker_like):
    """Both are scored by one and the same forward pass, in whatever the engine computes."""
    copies = {name: ModelTeacher(copy.deepcopy(talker_like), tokenizer) for name in DOMAINS}
    _, log = train(copies, tokenizer, model=talker_like, dtype=FEW_BITS)
    assert log[0]["mopd/reverse_kl"] == 0.0
    assert log[0]["loss"] == 0.0
    assert log[0]["train_infer_diff/kl"] > 0


@pytest.fixture
def talker_like():
    """Dense throughout: free routes would differ from the engine's."""
    return small_model(
        mlp_layer_types=("dense",) * 4, n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0
    )


def test_tasks_without_signal_teach_too(teachers, tokenizer):
    domains = {name: Say(domain.name, "") for name, domain in DOMAINS.items()}
    model, log = train(teachers, tokenizer, domains=domains)
    assert log[0]["dynsam/passrate/zero"] == 1.0
    assert log[0]["actor/grad_norm"] > 0
    assert not torch.equal(model.lm_head.weight, small_model(initializer_range=0.1).lm_head.weight)


def with_model(teacher, **changes):
    other = copy.copy(teacher.model)
    other.config = dataclasses.replace(other.config, **changes)
    return ModelTeacher(other, teacher.tokenizer)


def other_end(tokenizer):
    return Tokenizer(tokenizer.core, config=dict(tokenizer.config) | {"eos_token": "a"})


SPOILT = {
    "no teacher for capitals": lambda t, _: {"digits": t["digits"]},
    r"a teacher for maths, but the domains are capitals, digits": lambda t, _: t | {"maths": t["digits"]},
    "another tokenizer": lambda t, _: t | {"digits": ModelTeacher(t["digits"].model, small_tokenizer("other words"))},
    "a vocabulary of 128": lambda t, _: t | {"digits": with_model(t["digits"], vocab_size=128)},
    "ends its turns by": lambda t, _: t | {"digits": ModelTeacher(t["digits"].model, other_end(t["digits"].tokenizer))},
    r"digits ends its turns by tokens \[7,": lambda t, _: t | {"digits": with_model(t["digits"], eos_token_id=7)},
    "is the student": lambda t, student: t | {"digits": ModelTeacher(student, t["digits"].tokenizer)},
}


@pytest.mark.parametrize("message", SPOILT)
def test_teachers_that_do_not_fit_are_an_error_before_anything_starts(teachers, tokenizer, monkeypatch, message):
    monkeypatch.setattr(training, "make_trainer", lambda model: pytest.fail("it has started"))
    student = small_model(initializer_range=0.1)
    with pytest.raises(ValueError, match=message):
        train(SPOILT[message](teachers, student), tokenizer, model=student)


def test_no_domain_and_no_tokenizer_are_errors(teachers, tokenizer):
    with pytest.raises(ValueError, match="no domain"):
        train({}, tokenizer, domains={})
    with pytest.raises(ValueError, match="tokenizer"):
        train(teachers, None)


@pytest.mark.parametrize(("field", "value"), [("alpha", -0.1), ("gate", (1.1, 5.0)), ("gate", (0.2, 0.9)), ("lr", 0.0)])
def test_settings_that_cannot_be_are_named_for_mopd(field, value):
    with pytest.raises(ValueError, match=field):
        MOPDSettings(**{"steps": 1, "lr": 1e-3, "alpha": 0.0, field: value})
