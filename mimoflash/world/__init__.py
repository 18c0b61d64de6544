"""The world: tasks with verifiers, each a pure function of its seed, that a model is trained on and judged by."""

from collections.abc import Callable
from typing import Any

from mimoflash.world.arithmetic import Arithmetic
from mimoflash.world.episode import Episode, play
from mimoflash.world.gym import Gymnasium
from mimoflash.world.maze import Maze
from mimoflash.world.own_tasks import own_tasks
from mimoflash.world.protocol import (
    Demonstration,
    Domain,
    Environment,
    Message,
    Split,
    Step,
    Tool,
    is_held_out,
    seeds,
    task_id,
)
from mimoflash.world.reasoning_gym import ReasoningGym
from mimoflash.world.textarena import TextArena
from mimoflash.world.tools import Tools

__all__ = [
    "DOMAINS",
    "Demonstration",
    "Domain",
    "Environment",
    "Episode",
    "Message",
    "Split",
    "Step",
    "Tool",
    "domain",
    "is_held_out",
    "play",
    "seeds",
    "task_id",
]

DOMAINS: dict[str, Callable[..., Domain]] = {
    "arithmetic": Arithmetic,
    "file": own_tasks,
    "gymnasium": Gymnasium,
    "maze": Maze,
    "reasoning_gym": ReasoningGym,
    "textarena": TextArena,
    "tools": Tools,
}


def domain(name: str, **options: Any) -> Domain:
    """The domain of that name with its options (the levels of difficulty: see the domain's class).

    Raises ValueError for a name or an option that is not known, ImportError where an extra is missing.
    """
    if name not in DOMAINS:
        raise ValueError(f"there is no domain {name!r}; the domains are {', '.join(sorted(DOMAINS))}")
    try:
        return DOMAINS[name](**options)
    except TypeError as error:
        raise ValueError(f"domain {name!r} does not take these options: {error}") from error
