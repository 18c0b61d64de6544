"""A small tokenizer of the family, trained once; the embedded model's GGUF file where it was fetched."""

import os
from pathlib import Path

import pytest

import mimoflash.text as text_room
from mimoflash.text import Tokenizer, train_tokenizer

SOURCES = sorted(Path(text_room.__file__).parent.glob("*.py"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [file.read_text(encoding="utf-8") for file in SOURCES] + ["Grüße, 世界! 12345 naïve 🙂\r\n\r\n\t x"]
    return train_tokenizer(texts, 1500)


@pytest.fixture(scope="session")
def smol_gguf() -> Path:
    named = os.environ.get("MIMOFLASH_SMOL")
    files = [Path(named)] if named else sorted((Path.home() / ".cache/mimoflash/smol").glob("*.gguf"))
    if not files or not files[0].is_file():
        pytest.skip("the embedded model is not here: set MIMOFLASH_SMOL to its .gguf file")
    return files[0]
