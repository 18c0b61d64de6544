import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mimoflash.models import open_engine
from mimoflash.recipe import load_recipe
from mimoflash.run import run

TINY = """
name = "tiny"
[model]
hidden_size = 32
intermediate_size = 48
layer_types = ["full_attention", "sliding_attention"]
mlp_layer_types = ["dense", "sparse"]
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 12
v_head_dim = 8
swa_num_attention_heads = 2
swa_num_key_value_heads = 2
swa_head_dim = 12
swa_v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
initializer_range = 0.05
[tokenizer]
vocab_size = 400
documents = 200
[sources]
arithmetic = { kind = "domain", domain = "arithmetic", count = 300 }
maze = { kind = "domain", domain = "maze", count = 200, options = { sizes = [3] } }
[pretrain]
tokens = 6000
mixture = { arithmetic = 0.5, maze = 0.5 }
sequence_length = 128
batch = 4
peak_lr = 5e-3
final_lr = 1e-3
prompt_weight = 0.5
save_every = 2
precision = "float32"
[sft]
tokens = 3000
mixture = { arithmetic = 1.0 }
sequence_length = 128
batch = 4
peak_lr = 1e-3
final_lr = 1e-4
mtp_layers = 3
save_every = 2
precision = "float32"
[evaluate]
tasks = 4
max_tokens = 24
conversations = 1
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    return load_recipe(tmp_path / "tiny.toml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.toml").write_text(TINY)
    return run(load_recipe(folder / "tiny.toml"), folder / "out", say=lambda _: None)


def losses(out, stage="pretrain"):
    return [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_from_nothing_to_a_model_with_a_report(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["seconds"]) == {"tokenizer", "pretrain", "sft", "evaluate"}
    assert set(summary["domains"]) == {"arithmetic", "maze"}
    for values in summary["domains"].values():
        assert set(values) == {"chance", "pretrain", "sft"}
        assert all(0 <= value <= 1 for value in values.values())
    assert 1 <= summary["accept_length"] <= 4
    assert summary["tokens"]["pretrain"] >= 6000
    assert summary["parameters"]["mtp"] > 0
    assert "<svg" in (finished / "report.html").read_text()
    lines = losses(finished)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert lines[11]["loss"] < lines[0]["loss"] - 0.5
    assert {"mtp_loss_1", "balance_loss", "num_zeros", "grad_norm", "mfu", "tokens_per_second"} <= lines[0].keys()


def test_the_runs_folder_is_a_model(finished):
    engine = open_engine(str(finished))
    model, tokenizer = engine.model, engine.tokenizer
    assert model.config.num_nextn_predict_layers == engine.runner.cache.drafts == 3
    assert tokenizer.vocab_size <= model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.special.im_end


def test_transformers_loads_what_a_run_made(finished):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "sft" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "sft" / "model")
    engine = open_engine(str(finished))
    model, ours = engine.model, engine.tokenizer
    ids = ours.encode("What is 3 + 4?")
    assert tokenizer("What is 3 + 4?")["input_ids"] == ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_finished_run_is_not_done_again(finished, recipe):
    said: list[str] = []
    before = (finished / "sft" / "done.json").stat().st_mtime_ns
    run(recipe, finished, resume=True, say=said.append)
    assert sum("done before" in line for line in said) == 4
    assert (finished / "sft" / "done.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="--resume"):
        run(recipe, finished, say=said.append)


def test_another_recipe_does_not_go_on_with_a_run(finished, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    other = load_recipe(tmp_path / "tiny.toml", ["pretrain.tokens=7000"])
    with pytest.raises(ValueError, match="pretrain differs"):
        run(other, finished, resume=True, say=lambda _: None)


def test_a_stage_needs_the_one_before(recipe, tmp_path):
    run(recipe, tmp_path / "out", only="tokenizer", say=lambda _: None)
    with pytest.raises(ValueError, match="no finished stage pretrain"):
        run(recipe, tmp_path / "out", only="sft", say=lambda _: None)
    with pytest.raises(ValueError, match="no stage 'mopds'"):
        run(recipe, tmp_path / "out", only="mopds", say=lambda _: None)


def test_a_folder_of_something_else_is_left_alone(recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="not empty"):
        run(recipe, tmp_path, say=lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pretrain.tokens=0", "tokens is 0"),
        ("pretrain.tokens='many'", "pretrain.tokens"),
        ("pretrain.precision=int4", "int4"),
        ("sources.maze.kind=labyrinth", "sources.maze"),
        ("sources.maze.sises=3", "sises"),
        ("evaluate.task=3", "evaluate.task"),
        ("sft.mixture={arithmatic=1.0}", "sft.mixture names 'arithmatic'"),
        ("sft.sequence_length=0", "sequence_length is 0"),
        ("sources.maze.domain=maize", "no domain 'maize'"),
        ("model.hidden_size=0", "hidden_size is 0"),
        ("model.hiden_size=3", "hiden_size"),
        ("sources=3", "sources"),
        ("sources.maze.count=0", "count is 0"),
        ("nonsense", "key=value"),
        ("name.first=3", "name is a value"),
    ],
)
def test_a_wrong_recipe_is_named_before_anything_starts(change, message, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(tmp_path / "tiny.toml", [change])


def test_an_unknown_recipe_names_those_that_come_along():
    with pytest.raises(ValueError, match="demo"):
        load_recipe("dmeo")
    assert load_recipe("demo").name == "demo"


def test_a_stage_that_has_not_begun_may_still_be_changed(recipe, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    run(recipe, tmp_path / "out", only="tokenizer", say=lambda _: None)
    changed = load_recipe(tmp_path / "tiny.toml", ["sft.tokens=99"])
    run(changed, tmp_path / "out", only="tokenizer", say=lambda _: None)
    other = load_recipe(tmp_path / "tiny.toml", ["tokenizer.vocab_size=300"])
    with pytest.raises(ValueError, match="tokenizer differs"):
        run(other, tmp_path / "out", only="tokenizer", say=lambda _: None)


def test_other_data_than_the_run_began_with_is_refused(recipe, tmp_path):
    run(recipe, tmp_path / "out", only="tokenizer", say=lambda _: None)
    manifest = tmp_path / "out" / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(json.loads(manifest.read_text())["fingerprint"], "another"))
    with pytest.raises(ValueError, match="not the data that this run began with"):
        run(recipe, tmp_path / "out", only="pretrain", say=lambda _: None)


def test_a_loss_that_explodes_is_told_with_the_last_checkpoint(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    wild = load_recipe(tmp_path / "tiny.toml", ["pretrain.peak_lr=1e30", "pretrain.final_lr=1e29"])
    with pytest.raises(ValueError, match=r"pretrain step .*lower peak_lr"):
        run(wild, tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out" / "pretrain" / "done.json").exists()


def test_a_corrupt_shard_is_named(recipe, tmp_path):
    run(recipe, tmp_path / "out", only="tokenizer", say=lambda _: None)
    shard = tmp_path / "out" / "data" / "maze.train.shard"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"maze\.train\.shard"):
        run(recipe, tmp_path / "out", only="pretrain", say=lambda _: None)


def written(out):
    """How far a run has come: changes with each file that it makes and each step that it logs."""
    return tuple(sorted((str(f), f.stat().st_size) for f in out.rglob("*") if f.is_file() and ".new-" not in str(f)))


COMMAND = [sys.executable, "-m", "mimoflash.cli", "run", "tiny.toml", "--out", "out", "--resume"]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_killed_at_random_ends_as_the_undisturbed_one(kills, finished, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    shutil.copytree(finished / "tokenizer", tmp_path / "out" / "tokenizer")
    shutil.copytree(finished / "data", tmp_path / "out" / "data")
    shutil.copy(finished / "recipe.json", tmp_path / "out")
    chance, places = random.Random(kills), set()
    for _ in range(kills):
        process = subprocess.Popen(COMMAND, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, until = written(tmp_path / "out"), time.monotonic() + 60
        while written(tmp_path / "out") == before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)  # imports take longer than the run itself: kill it while it works
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        places.add(written(tmp_path / "out"))
    assert len(places) > 1
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("pretrain", "sft"):
        want = [line["loss"] for line in losses(finished, stage) if "loss" in line]
        assert [line["loss"] for line in losses(Path(tmp_path / "out"), stage) if "loss" in line] == want
