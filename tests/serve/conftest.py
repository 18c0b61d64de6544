import argparse
import subprocess
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from scripted import ScriptedEngine, served

from mimoflash.config import ModelConfig
from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.text import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    text = "What is the weather in Paris? <function=get_weather> {\"city\": \"Paris\"} It is sunny, 21 degrees.\n"
    return train_tokenizer([text * 20], 400)


@pytest.fixture(scope="session")
def tiny_engine(tokenizer):
    """A random model."""
    torch.manual_seed(0)
    vocabulary = -(-tokenizer.vocab_size // 64) * 64
    config = ModelConfig.tiny(
        vocab_size=vocabulary, max_position_embeddings=2048, initializer_range=0.1, num_nextn_predict_layers=1,
        eos_token_id=tokenizer.special.im_end,
    )
    return Engine(Transformer(config), tokenizer, speculate=1, share_prefixes=True)


@pytest.fixture(scope="session")
def tiny_server(tiny_engine):
    with served({"tiny": tiny_engine}) as url:
        yield url


@pytest.fixture
def scripted_server(tokenizer):
    """Serves the model "scripted", which writes what a script says: `scripted_server(script)` gives the address, and
    has its engine as `.engine`."""
    yield from scripted(tokenizer)


@pytest.fixture
def scripted_code_server():
    """With a tokenizer that knows English and code: coding tools' instructions are long."""
    texts = [Path(module.__file__).read_text() for module in (argparse, subprocess, textwrap)]
    yield from scripted(train_tokenizer(texts, 3000))


def scripted(tokenizer):
    with ExitStack() as stack:

        def start(script, *, settings=None, **how):
            start.engine = ScriptedEngine(tokenizer, script if callable(script) else lambda _: script, **how)
            return stack.enter_context(served({"scripted": start.engine}, settings))

        yield start
