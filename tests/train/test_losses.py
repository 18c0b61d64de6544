import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimoflash.config import ModelConfig
from mimoflash.data import Batch
from mimoflash.model import Transformer
from mimoflash.train import language_model_loss
from mimoflash.train.losses import balance_loss


@st.composite
def batches(draw, vocabulary=128):
    rows, length = draw(st.integers(1, 3)), draw(st.integers(6, 24))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = torch.full((rows, length), -1)
    positions = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        place = 0
        for number, size in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))):
            end = min(place + size, length)
            ids[row, place:end] = number
            positions[row, place:end] = torch.arange(end - place)
            place = end
    tokens = torch.randint(0, vocabulary, (rows, length), generator=g)
    weight = torch.rand(rows, length, generator=g) * (torch.rand(rows, length, generator=g) < 0.7)
    weight = weight * (ids >= 0) * (positions > 0)
    return Batch(tokens, ids, positions, weight)


def summed_loss(logits, batch, ahead):
    """Written from the definition: over tokens, those `ahead` places before in the same document predict them."""
    total = weight = 0.0
    rows, length = batch.tokens.shape
    for row in range(rows):
        for target in range(ahead, length):
            place = target - ahead
            if batch.document_ids[row, place] != batch.document_ids[row, target]:
                continue
            w = float(batch.loss_weight[row, target])
            logp = logits[row, place].double().log_softmax(-1)[batch.tokens[row, target]]
            total, weight = total - w * float(logp), weight + w
    return total, weight


@settings(max_examples=15)
@given(batches())
def test_the_loss_is_next_token_plus_weighted_mtp(batch):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny(num_nextn_predict_layers=2))
    out = language_model_loss(model, batch, mtp_weight=0.3)
    with torch.no_grad():
        drafts = model.mtp_logits(batch.tokens, batch.positions, batch.document_ids)
        logits = model(batch.tokens, batch.positions, batch.document_ids)
    main, weight = summed_loss(logits, batch, 1)
    mtp = [summed_loss(draft, batch, 2 + k)[0] for k, draft in enumerate(drafts)]
    assert out.weight == pytest.approx(weight, rel=1e-5)
    assert out.total.item() == pytest.approx(main + 0.3 * sum(mtp) / 2, rel=1e-4, abs=1e-4)
    assert out.metrics["mtp_loss_2"] == pytest.approx(mtp[1] / weight if weight else 0, rel=1e-4, abs=1e-5)


def test_mtp_layer_k_learns_the_token_2_plus_k_ahead():
    """A sequence that counts: what each layer must say is known."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny(num_nextn_predict_layers=3, vocab_size=16))
    tokens = (torch.arange(48) + torch.arange(4)[:, None]) % 16
    batch = Batch(tokens, torch.zeros_like(tokens), torch.arange(48).expand(4, -1), torch.ones(4, 48))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        language_model_loss(model, batch, mtp_weight=1.0).total.backward()
        optimizer.step()
    for k, draft in enumerate(model.mtp_logits(tokens)):
        meant = 48 - 2 - k
        assert (draft[:, 4:meant].argmax(-1) == tokens[:, 6 + k :]).float().mean() > 0.95


@settings(max_examples=15)
@given(batches())
def test_balance_loss_is_the_formula(batch):
    torch.manual_seed(0)
    with torch.no_grad():
        out = Transformer(ModelConfig.tiny()).trunk(batch.tokens, batch.positions, batch.document_ids)
    own = batch.document_ids >= 0
    loss_B, counts = balance_loss(out, own)
    rows, length = own.shape
    want = [0.0] * rows
    counted = torch.zeros(3, 8)
    for layer, routing in enumerate(out.routings):
        scores, chosen = routing.scores.double().view(rows, length, 8), routing.indices.view(rows, length, 2)
        for row in range(rows):
            places = [t for t in range(length) if own[row, t]]
            for expert in range(8):
                taken = sum(int(expert in chosen[row, t].tolist()) for t in places)
                counted[layer, expert] += taken
                frequency = 8 / (2 * max(1, len(places))) * taken
                p = sum(float(scores[row, t, expert] / scores[row, t].sum()) for t in places) / max(1, len(places))
                want[row] += frequency * p
    assert loss_B.tolist() == pytest.approx(want, rel=1e-4)
    assert_close(counts, counted)


def test_an_even_router_has_a_balance_loss_of_one_a_layer():
    model = Transformer(ModelConfig.tiny())
    tokens = torch.randint(0, 128, (2, 64))
    out = model.trunk(tokens)
    for routing in out.routings:
        routing.scores = torch.full_like(routing.scores, 0.5)
        routing.indices = torch.arange(2 * 64 * 2).view(-1, 2) % 8
    assert balance_loss(out, torch.ones(2, 64, dtype=torch.bool))[0].tolist() == pytest.approx([3.0, 3.0])


def test_nothing_to_learn_weighs_nothing():
    model = Transformer(ModelConfig.tiny())
    tokens = torch.randint(0, 128, (1, 8))
    out = language_model_loss(model, Batch(tokens, torch.zeros_like(tokens), torch.arange(8)[None], torch.zeros(1, 8)))
    assert out.weight == 0
    assert math.isfinite(out.total.item())
