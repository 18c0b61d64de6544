"""Losses and their gradients against the formulas, in float64 and token by token."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.posttrain.losses import (
    group_advantage,
    grpo_loss,
    mopd_loss,
    reverse_kl_loss,
    rollout_drift,
    topk_reverse_kl_loss,
)

GATE, CLIP, TRUNCATION = (0.5, 2.0), (0.2, 0.28), 2.0


@dataclass
class Case:
    """Lists of float64 values: [sequence][token]; None stands outside of the mask."""

    logp: list
    old: list
    rollout: list
    teacher: list
    outcome: list
    alpha: float

    @property
    def mask(self):
        return [[0.0 if value is None else 1.0 for value in row] for row in self.logp]

    def tensor(self, rows, junk):
        return torch.tensor([[junk if value is None else value for value in row] for row in rows])

    def tensors(self, junk):
        """`junk`: what stands outside of the mask in all but the trained model's, which are always numbers."""
        return {
            "logp_BT": self.tensor(self.logp, -3.0).requires_grad_(),
            "old_logp_BT": self.tensor(self.old, junk),
            "rollout_logp_BT": self.tensor(self.rollout, junk),
            "mask_BT": torch.tensor(self.mask),
        }

    def places(self):
        return [(b, t) for b, row in enumerate(self.mask) for t, own in enumerate(row) if own]


@st.composite
def cases(draw):
    """Ratios on both sides of gate and clip but never on them; one to three teachers, each with its sequences."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    teachers = draw(st.integers(1, 3))
    case = Case([], [], [], [], [], draw(st.sampled_from([0.0, 0.3, 1.0])))
    for b in range(rows):
        own = draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any))
        numbers = st.lists(st.floats(-6, -0.05), min_size=length, max_size=length)
        jump = st.sampled_from([-3.0, -0.9, -0.5, -0.1, 0.0, 0.1, 0.6, 1.1, 3.0])
        jumps = st.lists(jump, min_size=length, max_size=length)
        old = draw(numbers)
        sharpness = 1 + b % teachers
        case.old.append([x if o else None for x, o in zip(old, own, strict=True)])
        case.logp.append([x + j if o else None for x, j, o in zip(old, draw(jumps), own, strict=True)])
        case.rollout.append([x - j if o else None for x, j, o in zip(old, draw(jumps), own, strict=True)])
        case.teacher.append([x / sharpness if o else None for x, o in zip(draw(numbers), own, strict=True)])
        case.outcome.append(draw(st.sampled_from([-1.5, -0.2, 0.0, 0.7, 2.0])))
    return case


def mopd_formula(case):
    """SPEC: -E[1/|y| sum_t w_t A_t log pi(y_t)], and its derivative by each log pi(y_t)."""
    loss, grad, gated = 0.0, torch.zeros(len(case.logp), len(case.logp[0]), dtype=torch.float64), 0
    for b, t in case.places():
        ratio = math.exp(case.old[b][t] - case.rollout[b][t])
        weight = ratio if GATE[0] <= ratio <= GATE[1] else 0.0
        gated += weight == 0.0
        advantage = case.teacher[b][t] - case.old[b][t] + case.alpha * case.outcome[b]
        share = 1 / sum(case.mask[b]) / len(case.logp)
        loss -= share * weight * advantage * case.logp[b][t]
        grad[b, t] = -share * weight * advantage
    return loss, grad, gated / len(case.places())


def grpo_formula(case):
    loss, grad, clipped = 0.0, torch.zeros(len(case.logp), len(case.logp[0]), dtype=torch.float64), 0
    for b, t in case.places():
        advantage = case.outcome[b]
        ratio = math.exp(case.logp[b][t] - case.old[b][t])
        weight = min(math.exp(case.old[b][t] - case.rollout[b][t]), TRUNCATION)
        is_clipped = (advantage > 0 and ratio > 1 + CLIP[1]) or (advantage < 0 and ratio < 1 - CLIP[0])
        bound = 1 + CLIP[1] if advantage > 0 else 1 - CLIP[0]
        share = weight / len(case.places())
        loss -= share * advantage * (bound if is_clipped else ratio)
        grad[b, t] = 0.0 if is_clipped else -share * advantage * ratio
        clipped += is_clipped
    return loss, grad, clipped / len(case.places())


@given(cases(), st.sampled_from([math.nan, 0.0]))
def test_mopd_loss_is_the_formula(case, junk):
    tensors = case.tensors(junk)
    teacher, outcome = case.tensor(case.teacher, math.nan), torch.tensor(case.outcome)
    loss, metrics = mopd_loss(**tensors, teacher_logp_BT=teacher, outcome_B=outcome, alpha=case.alpha, gate=GATE)
    loss.backward()
    want, grad, gated = mopd_formula(case)
    assert loss.item() == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert_close(tensors["logp_BT"].grad.double(), grad, rtol=1e-4, atol=1e-5)
    assert metrics == {"mopd/gated": pytest.approx(gated)}


@given(cases(), st.sampled_from([math.nan, 0.0]))
def test_grpo_loss_is_the_formula(case, junk):
    tensors = case.tensors(junk)
    loss, metrics = grpo_loss(**tensors, advantage_B=torch.tensor(case.outcome), clip=CLIP, truncation=TRUNCATION)
    loss.backward()
    want, grad, clipped = grpo_formula(case)
    assert loss.item() == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert_close(tensors["logp_BT"].grad.double(), grad, rtol=1e-4, atol=1e-5)
    assert metrics == {"actor/clipped": pytest.approx(clipped)}


def test_a_token_far_outside_the_gate_teaches_nothing():
    """Also where its ratio overflows."""
    logp = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    loss, metrics = mopd_loss(
        logp, logp.detach(), torch.tensor([[-1.0, -200.0, 0.0]]), torch.tensor([[-0.5, -0.5, -0.5]]),
        torch.zeros(1), torch.ones(1, 3), alpha=1.0, gate=(0.2, 5.0),
    )
    loss.backward()
    assert_close(logp.grad, torch.tensor([[-0.5 / 3, 0.0, -0.5 * math.exp(-1) / 3]]))
    assert metrics["mopd/gated"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["grpo", "mopd", "full", "topk", "drift"])
def test_a_sequence_without_own_tokens_is_an_error(name):
    x, mask = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    calls = {
        "grpo": lambda: grpo_loss(x, x, x, x[:, 0], mask, clip=CLIP, truncation=2.0),
        "mopd": lambda: mopd_loss(x, x, x, x, x[:, 0], mask, alpha=0.0, gate=GATE),
        "full": lambda: reverse_kl_loss(x[mask > 0, None], x[mask > 0, None], mask),
        "topk": lambda: topk_reverse_kl_loss(x[mask > 0, None], x[mask > 0, None], mask),
        "drift": lambda: rollout_drift(x, x, mask),
    }
    with pytest.raises(ValueError, match=r"without a token of its own.*filter_empty"):
        calls[name]()


def distributions(seed, vocabulary=7):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(3, 4, vocabulary, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.float64)
    return student, teacher, mask


def kl_formula(student, teacher, mask, classes):
    """Mean of means of KL over classes of tokens (lists of ids), in float64."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        share = 1 / mask[b].sum() / len(mask)
        for ids in classes(b, t):
            a, c = p[b, t, ids].sum(), q[b, t, ids].sum()
            total = total + share * a * (a / c).log()
    return total


@given(st.integers(0, 999))
def test_reverse_kl_is_the_formula(seed):
    student, teacher, mask = distributions(seed)
    want_in, got_in = student.clone().requires_grad_(), student.float().requires_grad_()
    want = kl_formula(want_in, teacher, mask, lambda b, t: [[v] for v in range(7)])
    own = mask > 0
    got = reverse_kl_loss(got_in[own].log_softmax(-1), teacher[own].float().log_softmax(-1), mask)
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    want.backward()
    got.backward()
    assert_close(got_in.grad.double(), want_in.grad, rtol=1e-3, atol=1e-6)


@given(st.integers(0, 999), st.integers(1, 7))
def test_topk_reverse_kl_counts_the_rest_as_one_token(seed, k):
    student, teacher, mask = distributions(seed)
    ids = student.topk(k, dim=-1).indices
    want_in, got_in = student.clone().requires_grad_(), student.float().requires_grad_()

    def classes(b, t):
        chosen = ids[b, t].tolist()
        rest = [v for v in range(7) if v not in chosen]
        return [[v] for v in chosen] + ([rest] if rest else [])

    want = kl_formula(want_in, teacher, mask, classes)
    own = mask > 0
    logp, teacher_logp = got_in.log_softmax(-1).gather(-1, ids), teacher.float().log_softmax(-1).gather(-1, ids)
    got = topk_reverse_kl_loss(logp[own], teacher_logp[own], mask)
    full = reverse_kl_loss(student[own].log_softmax(-1), teacher[own].log_softmax(-1), mask)
    assert got.item() == pytest.approx(want.item(), rel=1e-3, abs=1e-5)
    assert got.item() <= full.item() + 1e-5
    want.backward()
    got.backward()
    assert_close(got_in.grad.double(), want_in.grad, rtol=1e-2, atol=1e-4)


def test_topk_reverse_kl_as_a_loss_moves_the_student_to_the_teacher():
    """As an advantage it would move it nowhere: a constant at each place."""
    student, teacher, mask = (x.float() for x in distributions(0))
    own, teacher_logp = mask > 0, teacher.log_softmax(-1)
    student.requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(300):
        logp = student.log_softmax(-1)
        ids = logp.topk(3, dim=-1).indices
        loss = topk_reverse_kl_loss(logp.gather(-1, ids)[own], teacher_logp.gather(-1, ids)[own], mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = reverse_kl_loss(distributions(0)[0].float().log_softmax(-1)[own], teacher_logp[own], mask)
    after = reverse_kl_loss(student.log_softmax(-1)[own], teacher_logp[own], mask)
    assert after < 0.2 * before


def test_drift_is_of_own_tokens_only():
    logp = torch.tensor([[-9.0, -1.0, -2.0, -3.0]])
    rollout = torch.tensor([[0.0, -1.0, -2.5, -2.0]])
    metrics = rollout_drift(logp, rollout, torch.tensor([[0.0, 1, 1, 1]]))
    kl = sum(math.exp(d) - 1 - d for d in (0.0, 0.5, -1.0)) / 3
    assert metrics == {"train_infer_diff/kl": pytest.approx(kl), "F(tau=2)": pytest.approx(1 / 3)}


@given(st.lists(st.integers(-50, 50).map(lambda n: n / 10), min_size=1, max_size=8))
def test_group_advantage_has_mean_0_and_deviation_1(rewards):
    advantage = group_advantage(torch.tensor(rewards, dtype=torch.float64)).double()
    assert advantage.mean().item() == pytest.approx(0, abs=1e-5)
    if max(rewards) - min(rewards) > 0.1:
        assert advantage.std(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert advantage.argmax() == rewards.index(max(rewards))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_a_group_without_signal_has_no_advantage(reward):
    assert_close(group_advantage(torch.tensor([reward] * 7)), torch.zeros(7))
