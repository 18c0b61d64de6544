"""The models that engines run here, and what runs them."""

import dataclasses

import pytest
import torch
from oracles import CONFIG
from torch.nn.functional import cross_entropy

from mimoflash.engine import backend
from mimoflash.kernels import native
from mimoflash.model import Transformer


@pytest.fixture(params=["torch", "native"])
def runner(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(backend, "_native_is_available", lambda: False)
    elif not native.available():
        pytest.skip("no compiled kernels")
    return request.param


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@pytest.fixture(scope="session")
def drafting():
    """A model of sixteen words whose MTP layers have seen some of what it writes: they are right now and then."""
    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(CONFIG, vocab_size=16))
    text = torch.randint(0, 16, (16, 4))
    with torch.no_grad():
        for _ in range(40):
            text = torch.cat([text, (model(text)[:, -1] / 0.5).softmax(-1).multinomial(1)], 1)
        hidden = model.trunk(text).hidden
    optimizer = torch.optim.Adam(model.model.mtp.parameters(), lr=1e-2)
    for _ in range(60):
        drafts = model.mtp_hidden(hidden, text)
        losses = [
            cross_entropy(model.lm_head(h[:, : -2 - k]).flatten(0, 1), text[:, 2 + k :].flatten())
            for k, h in enumerate(drafts)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return model.eval()
