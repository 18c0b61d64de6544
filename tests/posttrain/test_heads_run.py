"""The recipe for MTP layers from end to end, on a small model with random weights."""

import json

import pytest
import torch

from mimoflash.checkpoint import load_heads, load_model
from mimoflash.recipe import load_recipe
from mimoflash.run import run

RECIPE = """
name = "heads"
model = "{model}"
[generate]
parts = 2
conversations = 32
turns = 1
user_tokens = 150
answer_tokens = 40
held_out = 0.3
[first]
layers = 1
tokens = 3_000
sequence_length = 32
fit_tokens = 500
peak_lr = 1e-2
[mtp]
layers = 3
tokens = 1_000
sequence_length = 32
fit_tokens = 500
[evaluate]
prompts = 4
max_tokens = 24
"""


@pytest.fixture
def recipe(talker_gguf, tmp_path):
    (tmp_path / "heads.toml").write_text(RECIPE.format(model=talker_gguf))
    return tmp_path / "heads.toml"


def test_from_a_model_to_its_heads(recipe, talker_gguf, tmp_path):
    out = run(load_recipe(recipe), tmp_path / "out", say=lambda _: None)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["seconds"]) == {"generate", "first", "mtp", "evaluate"}
    assert 1 <= summary["accept_length"] <= 4
    assert len(summary["accepted"]) == 3
    assert sum(summary["accepted"]) + 1 == pytest.approx(summary["accept_length"])
    assert not (out / "report.html").exists()
    model, trunk = load_model(talker_gguf), load_model(talker_gguf)
    load_heads(model, out / "mtp" / "heads.safetensors", talker_gguf)
    assert model.config.num_nextn_predict_layers == 3
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), trunk(tokens))
    said = []
    run(load_recipe(recipe), out, resume=True, say=said.append)
    assert sum("done before" in line for line in said) == 4


def test_a_stage_needs_the_one_before(recipe, tmp_path):
    with pytest.raises(ValueError, match="no finished stage generate"):
        run(load_recipe(recipe), tmp_path / "out", only="first", say=lambda _: None)
    with pytest.raises(ValueError, match="no stage 'sft'; the stages are generate, first, mtp, evaluate"):
        run(load_recipe(recipe), tmp_path / "out", only="sft", say=lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("first.layers=4", "first.layers is 4"), ("mtp.tokens=0", "tokens is 0"), ("mtp.token=3", "mtp.token"),
        ("generate.parts=0", "parts is 0"), ("pretrain.tokens=3", "pretrain"),
    ],
)
def test_a_wrong_recipe_is_named_before_anything_starts(recipe, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, [change])


def test_the_embedded_models_recipe_is_a_whole_one():
    assert load_recipe("smol-mtp").model == "smol"
