"""Engines in Ray actors play as the one in this process does."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_player import rollouts_of
from small_world import DIGITS, Chat, Say, small_model, small_tokenizer

from mimoflash.engine import Engine, SamplingParams
from mimoflash.posttrain import GRPOSettings, train_grpo
from mimoflash.posttrain.ray_players import RayPlayers
from mimoflash.posttrain.rollout import Task
from mimoflash.posttrain.scheduler import DataScheduler, LocalPlayer

DOMAINS = {"say": Say("a", DIGITS[:5]), "chat": Chat("go", "")}


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[rl\]'"):
        RayPlayers({}, small_model(), small_tokenizer(), DOMAINS)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    here = {"PYTHONPATH": str(Path(__file__).parent)}  # domains are pickled by the names of their classes
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": here})
    yield ray
    ray.shutdown()


def trained(player, monkeypatch, **changes):
    """Weights, and all rollouts in the order in which the steps had them."""
    taken, take = [], DataScheduler.take

    def noting(scheduler):
        groups = take(scheduler)
        taken.extend(rollouts_of(groups))
        return groups

    engine = Engine(small_model(initializer_range=0.1), small_tokenizer())
    settings = GRPOSettings(steps=3, lr=3e-3, groups=2, group_size=4, max_tokens=8, max_turns=2, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(DataScheduler, "take", noting)
        train_grpo(engine, DOMAINS, settings, player=player(engine))
    return engine.model.state_dict(), taken


def test_two_workers_play_as_the_engine_of_this_process(ray, monkeypatch):
    weights, rollouts = trained(lambda engine: LocalPlayer(engine, DOMAINS), monkeypatch)
    model = small_model(initializer_range=0.1)
    assert not torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    with RayPlayers({}, model, small_tokenizer(), DOMAINS) as players:
        others, elsewhere = trained(lambda engine: players, monkeypatch)
    assert len(rollouts) == len(elsewhere) == 3 * 2 * 2 * 4
    for one, other in zip(rollouts, elsewhere, strict=True):
        assert torch.equal(one.routes, other.routes)
        one.routes = other.routes = None
        assert one == other  # tokens, log-probabilities, messages, ...
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_the_engine_that_did_not_play_has_the_new_weights(ray, monkeypatch):
    with RayPlayers({}, small_model(), small_tokenizer(), DOMAINS, workers=1) as players:
        engines = []
        _, rollouts = trained(lambda engine: engines.append(engine) or players, monkeypatch, max_staleness=1)
    assert len(rollouts) == 48
    fresh = Engine(engines[0].model, small_tokenizer())
    assert engines[0].generate([[1, 2, 3]])[0].logprobs == fresh.generate([[1, 2, 3]])[0].logprobs


class Who(Say):
    """Says in which process it was played, after a while; some end it."""

    def __init__(self, name, folder):
        super().__init__(name, "")
        self.folder = folder

    def environment(self):
        return Who(self.name, self.folder)

    def step(self, message):
        (self.folder / f"{os.getpid()} {self.seed} {time.monotonic_ns()}").touch()
        if self.seed >= 100:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        return super().step(message)


def tasks(seeds, domain="who"):
    return [Task(domain, seed, SamplingParams(max_tokens=3, seed=seed)) for seed in seeds]


def played(folder):
    """The seeds that each process had, with repetitions."""
    by_process = {}
    for file in folder.iterdir():
        process, seed, _ = file.name.split()
        by_process.setdefault(process, []).append(int(seed))
    return by_process


def test_work_is_shared_and_a_dead_worker_is_replaced(ray, tmp_path):
    model, state = small_model(), small_model(seed=1)
    domains = {"who": Who("a", tmp_path)}

    async def run(players):
        await players.update(state)
        await asyncio.gather(*(players.play(task) for task in tasks(range(8))))
        shares = played(tmp_path)
        assert [len(seeds) for seeds in shares.values()] == [4, 4]
        under_way = [asyncio.create_task(players.play(task)) for task in tasks(range(8))]
        while sum(map(len, played(tmp_path).values())) < 16:
            await asyncio.sleep(0.02)
        os.kill(int(next(iter(shares))), signal.SIGKILL)
        rollouts = await asyncio.gather(*under_way)
        by_process = played(tmp_path)
        assert len(by_process) in (2, 3)  # the other one may have been the less busy
        assert sum(map(len, by_process.values())) == 8 + 8 + 4
        later = await asyncio.gather(*(players.play(task) for task in tasks(range(8))))
        assert len(played(tmp_path)) == 3
        return rollouts, later

    with RayPlayers({}, model, small_tokenizer(), domains) as players:
        rollouts, later = asyncio.run(run(players))
    engine = Engine(state, small_tokenizer())

    async def wanted():
        local = LocalPlayer(engine, domains)
        return await asyncio.gather(*(local.play(task) for task in tasks(range(8))))

    wanted = [rollout.tokens for rollout in asyncio.run(wanted())]
    assert [r.tokens for r in rollouts] == [r.tokens for r in later] == wanted  # with the latest weights


def test_a_task_that_ends_every_worker_is_an_error(ray, tmp_path):
    with RayPlayers({}, small_model(), small_tokenizer(), {"who": Who("a", tmp_path)}, workers=1) as players:
        with pytest.raises(RuntimeError, match=r"seed 100 in who died 3 times"):
            asyncio.run(players.play(tasks([100])[0]))
        assert asyncio.run(players.play(tasks([1])[0])).turns
    assert len(played(tmp_path)) == 4


def test_a_cancelled_task_ends_in_its_worker(ray, tmp_path):
    async def run(players):
        playing = asyncio.create_task(players.play(tasks([1], "chat")[0]))
        await asyncio.sleep(0.5)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        assert players._busy == [0]
        return await asyncio.wait_for(players.play(tasks([2])[0]), 20)

    model = small_model()
    domains = {"who": Who("a", tmp_path), "chat": Chat("go", "")}
    with RayPlayers({}, model, small_tokenizer(), domains, workers=1) as players:
        assert asyncio.run(run(players)).turns


def test_errors_of_the_engine_come_through(ray):
    with RayPlayers({}, small_model(), small_tokenizer(), DOMAINS, workers=1) as players, pytest.raises(KeyError):
        asyncio.run(players.play(tasks([1], "nowhere")[0]))
