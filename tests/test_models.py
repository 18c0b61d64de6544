"""What a model's name means."""

import json

import pytest

from mimoflash import models
from mimoflash.checkpoint import save_gguf
from mimoflash.config import ModelConfig
from mimoflash.kernels import native
from mimoflash.model import Transformer
from mimoflash.models import find_model, stored_dtype
from mimoflash.text import train_tokenizer


@pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
@pytest.mark.parametrize(("stored", "expected"), [("q4_1", "int4"), ("q8_0", "int8"), ("float32", None)])
def test_mtp_layers_in_the_file_count(stored, expected, tmp_path):
    tokenizer = train_tokenizer(["What is the way?"] * 9, 300)
    config = ModelConfig.tiny(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=3)
    save_gguf(Transformer(config), tmp_path / "m.gguf", dtype=stored, tokenizer=tokenizer.gguf_fields())
    assert stored_dtype(tmp_path / "m.gguf") == expected


def test_smol_is_the_embedded_model_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "resolve", lambda name: tmp_path / f"{name}.gguf")
    _begin_run(tmp_path / "smol", "smol")
    assert find_model("smol") == tmp_path / "smol.gguf"


def test_a_run_is_not_the_trunk_of_its_own_layers(tmp_path):
    _begin_run(tmp_path / "run", str(tmp_path / "run"))
    with pytest.raises(ValueError, match="run about itself"):
        find_model(str(tmp_path / "run"))


def _begin_run(folder, trunk):
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"model": trunk}))
