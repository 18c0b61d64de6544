"""The data scheduler: which task is played next, and which finished groups a training step gets.

What is played are single sequences, each on its own from its first turn to its reward; weights may move on while they
are under way (arXiv 2601.02780, section 4).
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mimoflash.engine import Engine, SamplingParams
from mimoflash.model import Transformer
from mimoflash.posttrain.background import Background
from mimoflash.posttrain.journal import Journal, Place
from mimoflash.posttrain.rollout import Rollout, Task, in_thread, own_sampling, play
from mimoflash.train import merged_state
from mimoflash.world import Domain, seeds

Group = list[Rollout]  # of one task


@dataclass(frozen=True)
class Source:
    """What is drawn from a domain: `groups` tasks a step, sampled as `params` say. A higher `priority` runs first."""

    domain: Domain
    groups: int
    params: SamplingParams
    max_turns: int
    thinking: bool
    timeout: float | None
    priority: int = 0


class Player(Protocol):
    """Whoever plays: the engine of this process, or others elsewhere."""

    async def play(self, task: Task) -> Rollout: ...

    async def update(self, model: Transformer) -> None:
        """From now on with the weights of `model`; what is under way goes on with them."""
        ...


class LocalPlayer:
    """The engine in this process."""

    def __init__(self, engine: Engine, domains: Mapping[str, Domain]):
        self.engine, self.domains = engine, domains

    async def play(self, task: Task) -> Rollout:
        return await play(self.engine, self.domains[task.domain], task)

    async def update(self, model: Transformer) -> None:
        self.engine.update_weights(None if model is self.engine.model else merged_state(model))


@dataclass
class _Open:
    """A group that no step has had yet. `version`: of the weights when it began."""

    source: str
    number: int
    seed: int
    version: int
    rollouts: list[Rollout | None]
    under_way: dict[int, asyncio.Task[None]] = field(default_factory=dict)  # by member
    finished: int = 0  # at which moment: the how-manieth

    @property
    def is_ready(self) -> bool:
        return None not in self.rollouts


class DataScheduler:
    """Within `with`, plays groups of `group_size` rollouts of each source's training tasks, from `first_task` on.

    A step gets the groups that its sources' quotas ask for, none of which began more than `max_staleness` versions of
    the weights before; 0: all of them are played between two steps. Of the rollouts that are open at a time at most
    `partial_share` of a step's may go on with new weights, the others begin again. Where an environment breaks, a
    rollout is played `retries` more times. With a journal, what it has is not played.
    """

    def __init__(
        self, player: Player, sources: Mapping[str, Source], *, steps: int, group_size: int, seed: int,
        first_task: int = 0, max_staleness: int = 0, partial_share: float = 1.0, retries: int = 0,
        journal: Journal | None = None,
    ):
        self.player, self.sources, self.steps, self.group_size, self.seed = player, sources, steps, group_size, seed
        self.max_staleness, self.partial_share, self.retries = max_staleness, partial_share, retries
        self.journal = journal
        self.version = self._coming = 0  # of the weights: what all have, what some may have while they are exchanged
        self.restarted = 0  # rollouts that had to begin again
        self._begun = dict.fromkeys(sources, 0)  # groups
        self._next_task = dict.fromkeys(sources, first_task)
        self._open: dict[str, list[_Open]] = {name: [] for name in sources}
        self._finished = 0
        self._failure: BaseException | None = None

    def __enter__(self) -> "DataScheduler":
        self._seeds = {
            name: seeds(source.domain, "train", self._next_task[name]) for name, source in self.sources.items()
        }
        self._changed = asyncio.Event()
        self._background = Background().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._background.__exit__(*error)
        finally:
            if self.journal is not None:
                self.journal.close()

    # -- what a training loop calls ---------------------------------------------------------------------------------

    def begin(self, model: Transformer) -> None:
        """Before the first `take`: whoever plays has these weights."""
        self._background.run(self.player.update(model))

    def take(self) -> dict[str, list[Group]]:
        """The next step's groups of each source; waits until they are there. Raises what the player raised."""
        return self._background.run(self._take())

    def update(self, model: Transformer) -> None:
        """A step has been taken: the rollouts go on with these weights."""
        self._background.run(self._update(model))

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on, beside the journal; to be asked for between `update` and `take`."""
        still = {name: [[g.number, g.seed, g.version] for g in groups] for name, groups in self._open.items()}
        return {"version": self.version, "begun": self._begun, "next_task": self._next_task, "open": still}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Before `with`."""
        self.version = self._coming = state["version"]
        self._begun, self._next_task = dict(state["begun"]), dict(state["next_task"])
        self._open = {
            name: [_Open(name, number, seed, version, [None] * self.group_size) for number, seed, version in groups]
            for name, groups in state["open"].items()
        }

    def forget_taken(self) -> None:
        """The journal drops what steps have had that are saved."""
        self._background.run(self._forget_taken())

    # -- in the background ------------------------------------------------------------------------------------------

    async def _take(self) -> dict[str, list[Group]]:
        await self._begin_more()
        while not all(map(self._is_enough, self.sources)):
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        return {name: self._choose(name) for name in self.sources}

    def _next(self, name: str) -> list[_Open]:
        """The next step's groups: those that were finished first, as far as the others may wait for later steps."""
        groups, left = self._open[name], list[_Open]()
        for group in sorted(groups, key=lambda group: (not group.is_ready, group.finished), reverse=True):
            if len(left) < len(groups) - self.sources[name].groups and self._may_wait([*left, group]):
                left.append(group)
        return [group for group in groups if group not in left]

    def _may_wait(self, groups: list[_Open]) -> bool:
        """Whether the steps after the next one, each with its quota of them, find none too old."""
        quota = self.sources[groups[0].source].groups
        oldest_first = sorted(group.version for group in groups)
        return all(
            self.version + 1 + place // quota <= version + self.max_staleness
            for place, version in enumerate(oldest_first)
        )

    def _is_enough(self, name: str) -> bool:
        return all(group.is_ready for group in self._next(name))

    def _choose(self, name: str) -> list[Group]:
        chosen = self._next(name)
        assert len(chosen) == self.sources[name].groups, "no more begin with one version than the steps after it take"
        self._open[name] = [group for group in self._open[name] if group not in chosen]
        return [[rollout for rollout in group.rollouts if rollout is not None] for group in chosen]

    async def _begin_more(self) -> None:
        """As many groups as the steps take that may be trained on what this version of the weights plays."""
        for groups in self._open.values():  # of an earlier process
            for group in groups:
                self._start(group)
        last = min(self.version + 1 + self.max_staleness, self.steps)
        for name in sorted(self.sources, key=lambda name: -self.sources[name].priority):
            while self._begun[name] < last * self.sources[name].groups:
                seed = await in_thread(next, self._seeds[name], timeout=self.sources[name].timeout)
                group = _Open(name, self._begun[name], seed, self.version, [None] * self.group_size)
                self._begun[name] += 1
                self._next_task[name] = seed + 1
                self._open[name].append(group)
                self._start(group)

    def _start(self, group: _Open) -> None:
        """Whatever of it is neither there nor under way."""
        for member, rollout in enumerate(group.rollouts):
            if rollout is None and member not in group.under_way:
                group.under_way[member] = asyncio.create_task(self._play(group, member))

    async def _play(self, group: _Open, member: int) -> None:
        place = Place(group.source, group.number, member)
        try:
            rollout = self.journal.find(place) if self.journal is not None else None
            if rollout is None:
                rollout = await self._played(group, place)
                if self.journal is not None:
                    self.journal.add(place, rollout)
        except Exception as error:
            self._failure = error
        else:
            group.rollouts[member] = rollout
            self._finished += 1
            group.finished = self._finished
        if group.under_way.get(member) is asyncio.current_task():  # and not another one in its place
            del group.under_way[member]
        self._changed.set()

    async def _played(self, group: _Open, place: Place) -> Rollout:
        source = self.sources[place.source]
        for attempt in range(1 + self.retries):
            began = self.version
            params = own_sampling(replace(source.params, seed=self.seed), *place, attempt)
            task = Task(place.source, group.seed, params, source.max_turns, source.thinking, source.timeout,
                        source.priority)
            rollout = await self.player.play(task)
            if "error" not in rollout.info:
                break
        rollout.versions = (began, self._coming)
        return rollout

    async def _update(self, model: Transformer) -> None:
        for name in self.sources:
            self._break_off(name)
        self._coming += 1
        await self.player.update(model)
        self.version += 1
        if self.max_staleness:
            await self._begin_more()

    def _break_off(self, name: str) -> None:
        """Rollouts under way of which there would be too many that several versions have sampled: the youngest. They
        begin again with the new weights."""
        groups = self._open[name]
        room = int(self.partial_share * self.sources[name].groups * self.group_size)
        room -= sum(r is not None and r.versions[0] != r.versions[1] for group in groups for r in group.rollouts)
        going = [(group, member) for group in groups for member in group.under_way]  # in the order of their beginning
        for group, member in going[max(room, 0) :]:
            group.under_way.pop(member).cancel()
            self.restarted += 1

    async def _forget_taken(self) -> None:
        """In the background, where rollouts are added."""
        if self.journal is not None:
            still = {(group.source, group.number) for groups in self._open.values() for group in groups}
            self.journal.keep(lambda place: place[:2] in still or place.number >= self._begun[place.source])
