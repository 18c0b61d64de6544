"""Teachers, MOPD, its rivals and co-evolution as a run's stages."""

import json
import shutil
from math import gamma, pi, sqrt

import numpy as np
import pytest
import torch

from mimoflash.checkpoint import cached_smol, load_model, save_model
from mimoflash.config import ModelConfig
from mimoflash.model import Transformer
from mimoflash.models import find_model
from mimoflash.recipe import load_recipe
from mimoflash.run import coevolve, run
from mimoflash.stages import comparison as table_of
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


COMPARISON = """
[tune]
seed = 9
factors = [1.0, 2.0]
tasks = 2
[compare]
seeds = [0, 3]
tokens = 30
"""


@pytest.fixture(scope="module")
def comparison(recipe):
    file = recipe.parent / "comparison.toml"
    taught, mopd, methods = recipe.read_text().partition("[mopd]")
    file.write_text(taught + mopd + methods.replace("steps = 2", "steps = 20") + COMPARISON)
    return file


@pytest.fixture(scope="module")
def compared(comparison, tmp_path_factory):
    return run(load_recipe(comparison), tmp_path_factory.mktemp("compared") / "out", say=lambda _: None)


def read(file):
    return json.loads(file.read_text())


def test_a_comparison_gives_every_method_the_same_budget_and_each_seed_tasks_of_its_own(compared):
    seeds = [read(compared / "compare" / f"seed-{seed}" / "recipe.json") for seed in (0, 3)]
    tried = [read(compared / "tune" / factor / "recipe.json") for factor in ("x1", "x2")]
    assert [inner["seed"] for inner in seeds + tried] == [0, 3, 9, 9]
    assert [inner["evaluate"]["first"] for inner in seeds + tried] == [0, 3, 6, 6]
    assert [inner["evaluate"]["tasks"] for inner in seeds + tried] == [3, 3, 2, 2]
    apart = post_training.TASKS_A_ROUND
    for name in ("mix_rl", "cascade_rl", "off_policy", "naive_mopd"):
        assert [inner["rivals"][name]["first_task"] for inner in seeds + tried] == [0, apart, 2 * apart, 2 * apart]
        assert [inner["rivals"][name]["lr"] for inner in tried] == [1e-3, 2e-3]
        assert {inner["rivals"][name]["tokens"] for inner in seeds} == {30}
    assert {inner["mopd"]["tokens"] for inner in seeds} == {30}
    assert {inner["teachers"]["odd"]["tokens"] for inner in seeds} == {0}
    spent = read(compared / "compare" / "seed-0" / "rivals" / "done.json")["rivals"]
    assert all(30 <= each["tokens"] < 30 + 2 * 2 * 2 * 2 * 6 for each in spent.values())  # the last step may go over
    assert (compared / "compare" / "seed-3" / "report.html").exists()


def test_learning_rates_are_tried_with_the_same_teachers_and_the_best_is_taken(comparison, compared):
    one, other = (
        load_model(compared / "tune" / factor / "teachers/odd/model", dtype="float32").state_dict()
        for factor in ("x1", "x2")
    )
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    tuned = read(compared / "tune" / "done.json")
    assert tuned["factors"].keys() == {"student", "mix_rl", "cascade_rl", "off_policy", "naive_mopd"}
    for kind, tried in tuned["pass_rates"].items():
        for factor, rate in tried.items():
            domains = read(compared / "tune" / f"x{factor}" / "evaluate" / "done.json")["domains"]
            assert rate == pytest.approx(np.mean([row[kind] for row in domains.values()]))
        assert tried[f"{tuned['factors'][kind]:g}"] == max(tried.values())
    used = read(compared / "compare" / "seed-3" / "recipe.json")
    assert used["mopd"]["lr"] == 1e-3 * tuned["factors"]["student"]
    assert used["rivals"]["mix_rl"]["lr"] == 1e-3 * tuned["factors"]["mix_rl"]


def test_the_table_is_what_the_seeds_show(compared):
    table = (compared / "table.md").read_text()
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ") for row in table.splitlines() if "±" in row}
    every = [read(compared / "compare" / f"seed-{seed}" / "evaluate" / "done.json")["domains"] for seed in (0, 3)]
    for label, kind in (("MOPD", "student"), ("merged", "param_merge"), ("RL in turn", "cascade_rl")):
        odd = 100 * np.array([domains["odd"][kind] for domains in every])
        means = 100 * np.array([np.mean([row[kind] for row in domains.values()]) for domains in every])
        assert rows[label][1] == f"{odd.mean():.1f} ± {odd.std(ddof=1):.1f}"
        assert rows[label][3] == f"{means.mean():.1f} ± {means.std(ddof=1):.1f}"


def test_differences_have_the_interval_of_students_t():
    """Its quantiles from the density, integrated in float64."""
    for freedom, quantile in enumerate(table_of.STUDENTS_T, 1):
        x = np.linspace(0, quantile, 20_001)
        scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=1e-4)
    # five differences: mean 2 points, standard deviation sqrt(2.5), t = 2.776 of four degrees of freedom
    assert table_of.interval([0.00, 0.01, 0.02, 0.03, 0.04]) == "+2.0 (+0.0 to +4.0)"


def test_a_comparison_that_was_killed_goes_on_with_the_seed_that_was_not_finished(comparison, compared, tmp_path):
    out = shutil.copytree(compared, tmp_path / "out")
    last = out / "compare" / "seed-3" / "evaluate" / "done.json"
    (out / "compare" / "done.json").unlink()
    last.unlink()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert kept
    run(load_recipe(comparison), out, resume=True, say=lambda _: None)
    assert read(last)["domains"] == read(compared / last.relative_to(out))["domains"]
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")} == kept
    assert (out / "table.md").read_text() == (compared / "table.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("compare.seeds=[1]", "at least 2"), ("compare.seeds=[1, 2, 1]", "the seed 1 stands twice"),
        ("compare.seeds=[1, 9]", "the seed 9 stands twice"), ("tune.factors=[0.0]", "greater than 0"),
        ("compare.tokens=0", "greater than 0"), ("rivals.param_merge=maybe", "boolean"),
    ],
)
def test_comparisons_that_cannot_be_are_named(comparison, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(comparison, [change])


def test_a_comparison_needs_its_learning_rates(comparison, tmp_path):
    with pytest.raises(ValueError, match="no finished stage tune"):
        run(load_recipe(comparison), tmp_path / "out", only="compare", say=lambda _: None)


def test_the_packages_own_comparison_is_whole():
    recipe = load_recipe("mopd-table")
    assert recipe.domains().keys() == {"arithmetic", "tools", "maze"}
    demo = load_recipe("demo")
    assert {name: task.options for name, task in recipe.tasks.items()} == {
        source.domain: source.options for name, source in demo.sources.items() if name in recipe.tasks
    }


def test_the_packages_own_recipe_for_smol_is_whole():
    pytest.importorskip("reasoning_gym")
    assert load_recipe("smol-mopd").domains().keys() == {"sums", "letters"}


@pytest.mark.skipif(not cached_smol().exists(), reason="smol has not been fetched: mimoflash generate smol x")
def test_smol_goes_a_step_to_its_teachers_and_their_student(tmp_path):
    """The recipe as it comes along, but with tasks that need no extra, and few."""
    changes = ["tasks.sums={domain='arithmetic', options={digits=[1]}}", "tasks.letters={domain='maze'}"]
    short = {"steps": 1, "groups": 1, "group_size": 2, "max_tokens": 8}
    for part in ("teachers.sums", "teachers.letters", "mopd"):
        changes += [f"{part}.{key}={value}" for key, value in short.items()]
    changes += ["evaluate.tasks=1", "evaluate.max_tokens=8"]
    out = run(load_recipe("smol-mopd", changes), tmp_path / "out", say=lambda _: None)
    (step,) = [json.loads(line) for line in (out / "mopd" / "metrics.jsonl").read_text().splitlines()]
    assert step["tokens"] > 0
    assert 0 < step["train_infer_diff/kl"] < 0.1  # rollouts in bf16, training in float32
    assert abs(step["mopd/reverse_kl"]) < 0.1  # a step from the same model
    assert json.loads((out / "summary.json").read_text())["domains"].keys() == {"sums", "letters"}
