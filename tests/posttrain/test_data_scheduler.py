"""The data scheduler: what is played, and which groups a step gets, whatever takes how long."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_player import MODEL, FakePlayer, rollouts_of, source, steps_of
from hypothesis import example, given
from hypothesis import strategies as st
from small_world import Say, small_model, small_tokenizer

from mimoflash.engine import Engine, SamplingParams
from mimoflash.posttrain.rollout import Task, in_thread, play
from mimoflash.posttrain.scheduler import DataScheduler, LocalPlayer, Source


@given(
    staleness=st.integers(0, 3), quotas=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    group_size=st.integers(1, 3), delays=st.randoms(use_true_random=False), pause=st.sampled_from([0.0, 0.005]),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
@example(staleness=3, quotas=[1], group_size=1, delays=random.Random(1), pause=0.0, share=1.0)
def test_steps_get_their_quotas_once_and_nothing_too_old(staleness, quotas, group_size, delays, pause, share):
    sources = {f"domain {i}": source(groups=quota) for i, quota in enumerate(quotas)}
    player = FakePlayer(random.Random(delays.random()))
    taken, scheduler = steps_of(
        player, sources, group_size=group_size, max_staleness=staleness, partial_share=share, pause=pause
    )
    for step, groups in enumerate(taken):
        assert {name: len(each) for name, each in groups.items()} == {n: s.groups for n, s in sources.items()}
        assert all(len(group) == group_size for each in groups.values() for group in each)
        for name, each in groups.items():
            for group in each:
                assert len({rollout.seed for rollout in group}) == 1
                assert 0 <= step - player.first_version[name, group[0].seed] <= staleness
            several = [len(set(r.info["sampled_by"])) > 1 for group in each for r in group]
            assert sum(several) <= share * len(several)
        for rollout in rollouts_of(groups):
            sampled_by = rollout.info["sampled_by"]
            assert rollout.versions[0] <= sampled_by[0] <= sampled_by[-1] <= rollout.versions[1] <= step
    played = Counter(rollout.info["for"] for groups in taken for rollout in rollouts_of(groups))
    assert set(played.values()) == {1}
    assert len(played) == sum(quotas) * group_size * len(taken)
    assert Counter(task.params.seed for task in player.finished) == played
    assert len(player.begun) - len(player.finished) <= scheduler.restarted  # which may have been before they began
    assert player.running == 0
    for name, each in sources.items():
        tasks = {group[0].seed for groups in taken for group in groups[name]}
        assert len(tasks) == each.groups * len(taken)


def test_a_step_does_not_wait_for_a_slow_group_that_may_come_later():
    class OneIsSlow(FakePlayer):
        async def play(self, task):
            await asyncio.sleep(0.5 * (task.seed == 0))
            return await super().play(task)

    scheduler = DataScheduler(OneIsSlow(), {"go": source(groups=1)}, steps=3, group_size=2, seed=0, max_staleness=1)
    with scheduler:
        scheduler.begin(MODEL)
        order = []
        for _ in range(3):
            order.append(scheduler.take()["go"][0][0].seed)
            scheduler.update(MODEL)
    assert order[0] != 0
    assert order[1] == 0  # it would be too old for the third


def test_several_steps_ahead_are_really_used():
    """What is finished first is taken first, and what is played while a step is taken is there for a later one."""
    player = FakePlayer(random.Random(3), longest=0.03)
    taken, _ = steps_of(player, {"go": source()}, max_staleness=3, steps=10, pause=0.01)
    ages = [step - player.first_version["go", r.seed] for step, groups in enumerate(taken) for r in rollouts_of(groups)]
    assert max(ages) > 1
    numbers = [rollout.seed for groups in taken for rollout in rollouts_of(groups)]
    assert numbers != sorted(numbers)


@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_without_staleness_steps_do_not_depend_on_how_long_things_take(delays, groups):
    def played(delays):
        sources = {"a": source(groups=groups), "b": source(groups=1)}
        taken, _ = steps_of(FakePlayer(delays), sources, steps=3)
        return [
            {name: [[(r.seed, r.info["for"]) for r in group] for group in each] for name, each in step.items()}
            for step in taken
        ]

    assert played(random.Random(delays.random())) == played(random.Random(0))


def test_what_may_not_go_on_with_new_weights_begins_again():
    player = FakePlayer(random.Random(1), longest=0.05)
    taken, scheduler = steps_of(player, {"go": source(groups=4)}, max_staleness=1, partial_share=0.25, steps=8)
    several = [sum(len(set(r.info["sampled_by"])) > 1 for r in rollouts_of(step)) for step in taken]
    assert 0 < max(several) <= 2
    assert scheduler.restarted > 0
    assert len(player.begun) > len(player.finished)
    again = Counter(task.params.seed for task in player.begun)
    assert max(again.values()) > 1  # the same task, with the same draws


def test_a_broken_rollout_is_played_again_otherwise():
    player = FakePlayer(fails=lambda task: task.seed % 2 == 0)
    taken, _ = steps_of(player, {"go": source(groups=4)}, steps=2, retries=2)
    attempts = Counter(task.seed for task in player.begun)
    assert set(attempts) == {rollout.seed for step in taken for rollout in rollouts_of(step)}
    assert all(count == (6 if seed % 2 == 0 else 2) for seed, count in attempts.items())
    assert len({task.params.seed for task in player.begun}) == len(player.begun)
    assert all(("error" in r.info) == (r.seed % 2 == 0) for step in taken for r in rollouts_of(step))

    once = set()
    player = FakePlayer(fails=lambda task: task.seed not in once and not once.add(task.seed))
    taken, _ = steps_of(player, {"go": source(groups=4)}, steps=2, retries=1)
    assert not any("error" in rollout.info for step in taken for rollout in rollouts_of(step))


def test_an_attempt_under_new_weights_is_not_of_several_versions():
    failing = {}
    player = FakePlayer(longest=0.02, fails=lambda task: failing.setdefault(task.params.seed, player.version == 0))
    taken, _ = steps_of(player, {"go": source()}, max_staleness=2, retries=5)
    later = [r for step in taken for r in rollouts_of(step) if r.info["sampled_by"][0] > 0]
    assert later
    assert all(r.versions[0] == r.info["sampled_by"][0] for r in later)


@pytest.mark.parametrize("staleness", [0, 2])
def test_what_a_player_raises_reaches_the_training_loop(staleness):
    def fails(task):
        if player.version >= 2:  # a slow machine may begin nothing at the very second
            raise RuntimeError("out of memory")

    player = FakePlayer(fails=fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        steps_of(player, {"go": source()}, max_staleness=staleness)
    assert player.running == 0


def test_a_higher_priority_comes_first():
    player = FakePlayer()
    steps_of(player, {"low": source(priority=-1), "high": source(priority=3), "mid": source()}, steps=1)
    assert [task.domain for task in player.begun] == ["high"] * 4 + ["mid"] * 4 + ["low"] * 4
    assert [task.priority for task in player.begun] == [3] * 4 + [0] * 4 + [-1] * 4


@pytest.mark.parametrize("staleness", [0, 1])
def test_leaving_in_the_middle_leaves_nothing_running(staleness):
    player = FakePlayer(longest=0.001)
    scheduler = DataScheduler(player, {"go": source()}, steps=3, group_size=2, seed=0, max_staleness=staleness)
    with pytest.raises(KeyboardInterrupt), scheduler:  # noqa: PT012 (between two statements of a training loop)
        scheduler.begin(MODEL)
        scheduler.take()
        player.longest = 60
        scheduler.update(MODEL)
        scheduler._background.start(scheduler._take())
        while not player.running:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert player.running == 0
    assert not any(thread.name == "mimoflash-rollouts" for thread in threading.enumerate())


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_step_is_waited_for():
    player = FakePlayer(longest=0.001)
    scheduler = DataScheduler(player, {"go": source()}, steps=3, group_size=2, seed=0)
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    with scheduler:
        scheduler.begin(MODEL)
        player.longest = 60
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            scheduler.take()
        assert player.running > 0
    assert player.running == 0


# -- the engine as a player --------------------------------------------------------------------------------------------


class Awkward(Say):
    """Some seeds' environments never answer, or end in ways that no environment should."""

    def environment(self):
        return Awkward(self.name, self.wanted)

    def step(self, message):
        if self.seed % 4 == 1:
            threading.Event().wait()
        if self.seed % 4 == 2:
            raise StopIteration
        if self.seed % 4 == 3:
            sys.exit("no more")
        return super().step(message)


def test_an_environment_that_hangs_or_exits_costs_its_own_rollout():
    engine = Engine(small_model(), small_tokenizer())
    sources = {"go": Source(Awkward("go", [""]), 8, SamplingParams(max_tokens=3), 1, True, 0.3)}
    player = LocalPlayer(engine, {"go": sources["go"].domain})
    scheduler = DataScheduler(player, sources, steps=1, group_size=1, seed=0)
    began = time.monotonic()
    with scheduler:
        scheduler.begin(engine.model)
        rollouts = rollouts_of(scheduler.take())
    assert time.monotonic() - began < 5
    errors = {1: "TimeoutError: no answer within 0.3 s", 2: "StopIteration", 3: "SystemExit"}
    for rollout in rollouts:
        assert errors.get(rollout.seed % 4, "") in rollout.info.get("error", "")
        assert (rollout.reward == 1.0) == (rollout.seed % 4 == 0) == ("error" not in rollout.info)
    engine.close()


def test_a_process_ends_though_an_environment_hangs():
    program = (
        "import test_data_scheduler, small_world as s, threading; from mimoflash.posttrain import play_tasks\n"
        "from mimoflash.engine import Engine, SamplingParams\n"
        "engine = Engine(s.small_model(), s.small_tokenizer())\n"
        "test_data_scheduler.asyncio.run(test_data_scheduler.played_by(engine)); print('played')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}, check=False,
    )
    assert done.stdout == "played\n", done.stderr
    assert done.returncode == 0


async def played_by(engine):
    rollout = await play(engine, Awkward("go", ""), Task("go", 1, SamplingParams(max_tokens=2), timeout=0.2))
    assert "no answer" in rollout.info["error"]


def test_a_cancelled_wait_is_over_though_its_answer_has_come():
    """Else a rollout that must begin again would go on to its end."""

    async def run():
        loop, answered = asyncio.get_running_loop(), threading.Event()
        settled = loop.call_soon_threadsafe

        def call_soon_threadsafe(*args):
            settled(*args)
            answered.set()

        loop.call_soon_threadsafe = call_soon_threadsafe
        task = loop.create_task(in_thread(lambda: "answer", timeout=5))
        await asyncio.sleep(0)
        answered.wait()  # it is queued: one round of the loop and the future has it
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_the_priority_reaches_the_engine():
    asked = []

    async def answer(tokens, params, *, priority):
        asked.append(priority)
        raise RuntimeError("enough")

    config = SimpleNamespace(max_position_embeddings=512)
    engine = SimpleNamespace(answer=answer, tokenizer=small_tokenizer(), model=SimpleNamespace(config=config))
    with pytest.raises(RuntimeError, match="enough"):
        asyncio.run(play(engine, Say("go", ""), Task("go", 1, SamplingParams(), priority=7)))
    assert asked == [7]
