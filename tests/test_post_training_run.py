"""Teachers, MOPD, its rivals and co-evolution as a run's stages."""

import json
import shutil

import pytest
import torch

from mimoflash.checkpoint import load_model, save_model
from mimoflash.config import ModelConfig
from mimoflash.model import Transformer
from mimoflash.models import find_model
from mimoflash.recipe import load_recipe
from mimoflash.run import coevolve, run
from mimoflash.stages import evaluation, post_training
from mimoflash.text import train_tokenizer

RECIPE = """
name = "small"
model = "{model}"
[tasks.odd]
domain = "file"
options = {{ path = "{folder}/odd.py" }}
[tasks.even]
domain = "file"
options = {{ path = "{folder}/even.py" }}
[teachers.odd]
{short}
[teachers.even]
{short}
[mopd]
alpha = 0.1
mtp_weight = 0.1
drift_every = 1
{short}
[rivals]
param_merge = true
mix_rl = {{ {inline} }}
cascade_rl = {{ {inline} }}
off_policy = {{ {inline}, passed_only = false }}
naive_mopd = {{ {inline}, alpha = 0.0, balance = "tokens" }}
[evaluate]
tasks = 3
samples = 2
temperature = 1.0
max_tokens = 6
conversations = 1
"""
TASKS = """
def prompt(seed):
    return f"Say {{seed}}."

def verify(seed, answer):
    return len(answer) % 2 == {rest}
"""
SHORT = {"steps": "2", "lr": "1e-3", "groups": "2", "group_size": "2", "max_tokens": "6", "save_every": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer(["What is 1 + 2? Go from S to G in at most 4 moves.\n" * 20], 300)
    torch.manual_seed(0)
    vocabulary = -(-tokenizer.vocab_size // 64) * 64
    config = ModelConfig.tiny(
        vocab_size=vocabulary, max_position_embeddings=512, initializer_range=0.1, num_nextn_predict_layers=1,
        eos_token_id=tokenizer.special.im_end,
    )
    save_model(Transformer(config), folder / "model", dtype="float32", tokenizer=tokenizer)
    lines, inline = "\n".join(f"{k} = {v}" for k, v in SHORT.items()), ", ".join(f"{k} = {v}" for k, v in SHORT.items())
    for rest, name in enumerate(["even", "odd"]):
        (folder / f"{name}.py").write_text(TASKS.format(rest=rest))
    text = RECIPE.format(model=folder / "model", folder=folder, short=lines, inline=inline)
    (folder / "small.toml").write_text(text)
    return folder / "small.toml"


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    return run(load_recipe(recipe), tmp_path_factory.mktemp("run") / "out", say=lambda _: None)


def test_a_run_goes_from_a_model_to_its_student_and_the_rivals(recipe, finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["seconds"]) == {"teachers", "mopd", "rivals", "evaluate"}
    models = {"chance", "sft", "teacher", "student", "mix_rl", "cascade_rl", "off_policy", "naive_mopd", "param_merge"}
    assert summary["domains"].keys() == {"odd", "even"}
    for rates in summary["domains"].values():
        assert rates.keys() == models
        assert all(0 <= rate <= 1 for rate in rates.values())
    assert summary["mopd"]["steps"] == 2
    assert summary["accept_lengths"].keys() == {"sft", "student"}
    assert find_model(str(finished)) == finished / "mopd" / "model"
    lines = [json.loads(line) for line in (finished / "mopd" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all("train_infer_diff/kl/without_replay" in line and "mtp_loss" in line for line in lines)
    page = (finished / "report.html").read_text()
    for shown in ("MOPD beside its rivals", "Rollout against trainer", "Reverse KL", "<table>"):
        assert shown in page
    assert not list(finished.rglob("states"))


def test_each_stage_starts_from_the_same_model_and_changes_it(recipe, finished):
    start = load_model(recipe.parent / "model", dtype="float32").state_dict()
    trained = ["teachers/odd", "teachers/even", "mopd", *(f"rivals/{name}" for name in (
        "mix_rl", "cascade_rl", "off_policy", "naive_mopd", "param_merge"))]
    for name in trained:
        state = load_model(finished / name / "model", dtype="float32").state_dict()
        moved = max((state[key] - start[key]).abs().max().item() for key in start)
        assert 0 < moved < 0.02, name  # a step or two at this rate


def test_merged_weights_are_the_teachers_mean(finished):
    one, other, merged = (
        load_model(finished / name / "model", dtype="float32").state_dict()
        for name in ("teachers/odd", "teachers/even", "rivals/param_merge")
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)


def test_a_stage_that_is_run_again_takes_those_after_it_along(recipe, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    run(load_recipe(recipe), out, only="teachers", say=lambda _: None)
    assert (out / "teachers" / "done.json").exists()
    assert (out / "teachers" / "odd" / "done.json").exists()
    for later in ("mopd", "rivals", "rivals/mix_rl", "evaluate"):
        assert not (out / later / "done.json").exists()


def test_what_was_begun_is_gone_on_with(recipe, tmp_path, monkeypatch):
    """Killed between two teachers: the first one stays as it is."""
    train, trained = post_training.train_grpo, []

    def dying(engine, domains, *args, **more):
        if trained == ["odd"]:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(next(iter(domains)))
        train(engine, domains, *args, **more)

    monkeypatch.setattr(post_training, "train_grpo", dying)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe), tmp_path / "out", say=lambda _: None)
    run(load_recipe(recipe), tmp_path / "out", only="teachers", say=lambda _: None)
    assert trained[:3] == ["odd", "killed", "even"]


def test_the_student_goes_on_as_its_own_teacher_until_nothing_is_gained(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    said = []
    result = coevolve(out, 2, say=said.append)
    assert 2 <= len(result["mean_reward"]) <= 3
    rounds = sorted(path.name for path in (out / "coevolve").glob("round-*"))
    assert len(rounds) == len(result["mean_reward"]) - 1
    assert (out / "coevolve" / "round-1" / "teachers" / "even" / "model").is_dir()
    assert find_model(str(out)) == out / result["best"]
    assert coevolve(out, 2, say=said.append) == result  # what is there is not done again


def test_each_round_has_tasks_of_its_own_and_is_forgotten_with_its_start(recipe, finished, tmp_path, monkeypatch):
    out, seen = shutil.copytree(finished, tmp_path / "out"), []
    train = post_training.train_mopd

    def seeing(engine, domains, teachers, settings, **more):
        seen.append(settings.first_task)
        train(engine, domains, teachers, settings, **more)

    monkeypatch.setattr(post_training, "train_mopd", seeing)
    coevolve(out, 1, say=lambda _: None)
    assert seen == [post_training.TASKS_A_ROUND]
    run(load_recipe(recipe), out, only="mopd", say=lambda _: None)
    assert not list((out / "coevolve").rglob("done.json"))
    assert find_model(str(out)) == out / "mopd" / "model"


def test_models_are_judged_as_they_are_taught(recipe, finished, tmp_path, monkeypatch):
    out, seen = shutil.copytree(finished, tmp_path / "out"), []
    changes = ["max_turns=2", "thinking=false", "timeout=9.0"]
    changed = load_recipe(recipe, [f"teachers.odd.{change}" for change in changes])
    (out / "recipe.json").write_text(json.dumps(json.loads(changed.model_dump_json())))
    play = evaluation.play_tasks
    monkeypatch.setattr(evaluation, "play_tasks", lambda *a, **more: seen.append((a[1].name, more)) or play(*a, **more))
    run(changed, out, only="evaluate", say=lambda _: None)
    assert ("file/odd", {"max_turns": 2, "thinking": False, "timeout": 9.0}) in seen
    assert ("file/even", {"max_turns": 4, "thinking": True, "timeout": 60.0}) in seen


def test_co_evolution_needs_a_student(recipe, tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        coevolve(tmp_path, 1)
    (tmp_path / "recipe.json").write_text(load_recipe(recipe, ["seed=1"]).model_dump_json())
    with pytest.raises(ValueError, match="no finished stage mopd"):
        coevolve(tmp_path, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teachers.other.steps=1", "teachers.other.lr|other is in one"),
        ("tasks.more.domain=maze", "more is in one of tasks and teachers only"),
        ("tasks.odd.domain=alchemy", "there is no domain 'alchemy'"),
        ("mopd.balance=hope", "balance"),
        ("mopd.lora_rank=4", "MTP layers stay"),
        ("mopd.sources.others.groups=2", "mopd.sources names others"),
        ("teachers.odd.sources.others.groups=2", "teachers.odd.sources names others"),
        ("mopd.sources.odd.groups=0", "groups is 0"),
        ("rivals.cascade_rl.steps=1", "each of 2 domains needs one"),
    ],
)
def test_recipes_that_cannot_be_are_named_before_anything_starts(recipe, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(load_recipe(recipe, [change]), tmp_path / "out", say=lambda _: None)


def test_a_file_without_a_held_out_line_is_named_before_anything_starts(recipe, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"prompt": "What is 1 + 1?", "answer": "2"}\n')
    changes = ["tasks.odd.domain=file", f"tasks.odd.options={{ path = '{tmp_path / 'few.jsonl'}' }}"]
    with pytest.raises(ValueError, match=r"tasks.odd: .*no (held-out|training) task"):
        load_recipe(recipe, changes)


def test_the_packages_own_recipe_for_smol_is_whole():
    pytest.importorskip("reasoning_gym")
    assert load_recipe("smol-mopd").domains().keys() == {"sums", "letters"}
