"""Any gymnasium environment with discrete actions as a game in text, MiniGrid and BabyAI among them; extra `rl`."""

import difflib
import re
from collections.abc import Sequence
from functools import cached_property
from random import Random
from typing import Any

from mimoflash.world.answers import content_of
from mimoflash.world.gym_text import KNOWN, observed
from mimoflash.world.openings import numbered, open_alike
from mimoflash.world.protocol import Demonstration, Message, Step, Tool
from mimoflash.world.randomness import OwnRandomness

CHANCE_GAMES = 100
_LONGEST_ANSWER = 400  # characters at an answer's end in which its action is looked for


class Gymnasium:
    """The environment of that id, made with `config`, over turns: the last word of an answer is the action.

    `actions` names the actions in their order where the environment does not, and `about` says what the game is;
    MiniGrid, BabyAI and gymnasium's own small games need neither. A message that ends in no action is told so, and
    counts as one of `max_messages`, after which the game is over (or by the environment's own limit).

    A game passes, and earns 1.0, where its return (the sum of the environment's rewards) is more than `above`: 0 suits
    MiniGrid, FrozenLake and Taxi; give 195 for CartPole, -200 for MountainCar. The return is in `info`.

    The seed is the environment's. Where most games open alike (FrozenLake's always the same map), the opening has the
    game's number, and held-out games differ from those of training in what is hidden or left to chance, if in anything.

    The random guesser draws each action evenly; chance is his pass rate over the first 100 seeds.

    Raises ImportError without the extra; ValueError for an id or a configuration that gymnasium does not know, for
    actions that are not discrete, and for observations that are pictures.
    """

    def __init__(
        self, id: str, max_messages: int = 50, above: float = 0.0, actions: Sequence[str] = (), about: str = "",
        **config: Any,
    ) -> None:
        if max_messages < 1:
            raise ValueError(f"gymnasium: max_messages is {max_messages}; 1 or more is needed")
        self.name = f"gymnasium/{id}"
        self.id, self.max_messages, self.above, self.config = id, max_messages, above, config
        environment = self.make()
        if "ansi" in environment.metadata.get("render_modes", ()):  # it draws itself in text
            environment.close()
            self.config = {"render_mode": "ansi", **config}
            environment = self.make()
        self.actions, self.about = self._words(environment, actions, about)
        environment.close()
        try:
            game = Game(self)
            game.open(0)
            game.close()
        except Exception as error:  # each environment refuses, or breaks, in its own way
            raise ValueError(f"{self.name}: no game of it can be opened: {error}") from error

    def _words(self, environment: Any, actions: Sequence[str], about: str) -> tuple[list[str], str]:
        """The actions' names, and what the game is."""
        space = environment.action_space
        if not hasattr(space, "n") or getattr(space, "start", 0) != 0:
            raise ValueError(f"{self.name}: its actions are {space}; only Discrete(n) can be played")
        classes = [each.__name__ for each in type(environment.unwrapped).__mro__]
        known, says = next((KNOWN[name] for name in classes if name in KNOWN), ((), ""))
        names = list(actions or known[: space.n] or map(str, range(space.n)))
        if len({str(name).lower() for name in names}) != space.n or len(names) != space.n:
            raise ValueError(f"{self.name}: actions is {names}; it needs {space.n} different names")
        return names, about or says

    def make(self) -> Any:
        """The gymnasium environment."""
        try:
            import gymnasium

            if self.id.startswith(("MiniGrid-", "BabyAI-")):
                import minigrid  # noqa: F401  registers its environments
        except ImportError as error:
            raise ImportError("the domain gymnasium needs an extra: pip install -e '.[rl]'") from error
        try:
            with OwnRandomness(0):
                return gymnasium.make(self.id, disable_env_checker=True, **self.config)
        except (gymnasium.error.Error, ImportError) as error:
            near = [] if self.id in gymnasium.registry else difflib.get_close_matches(self.id, gymnasium.registry)
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            raise ValueError(f"{self.name}: {error}{hint}") from error
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{self.name}: its configuration {self.config} is refused: {error}") from error

    @cached_property
    def alike(self) -> bool:
        """Whether most games open alike."""
        game = Game(self)
        try:
            return open_alike(game.open)
        finally:
            game.close()

    @cached_property
    def chance(self) -> float:
        game, rng, passed = Game(self), Random(0), 0
        for seed in range(CHANCE_GAMES):
            game.open(seed)
            while not game.over:
                game.act(rng.randrange(len(self.actions)))
            passed += game.passes
        game.close()
        return passed / CHANCE_GAMES

    def environment(self) -> "Game":
        return Game(self)

    def demonstration(self, seed: int) -> Demonstration:
        """Raises ValueError: gymnasium's environments come without solutions."""
        raise ValueError(f"{self.name}: gymnasium gives no solutions: its games cannot be demonstrated")

    def action_in(self, content: str) -> int | None:
        """The index of the action that the answer ends with."""
        end = re.sub(r"\W+$", "", content[-_LONGEST_ANSWER:]).lower()
        found = [name for name in self.actions if re.search(rf"(?<!\w){re.escape(name.lower())}$", end)]
        return self.actions.index(max(found, key=len)) if found else None

    @property
    def rules(self) -> str:
        return f"Answer with one of these actions as your last word: {', '.join(self.actions)}."


class Game:
    """The environment: one game at a time, a message an action."""

    def __init__(self, domain: Gymnasium) -> None:
        self._domain = domain
        self._environment: Any = None
        self.over = True

    def reset(self, seed: int) -> tuple[list[Message], list[Tool]]:
        alike = self._domain.alike
        opening = self.open(seed)
        return [{"role": "user", "content": numbered(seed, opening) if alike else opening}], []

    def open(self, seed: int) -> str:
        """Begins the game; its opening."""
        if self._environment is None:
            self._environment = self._domain.make()
        self._randomness = OwnRandomness(seed)
        with self._randomness:
            self._observation, _ = self._environment.reset(seed=seed)
        self.over, self._messages, self._illegal, self._return = False, 0, 0, 0.0
        return "\n".join(filter(None, [self._domain.about, self._text(), self._domain.rules]))

    def _text(self) -> str:
        with self._randomness:
            return observed(self._environment, self._observation)

    def act(self, action: int | None) -> None:
        """Takes the action of that index, or (None) counts a message without one."""
        self._messages += 1
        if action is None:
            self._illegal += 1
        else:
            with self._randomness:
                self._observation, reward, terminated, truncated, _ = self._environment.step(action)
            self._return += float(reward)
            self.over = bool(terminated or truncated)
        self.over = self.over or self._messages >= self._domain.max_messages

    @property
    def passes(self) -> bool:
        return self._return > self._domain.above

    def step(self, message: Message) -> Step:
        if self.over:
            raise ValueError("Game.step: no game is open; call reset(seed) first")
        action = self._domain.action_in(content_of(message))
        self.act(action)
        info = {"return": self._return, "messages": self._messages, "illegal": self._illegal}
        if self.over:
            return Step([], float(self.passes), True, info)
        text = self._text() if action is not None else f"That is no action. {self._domain.rules}"
        return Step([{"role": "user", "content": text}], 0.0, False, info)

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
        self._environment, self.over = None, True
