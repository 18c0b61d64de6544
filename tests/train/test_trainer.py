import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.config import ModelConfig
from mimoflash.data import Batch
from mimoflash.model import Transformer
from mimoflash.train import LossOutput, Trainer, language_model_loss
from mimoflash.train.optimizer import batch_size, learning_rate, parameter_groups, update_expert_bias
from mimoflash.train.stage import split


def batch_of(rows, length=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 128, (rows, length), generator=g)
    weight = (torch.rand(rows, length, generator=g) < 0.5).float()
    return Batch(tokens, torch.zeros_like(tokens), torch.arange(length).expand(rows, -1), weight)


def trained(batches, steps=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    trainer = Trainer(Transformer(ModelConfig.tiny(num_nextn_predict_layers=1)), dtype=dtype, **options)
    metrics = [trainer.step(batches, language_model_loss, 1e-2) for _ in range(steps)]
    return trainer, metrics


def test_accumulation_does_not_change_the_gradient():
    """Rows of unlike documents, so that the MTP layers' targets are not an even share of each micro-batch's."""
    batch = batch_of(6)
    batch.document_ids[::2] = torch.arange(16) // 2
    model = Transformer(ModelConfig.tiny(num_nextn_predict_layers=2))

    def gradient(batches):
        trainer = Trainer(model)
        metrics, weight, counts = trainer._accumulate(
            batches, partial(language_model_loss, mtp_weight=0.3, balance_weight=0.1)
        )
        return [p.grad / weight for p in trainer.parameters], metrics, counts

    whole, metrics, counts = gradient([batch])
    pieces, accumulated, counted = gradient(list(split(batch, 2)))
    for a, b in zip(whole, pieces, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-3)
    assert accumulated == pytest.approx(metrics, rel=1e-4)
    assert torch.equal(counts, counted)


def test_a_step_is_adamw_with_clipped_gradients():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny())
    reference = Transformer(ModelConfig.tiny())
    reference.load_state_dict(model.state_dict())
    batch = batch_of(4)
    Trainer(model, clip=0.1).step([batch], language_model_loss, 1e-2)
    out = language_model_loss(reference, batch)
    (out.total / out.weight).backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert norm > 0.1
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        grad = dict(reference.named_parameters())[name].grad * (0.1 / norm)
        decay = 0.1 if p.dim() >= 2 else 0.0
        m, v = 0.1 * grad, 0.05 * grad.square()
        want = before[name] * (1 - 1e-2 * decay) - 1e-2 * (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)
        moved = grad.abs() > 1e-7  # elsewhere the sign is noise
        assert_close(p.detach()[moved], want[moved], atol=2e-4, rtol=1e-3)


def test_norms_and_sinks_do_not_decay():
    groups = parameter_groups(list(Transformer(ModelConfig.tiny(num_nextn_predict_layers=1)).parameters()), 0.1)
    assert {p.dim() for p in groups[1]["params"]} == {1}
    assert 1 not in {p.dim() for p in groups[0]["params"]}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)


def test_num_zeros_counts_zero_gradients():
    _, metrics = trained([batch_of(2)], steps=1)
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny(num_nextn_predict_layers=1))
    language_model_loss(model, batch_of(2)).total.backward()
    assert metrics[0]["num_zeros"] == sum(int((p.grad == 0).sum()) for p in model.parameters() if p.grad is not None)
    assert metrics[0]["num_zeros"] > 0  # tokens that do not occur have no gradient in the embedding


def test_bf16_training_follows_float32():
    exact, ours = trained([batch_of(6)], steps=3)[1], trained([batch_of(6)], steps=3, dtype=torch.bfloat16)
    trainer, rounded = ours
    assert exact[-1]["loss"] < exact[0]["loss"] - 0.5
    assert [m["loss"] for m in rounded] == pytest.approx([m["loss"] for m in exact], rel=0.03)
    assert all(m.dtype == torch.float32 for m in trainer.masters)
    assert trainer.model.lm_head.weight.dtype == torch.bfloat16
    assert trainer.model.model.layers[1].mlp.gate.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_by_bit(dtype):
    whole, metrics = trained([batch_of(3)], steps=4, dtype=dtype)
    half, _ = trained([batch_of(3)], steps=2, dtype=dtype)
    other = Trainer(Transformer(ModelConfig.tiny(num_nextn_predict_layers=1)), dtype=dtype)
    other.load_state(half.state())
    again = [other.step([batch_of(3)], language_model_loss, 1e-2) for _ in range(2)]
    assert again == metrics[2:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, other.parameters, strict=True))


def test_a_loss_that_is_not_finite_changes_nothing():
    trainer, _ = trained([batch_of(2)], steps=1)
    before = [p.detach().clone() for p in trainer.parameters]

    def broken(model, batch):
        out = language_model_loss(model, batch)
        return LossOutput(out.total * math.nan, out.weight, out.metrics)

    with pytest.raises(FloatingPointError, match="loss is nan"):
        trainer.step([batch_of(2)], broken, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_a_step_without_a_target_is_named():
    batch = batch_of(2)
    empty = Batch(batch.tokens, batch.document_ids, batch.positions, torch.zeros_like(batch.loss_weight))
    with pytest.raises(ValueError, match="loss masks"):
        trained([empty], steps=1)


def test_expert_bias_moves_towards_the_fair_share_and_balances():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny())
    update_expert_bias(model, torch.tensor([[0.0, 4, 2, 2, 2, 2, 2, 2]] * 3), 0.01)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert_close(bias, torch.tensor([0.01, -0.01, 0, 0, 0, 0, 0, 0]))
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny(initializer_range=0.5))
    tokens = torch.randint(0, 128, (8, 64))

    def counts():
        return torch.stack([torch.bincount(r.indices.flatten(), minlength=8) for r in model.trunk(tokens).routings])

    with torch.no_grad():
        first = counts().float()
        for _ in range(150):
            update_expert_bias(model, counts().float(), 0.02)
        last = counts().float()
    assert last.max() < first.max()
    assert last.max() / last.mean() < 1.3


@given(st.floats(0, 30))
def test_learning_rate_has_three_parts(tokens):
    lr = learning_rate(
        tokens, peak=3.2e-4, final=1e-4, warmup_tokens=2.0, constant_tokens=12.0, total_tokens=24.0
    )
    if tokens <= 2:
        want = 3.2e-4 * tokens / 2
    elif tokens <= 14:
        want = 3.2e-4
    else:
        want = 1e-4 + 2.2e-4 * (1 + math.cos(math.pi * min(1, (tokens - 14) / 10))) / 2
    assert lr == pytest.approx(want)


def test_batch_warms_up_to_its_size():
    sizes = [batch_size(t, first=4, full=32, warmup_tokens=100) for t in range(0, 300, 10)]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[10], sizes[-1]) == (4, 32, 32)
    assert batch_size(0, first=4, full=32, warmup_tokens=0) == 32
