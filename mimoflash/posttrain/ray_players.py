"""Rollouts that are played in other processes, on this machine or on many, by Ray actors with an engine each."""

import asyncio
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from mimoflash.engine import Engine
from mimoflash.model import Transformer
from mimoflash.posttrain.rollout import Rollout, Task
from mimoflash.posttrain.scheduler import LocalPlayer
from mimoflash.text import Tokenizer
from mimoflash.train import merged_state
from mimoflash.world import Domain

ATTEMPTS = 3  # of a task whose worker dies


class RayPlayers:
    """A `Player` with `workers` engines, each of them `Engine(model, tokenizer, **settings)` in a Ray actor; the least
    busy one plays the next task. A worker that dies is replaced, and its tasks are played again from their beginning.

    Ray is started on this machine where the program has not connected to a cluster by ray.init; `close`, or the end of
    `with`, ends the workers, and Ray if it was started here. Raises ImportError where Ray is not installed; `play`
    raises what the engine raises, RuntimeError for a task whose worker died ATTEMPTS times.
    """

    def __init__(
        self, settings: Mapping[str, Any], model: Transformer, tokenizer: Tokenizer, domains: Mapping[str, Domain],
        workers: int = 2,
    ):
        if workers < 1:
            raise ValueError(f"workers is {workers}: it must be at least 1")
        self._ray = _import_ray()
        self._is_own = not self._ray.is_initialized()
        if self._is_own:
            self._ray.init(include_dashboard=False, log_to_driver=False)
        gpus = 1 if model.lm_head.weight.device.type == "cuda" else 0
        self._check_room(workers, gpus)
        self._actor = self._ray.remote(_Worker).options(num_cpus=1, num_gpus=gpus)
        self._common = self._ray.put((dict(settings), model, tokenizer, dict(domains)))
        self._threads = max((os.cpu_count() or 1) // workers, 1)
        self._weights: Any = None  # as a reference in Ray's store; None: the model's first ones
        self._workers = [self._start() for _ in range(workers)]
        self._busy = [0] * workers  # tasks that each of them plays

    def _check_room(self, workers: int, gpus: int) -> None:
        """They would wait for it without end."""
        there = self._ray.cluster_resources()
        for kind, needed in (("CPU", workers), ("GPU", workers * gpus)):
            if there.get(kind, 0) < needed:
                has = f"{there.get(kind, 0):.0f}"
                raise ValueError(f"{workers} workers need {needed} {kind}s, Ray has {has}: ask for fewer workers")

    def __enter__(self) -> "RayPlayers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    async def play(self, task: Task) -> Rollout:
        death: Exception | None = None
        for _ in range(ATTEMPTS):
            place = self._busy.index(min(self._busy))
            worker = self._workers[place]
            self._busy[place] += 1
            playing = worker.play.remote(task)
            try:
                return await playing
            except self._ray.exceptions.RayActorError as error:
                death = error
                self._replace(place, worker)
            except asyncio.CancelledError:
                self._ray.cancel(playing)
                raise
            finally:
                self._busy[place] -= 1
        raise RuntimeError(
            f"the workers that played the task of seed {task.seed} in {task.domain} died {ATTEMPTS} times (too little "
            f"memory for so many, or an environment that ends its process?); at last: {death}"
        )

    async def update(self, model: Transformer) -> None:
        state = {name: tensor.detach().cpu() for name, tensor in merged_state(model).items()}
        self._weights = self._ray.put(state)
        await asyncio.gather(*(self._update(place) for place in range(len(self._workers))))

    async def _update(self, place: int) -> None:
        worker = self._workers[place]
        try:
            await worker.update.remote(self._weights)
        except self._ray.exceptions.RayActorError:
            self._replace(place, worker)

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers = []
        if self._is_own:
            self._ray.shutdown()

    def _start(self) -> Any:
        return self._actor.remote(self._common, self._weights, self._threads)

    def _replace(self, place: int, dead: Any) -> None:
        """Unless another task that it played has noticed before."""
        if self._workers[place] is dead:
            self._ray.kill(dead)  # one that is out of reach may come back
            self._workers[place] = self._start()


class _Worker:
    """Runs in an actor: many tasks at a time, as its methods are coroutines."""

    def __init__(self, common: Any, weights: Mapping[str, torch.Tensor] | None, threads: int):
        settings, model, tokenizer, domains = common
        torch.set_num_threads(threads)
        self.engine = Engine(model, tokenizer, **settings)
        self.player = LocalPlayer(self.engine, domains)
        if weights is not None:
            self.engine.update_weights(weights)

    async def play(self, task: Task) -> Rollout:
        return await self.player.play(task)

    async def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.engine.update_weights(weights)


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise ImportError("playing in other processes needs Ray: pip install -e '.[rl]'") from None
    return ray
