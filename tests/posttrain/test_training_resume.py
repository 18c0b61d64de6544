"""A run that was killed, at whatever moment, goes on: nothing that was finished is played again, and without staleness
it ends at the very weights of one that nobody killed."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small_world import DIGITS, FEW_BITS, Log, Say, small_model, small_tokenizer

from mimoflash.engine import Engine
from mimoflash.posttrain import GRPOSettings, ModelTeacher, MOPDSettings, train_grpo, train_mopd
from mimoflash.posttrain.scheduler import DataScheduler, LocalPlayer

GROUPS, SIZE, STEPS = 2, 4, 5
DOMAIN = Say("a", DIGITS[:5])
SHAPE = {"steps": STEPS, "lr": 3e-3, "groups": GROUPS, "group_size": SIZE, "max_tokens": 4, "save_every": 2}


class Killed(BaseException):
    """As Ctrl-C, at a moment that the test chooses."""


class Witness(LocalPlayer):
    """Notes what has been played to its end, and fails after `lifetime` of them. Whoever plays must find the weights of
    the latest update, whatever is trained beside it."""

    def __init__(self, engine, domains, lifetime=10**9):
        super().__init__(engine, domains)
        self.lifetime, self.played, self.expected = lifetime, [], None

    async def play(self, task):
        self.check()
        rollout = await super().play(task)
        self.check()
        if len(self.played) == self.lifetime:
            raise RuntimeError("killed")
        self.played.append((task.domain, task.params.seed))
        return rollout

    async def update(self, model):
        await super().update(model)
        self.expected = self.engine.model.lm_head.weight.clone()

    def check(self):
        assert torch.equal(self.engine.model.lm_head.weight, self.expected)


def grpo(engine, player, log, folder, **changes):
    settings = GRPOSettings(**SHAPE | changes)
    train_grpo(engine, {"a": DOMAIN}, settings, log, folder=folder, player=player)


def mopd(engine, player, log, folder, **changes):
    teachers = {"a": ModelTeacher(small_model(seed=1), small_tokenizer())}
    settings = MOPDSettings(**SHAPE | {"alpha": 0.5, "updates": 2} | changes)
    train_mopd(engine, {"a": DOMAIN}, teachers, settings, log, folder=folder, player=player)


def run(train, folder, *, last_step=STEPS, lifetime=10**9, **changes):
    """One process: killed after `last_step`, or after so many rollouts. Returns the weights and what it played."""
    engine = Engine(small_model(initializer_range=0.1), small_tokenizer())
    player = Witness(engine, {"a": DOMAIN}, lifetime)

    def log(step, tokens, metrics):
        if step == last_step < STEPS:
            raise Killed

    ends_early = pytest.raises((Killed, ValueError), match=r"^$|killed")
    with ends_early if last_step < STEPS or lifetime < 10**9 else nullcontext():
        train(engine, player, log, folder, **changes)
    weights = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    engine.close()
    return weights, player.played


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {train: run(train, tmp_path_factory.mktemp("whole") / "rl") for train in (grpo, mopd)}


def assert_same(got, wanted):
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.items())


KILLED_AFTER = [{"last_step": 1}, {"last_step": 2}, {"last_step": 3}, {"lifetime": 3}, {"lifetime": 19}]


@pytest.mark.parametrize("killed", KILLED_AFTER, ids=str)
@pytest.mark.parametrize("train", [grpo, mopd], ids=["grpo", "mopd"])
def test_it_ends_as_if_nobody_had_killed_it(whole, train, killed, tmp_path):
    weights, everything = whole[train]
    assert not torch.equal(weights["lm_head.weight"], small_model(initializer_range=0.1).lm_head.weight)
    _, before = run(train, tmp_path / "rl", **killed)
    assert 0 < len(before) < len(everything)
    got, after = run(train, tmp_path / "rl")
    assert_same(got, weights)
    assert Counter(before + after) == Counter(everything)
    assert len(everything) == len(set(everything)) == STEPS * GROUPS * SIZE


def test_it_may_be_killed_again_and_again(whole, tmp_path):
    weights, everything = whole[grpo]
    played = []
    for killed in ({"lifetime": 2}, {"lifetime": 11}, {"last_step": 3}, {"lifetime": 5}, {"lifetime": 0}, {}):
        got, more = run(grpo, tmp_path / "rl", **killed)
        played += more
    assert_same(got, weights)
    assert Counter(played) == Counter(everything)


@pytest.mark.parametrize("change", [{"groups": 3}, {"first_task": 7}, {"seed": 1}, {"max_staleness": 1}])
def test_other_settings_do_not_go_on_with_what_is_there(tmp_path, change):
    run(grpo, tmp_path, last_step=1)
    (name,) = change
    with pytest.raises(ValueError, match=f"holds a run whose {name} is"):
        grpo(Engine(small_model(), small_tokenizer()), None, None, tmp_path, **change)


def test_its_metrics_are_those_of_one_run(tmp_path):
    run(grpo, tmp_path / "rl", last_step=3)
    run(grpo, tmp_path / "rl")
    lines = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["tokens"] for line in lines] == sorted(line["tokens"] for line in lines)


# -- a real kill -------------------------------------------------------------------------------------------------------


class Fatal(Say):
    """Writes down each step that it is asked for, and kills its process from the given one on (another thread may have
    written the next one before it is counted)."""

    def environment(self):
        return Fatal(self.name, self.wanted)

    def step(self, message):
        step = super().step(message)
        with open(os.environ["STEPS_FILE"], "a") as file:
            file.write("step\n")
        if len(Path(os.environ["STEPS_FILE"]).read_text().split()) >= int(os.environ.get("FATAL", 10**9)):
            os.kill(os.getpid(), signal.SIGKILL)
        return step


def train_fatal(folder):
    engine = Engine(small_model(initializer_range=0.1), small_tokenizer())
    train_grpo(engine, {"a": Fatal("a", DIGITS[:5])}, GRPOSettings(**SHAPE), folder=Path(folder))
    return engine.model.state_dict()


def test_a_process_that_was_killed_goes_on(whole, tmp_path, monkeypatch):
    steps_file, rl = tmp_path / "steps", tmp_path / "rl"
    monkeypatch.setenv("STEPS_FILE", str(steps_file))
    done = subprocess.run(
        [sys.executable, "-c", f"import test_training_resume as t; t.train_fatal({str(rl)!r})"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "FATAL": "27"}, timeout=60, check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    steps_file.unlink()
    saved = 2 * GROUPS * SIZE  # what two steps have had
    finished = [json.loads(line)["place"][1:] for line in (rl / "states" / "rollouts.jsonl").read_text().splitlines()]
    assert 24 - saved <= len(finished) <= 26 - saved
    assert_same(train_fatal(rl), whole[grpo][0])
    assert len(steps_file.read_text().split()) == STEPS * GROUPS * SIZE - saved - len(finished)


# -- while rollouts go on ----------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """(step, rollouts) of each step, in all processes."""
    seen, take = [], DataScheduler.take

    def noting(scheduler):
        groups = take(scheduler)
        seen.append((scheduler.version + 1, [r for each in groups.values() for group in each for r in group]))
        return groups

    monkeypatch.setattr(DataScheduler, "take", noting)
    return seen


@pytest.mark.parametrize("train", [grpo, mopd], ids=["grpo", "mopd"])
@pytest.mark.parametrize("killed", [{}, {"last_step": 3}, {"lifetime": 21}], ids=str)
def test_beside_training_nothing_is_lost_repeated_or_too_old(train, killed, taken, tmp_path):
    changes = {"max_staleness": 2, "partial_share": 0.5}
    _, before = run(train, tmp_path / "rl", **killed, **changes)
    after = []
    if killed:
        _, after = run(train, tmp_path / "rl", **changes)
    assert len(before + after) == len(set(before + after)) == STEPS * GROUPS * SIZE
    steps = dict(taken)  # what was done again after the last state that was saved counts once
    assert sorted(steps) == [1, 2, 3, 4, 5]
    trained = [rollout for step in steps.values() for rollout in step]
    assert Counter(rollout.seed for rollout in trained) == dict.fromkeys({r.seed for r in trained}, SIZE)
    assert len(trained) == STEPS * GROUPS * SIZE
    for step, rollouts in steps.items():
        assert all(step - 1 - rollout.versions[0] <= 2 for rollout in rollouts)


def test_the_engine_has_the_new_weights_at_the_end(tmp_path):
    """A copy is trained meanwhile (`Witness` sees that what is played with does not move)."""
    engine, log = Engine(small_model(initializer_range=0.1), small_tokenizer()), Log()
    seen = []

    class Last(Witness):
        async def update(self, model):
            await super().update(model)
            assert model is not engine.model
            seen.append(model)

    grpo(engine, Last(engine, {"a": DOMAIN}), log, None, max_staleness=1)
    assert len(log) == STEPS
    assert len(seen) == STEPS + 1
    assert_same(engine.model.state_dict(), seen[-1].state_dict())
    assert not torch.equal(engine.model.lm_head.weight, small_model(initializer_range=0.1).lm_head.weight)
    fresh = Engine(engine.model, small_tokenizer())
    prompt = [[1, 2, 3, 4]]
    assert engine.generate(prompt)[0].logprobs == fresh.generate(prompt)[0].logprobs


def test_the_engine_has_the_weights_of_the_last_whole_step_where_training_was_interrupted():
    engine = Engine(small_model(initializer_range=0.1), small_tokenizer())
    seen = []

    class Last(Witness):
        async def update(self, model):
            await super().update(model)
            seen.append(model.lm_head.weight.clone())

    def log(step, tokens, metrics):
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        grpo(engine, Last(engine, {"a": DOMAIN}), log, None, max_staleness=1)
    assert torch.equal(engine.model.lm_head.weight, seen[2])


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_engine_that_did_not_play_has_the_new_weights_too(staleness):
    """In whatever it keeps them: here in few bits."""
    players = Engine(small_model(initializer_range=0.1), small_tokenizer())
    engine = Engine(small_model(initializer_range=0.1), small_tokenizer(), dtype=FEW_BITS)
    prompt = [[1, 2, 3, 4]]
    engine.generate(prompt)
    grpo(engine, LocalPlayer(players, {"a": DOMAIN}), None, None, max_staleness=staleness)
    fresh = Engine(engine.model, small_tokenizer(), dtype=FEW_BITS)
    assert engine.generate(prompt)[0].logprobs == fresh.generate(prompt)[0].logprobs
