"""Training of MTP layers on a frozen trunk: the loss against PyTorch's, who learns from what, and that it learns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mimoflash.config import ModelConfig
from mimoflash.data import Batch, HiddenBatch, HiddenRows, ShardReader, ShardWriter
from mimoflash.model import Transformer
from mimoflash.train import HeadsSettings, train_heads
from mimoflash.train.heads import draft_loss, evaluate_heads, soft_cross_entropy
from mimoflash.train.heads_start import add_heads, draft_vocabulary, remember_hidden

SETTINGS = dict(sequence_length=16, batch=4, warmup_tokens=0, fit_tokens=64, save_every=3, evaluate_every=4)


def model_of(layers=2, **changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig.tiny(num_nextn_predict_layers=layers, **changes))


def item_of(model, rows=3, length=12, documents=None):
    tokens = torch.randint(0, 128, (rows, length))
    ids = torch.zeros_like(tokens) if documents is None else documents
    positions = torch.arange(length).expand(rows, -1)
    with torch.no_grad():
        hidden = model.trunk(tokens, positions, ids).hidden
    return HiddenBatch(Batch(tokens, ids, positions, torch.rand(rows, length)), hidden)


def test_soft_cross_entropy_is_pytorchs():
    """Rows over several chunks, in float64; the gradient by autograd."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 8, generator=g, dtype=torch.float64, requires_grad=True)
    head, weight = torch.randn(50, 8, generator=g).double(), torch.rand(300, generator=g).double()
    target = torch.randn(40, 50, generator=g).double().softmax(-1)
    rows = torch.randint(0, 40, (300,), generator=g)
    loss, agreed = soft_cross_entropy(hidden, target, rows, head, weight)
    (grad,) = torch.autograd.grad(3 * loss, hidden)
    logits = hidden @ head.T
    expected = (F.cross_entropy(logits, target[rows], reduction="none") * weight).sum()
    (expected_grad,) = torch.autograd.grad(3 * expected, hidden)
    assert_close(loss, expected)
    assert_close(grad, expected_grad)
    assert agreed == pytest.approx(weight[logits.argmax(-1) == target[rows].argmax(-1)].sum().item())


def test_a_layer_answers_for_what_the_trunk_says_further_on():
    """Written out, place by place, over two documents in a row."""
    model = model_of()
    documents = torch.tensor([[0] * 5 + [1] * 7] * 3)
    item = item_of(model, documents=documents)
    ids = torch.arange(10, 90)
    out = draft_loss(model, item, model.lm_head.weight[ids])
    trunk = model.logits(item.hidden)[..., ids].softmax(-1)
    drafts = model.mtp_logits(item.batch.tokens, item.batch.positions, documents)
    expected = 0.0
    for k, draft in enumerate(drafts):
        for row in range(3):
            for place in range(12 - 2 - k):
                if documents[row, place] == documents[row, place + 2 + k]:
                    loss = F.cross_entropy(draft[row, place, ids], trunk[row, place + 1 + k])
                    expected += loss * item.batch.loss_weight[row, place + 2 + k] / 2
    assert_close(out.total, expected)


def test_an_mtp_layer_that_is_the_trunk_agrees_with_it():
    """On a text of one token over and over, where what comes next is what comes then."""
    model = model_of(1)
    item = item_of(model)
    item.batch.tokens.fill_(3)
    hidden = item.hidden[:, -1:].expand_as(item.hidden).contiguous()
    layer = model.model.mtp.layers[0]
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.hnorm.weight.fill_(1.0)
        layer.eh_proj.weight[:, 64:] = torch.eye(64)
        layer.final_layernorm.weight.copy_(model.model.norm.weight)
    metrics = draft_loss(model, HiddenBatch(item.batch, hidden), model.lm_head.weight).metrics
    assert metrics["agreement_1"] == pytest.approx(1.0)


@pytest.fixture
def data(tmp_path):
    """Texts that count up modulo 12, so that a trunk of its own can be foreseen: (rows, shard)."""
    model = model_of(0, swa_num_key_value_heads=1, mlp_layer_types=("dense", "sparse", "sparse", "dense"))
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "a.shard", 128) as writer:
        for number in range(12):
            tokens = (np.arange(40) + random.integers(12)) % 12
            writer.add(tokens, np.arange(40) > 5, identity=number, conversation=True)
    shard = ShardReader(tmp_path / "a.shard")
    hidden = remember_hidden(model, shard, tmp_path / "a.npy")
    return model, shard, HiddenRows([shard], [hidden], 16, prompt_weight=0.3)


def test_hidden_states_are_the_trunks_of_each_document(data, tmp_path):
    model, shard, _ = data
    kept = remember_hidden(model, shard, tmp_path / "a.npy")
    tokens = torch.from_numpy(shard.document(7)[0].astype(np.int64))[None]
    expected = model.trunk(tokens).hidden[0]
    assert_close(torch.from_numpy(np.array(kept[7 * 40 : 8 * 40])).float(), expected, atol=2e-3, rtol=2e-3)


def test_a_shard_without_documents_has_no_hidden_states(tmp_path):
    ShardWriter(tmp_path / "c.shard", 128).close()
    assert remember_hidden(model_of(0), ShardReader(tmp_path / "c.shard"), tmp_path / "c.npy").shape == (0, 64)


def test_the_draft_vocabulary_is_the_most_frequent(data):
    _, shard, _ = data
    counts = np.bincount(shard.tokens, minlength=128)
    chosen = draft_vocabulary([shard], 5, 128)
    assert chosen.tolist() == sorted(chosen.tolist())
    assert counts[chosen].min() >= np.delete(counts, chosen).max()
    assert draft_vocabulary([shard], 100, 128).tolist() == list(range(100))  # it has 0 to 11, the lowest ids follow


def test_a_first_layer_begins_as_the_last_of_the_trunk(data):
    """Its eh_proj is numpy's least-squares fit to what enters that layer, up to the ridge."""
    model, shard, rows = data
    add_heads(model, [shard], rows.hidden, HeadsSettings(tokens=1, layers=1, **SETTINGS | {"fit_tokens": 10_000}))
    layer, last = model.model.mtp.layers[0], model.model.layers[-1]
    assert torch.equal(layer.final_layernorm.weight, model.model.norm.weight)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert torch.equal(layer.get_parameter(f"{name}.weight"), last.get_parameter(f"{name}.weight"))
    caught = []
    last.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0]))
    x, y = [], []
    with torch.no_grad():
        for index in range(len(shard)):
            tokens = torch.from_numpy(shard.document(index)[0].astype(np.int64))
            hidden = model.trunk(tokens[None]).hidden[0]
            x.append(torch.cat([layer.enorm(model.model.embed_tokens(tokens[1:])), layer.hnorm(hidden[:-1])], -1))
            y.append(caught[-1][1:])
        x, y = torch.cat(x).double(), torch.cat(y).double()
        scale = y.square().mean(-1, keepdim=True).rsqrt()
        best = np.linalg.lstsq((x * scale).numpy(), (y * scale).numpy(), rcond=None)[0]
        ideal = ((x @ torch.from_numpy(best) - y) * scale).square().mean()
        found = ((layer.eh_proj(x.float()).double() - y) * scale).square().mean()
    assert found < ideal + 0.02
    assert found < 0.2


def test_training_teaches_the_layers_and_leaves_the_trunk(data, tmp_path):
    model, shard, rows = data
    settings = HeadsSettings(tokens=6000, layers=2, peak_lr=3e-3, final_lr=1e-3, **SETTINGS)
    trunk = {name: p.clone() for name, p in model.named_parameters()}
    model.model.mtp.draft_tokens = draft_vocabulary([shard], 100, 128)
    add_heads(model, [shard], rows.hidden, settings)
    before = evaluate_heads(model, rows, 8)
    result = train_heads(model, rows, rows, settings, tmp_path / "run")
    assert result["tokens"] >= 6000
    assert result["held_out"] == pytest.approx(evaluate_heads(model, rows, settings.evaluate_rows))
    assert result["held_out"]["agreement_2"] > before["agreement_2"] + 0.1
    for name, p in trunk.items():
        assert torch.equal(p, model.get_parameter(name))


def test_a_broken_off_run_ends_with_the_same_weights(data, tmp_path, monkeypatch):
    model, shard, rows = data
    settings = HeadsSettings(tokens=64 * 5, layers=1, **SETTINGS)
    model.model.mtp.draft_tokens = draft_vocabulary([shard], 100, 128)
    add_heads(model, [shard], rows.hidden, settings)
    layer = model.model.mtp.layers[0]
    begun = {name: t.clone() for name, t in layer.state_dict().items()}
    train_heads(model, rows, rows, settings, tmp_path / "whole")
    whole = {name: t.clone() for name, t in layer.state_dict().items()}

    class Killed(Exception):
        pass

    def batch(self, first_sample, count):
        if first_sample == 4 * 4:  # the fifth step's, one after a training state has been kept
            raise Killed
        return real(self, first_sample, count)

    real = HiddenRows.batch
    layer.load_state_dict(begun)
    monkeypatch.setattr(HiddenRows, "batch", batch)
    with pytest.raises(Killed):
        train_heads(model, rows, rows, settings, tmp_path / "broken")
    monkeypatch.setattr(HiddenRows, "batch", real)
    layer.load_state_dict(begun)
    train_heads(model, rows, rows, settings, tmp_path / "broken")
    for name, t in whole.items():
        assert torch.equal(t, layer.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 0}, "tokens is 0"), ({"sequence_length": 4}, "3 layers look 4 places ahead"),
     ({"peak_lr": 0.0, "final_lr": 0.0}, "peak_lr is 0"), ({"final_lr": 1.0}, "final_lr 1"),
     ({"warmup_tokens": -1}, "warmup_tokens is -1")],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HeadsSettings(**{"tokens": 100} | change)
