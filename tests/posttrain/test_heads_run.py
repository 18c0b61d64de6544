"""The recipe for MTP layers from end to end, on a small model with random weights."""

import json

import pytest
import torch

from mimoflash.benchmarks.subject import gguf_file, open_subject
from mimoflash.checkpoint import load_heads, load_model, save_gguf
from mimoflash.config import ModelConfig
from mimoflash.engine import SamplingParams
from mimoflash.kernels import native
from mimoflash.model import Transformer
from mimoflash.models import convert, find_model, open_engine, open_model
from mimoflash.posttrain.heads import measure_heads
from mimoflash.recipe import load_recipe
from mimoflash.run import run
from mimoflash.stages import mtp_layers

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
    _the_runs_folder_is_the_trunk_with_the_newest_heads(out, talker_gguf, model)


def _the_runs_folder_is_the_trunk_with_the_newest_heads(out, trunk, model):
    assert find_model(str(out)) == trunk
    engine = open_engine(str(out))
    assert engine.runner.cache.drafts == 3
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, engine.model.state_dict()[name]), name
    assert engine.model.model.mtp.draft_tokens.tolist() == model.model.mtp.draft_tokens.tolist()
    (answer,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=6))
    (plain,) = open_engine(str(trunk)).generate([[1, 2, 3]], SamplingParams(max_tokens=6))
    assert answer.tokens == plain.tokens
    subject = open_subject(str(out), out.parent, context=16, tokens=8, drafts=3)  # what is measured, too
    assert load_model(gguf_file(subject, "float32", out.parent)).config.num_nextn_predict_layers == 0
    for format, layers in (("hf", 3), ("gguf", 0)):  # GGUF's llama has no place for them
        target = out.parent / f"converted.{format}"
        convert(str(out), target, format=format, dtype="float32")
        assert load_model(target).config.num_nextn_predict_layers == layers
    (out / "mtp" / "done.json").unlink()
    assert open_model(str(out)).config.num_nextn_predict_layers == 1
    (out / "first" / "done.json").unlink()
    with pytest.raises(ValueError, match="no stage of this run has finished a model"):
        open_model(str(out))


def test_another_trunk_than_the_heads_began_with_is_refused(recipe, talker_gguf, tmp_path):
    out = tmp_path / "out"
    for stage in ("generate", "first"):
        run(load_recipe(recipe), out, only=stage, say=lambda _: None)
    talker_gguf.write_bytes(talker_gguf.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"first.heads\.safetensors: .* another model than .*talker\.gguf"):
        run(load_recipe(recipe), out, only="mtp", say=lambda _: None)


@pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
@pytest.mark.parametrize(("stored", "expected"), [("q4_1", "int4"), ("q8_0", "int8"), ("float32", "float32")])
def test_the_trunk_writes_with_the_weights_that_its_file_has(
    stored, expected, talker, tokenizer, tmp_path, monkeypatch
):
    fields = tokenizer.gguf_fields()
    save_gguf(talker, tmp_path / "t.gguf", dtype=stored, tokenizer=fields)
    (tmp_path / "heads.toml").write_text(RECIPE.format(model=tmp_path / "t.gguf"))
    engines = []
    monkeypatch.setattr(mtp_layers, "write_conversations", lambda engine, *_: engines.append(engine))
    run(load_recipe(tmp_path / "heads.toml"), tmp_path / "out", only="generate", say=lambda _: None)
    assert engines[0].runner.weights == expected
    assert open_engine(str(tmp_path / "t.gguf")).runner.weights == expected


def test_the_trunk_comes_without_the_layers_that_its_file_has(tokenizer, tmp_path, monkeypatch):
    config = ModelConfig.tiny(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=3)
    save_gguf(Transformer(config), tmp_path / "t.gguf", dtype="float32", tokenizer=tokenizer.gguf_fields())
    (tmp_path / "heads.toml").write_text(RECIPE.format(model=tmp_path / "t.gguf"))
    engines = []
    monkeypatch.setattr(mtp_layers, "write_conversations", lambda engine, *_: engines.append(engine))
    run(load_recipe(tmp_path / "heads.toml"), tmp_path / "out", only="generate", say=lambda _: None)
    assert engines[0].model.config.num_nextn_predict_layers == 0


def test_without_a_held_out_question_nothing_is_measured(talker, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no held-out conversation"):
        measure_heads(talker, tokenizer, tmp_path, prompts=4, max_tokens=8)


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
