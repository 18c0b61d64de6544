"""Single-player games of textarena (Hangman, Wordle, Sokoban, Minesweeper, ..) over turns; extra `rl`."""

import difflib
import re
from functools import cached_property
from random import Random
from typing import Any

from mimoflash.world.answers import content_of
from mimoflash.world.openings import numbered, open_alike
from mimoflash.world.protocol import Demonstration, Message, Step, Tool
from mimoflash.world.randomness import OwnRandomness

CHANCE_GAMES = 50
_GUESSES = 50  # messages after which the guesser gives up


class TextArena:
    """The textarena game of that id, such as "GuessTheNumber-v0", made with `config`; an answer's content is the move,
    in the form that the game asks for (most want it in square brackets; one without any gets them).

    The reward is the game's own at its end, from 0 to 1: 1 where it is won, less where some is known for part of it. A
    game goes on until its own end or the player's limit of turns.

    The seed is the game's. Where most games open alike (what is to be guessed is hidden), the opening has the game's
    number, and held-out games differ from those of training in what is hidden, if in anything.

    The random guesser knows no rules. He repeats one of the forms in square brackets that the game has shown so far,
    drawn evenly, with another number up to 20 for each number in it and another letter for a single letter; chance is
    his pass rate over the first 50 seeds.

    Raises ImportError without the extra; ValueError for an id or a configuration that textarena does not know, for
    games of more than one player, and for those that lack something (word lists of nltk, a key for a judge).
    """

    def __init__(self, id: str, **config: Any) -> None:
        try:
            from textarena.envs.registration import ENV_REGISTRY
        except ImportError as error:
            raise ImportError("the domain textarena needs an extra: pip install -e '.[rl]'") from error
        self.name = f"textarena/{id}"
        self.id, self.config = id, config
        if id not in ENV_REGISTRY:
            near = difflib.get_close_matches(id, ENV_REGISTRY) or ["GuessTheNumber-v0", "Wordle-v0", "Sokoban-v0"]
            raise ValueError(f"textarena: there is no game {id!r}; did you mean {', '.join(near)}?")
        self._check()

    def _check(self) -> None:
        """Opens a game. Raises ValueError that says why that cannot be."""
        import textarena

        game = Game(self)
        try:
            game.open(0)
        except LookupError as error:
            lists = "python -m nltk.downloader words averaged_perceptron_tagger_eng"
            raise ValueError(f"{self.name}: it needs word lists that nltk downloads: {lists}") from error
        except Exception as error:  # each game refuses, or breaks, in its own way
            if "player" in str(error).lower():
                raise ValueError(f"{self.name}: only games of a single player can be played: {error}") from error
            raise ValueError(f"{self.name}: cannot be played with {self.config}: {error}") from error
        if not isinstance(game.core.state, textarena.SinglePlayerState):
            raise ValueError(f"{self.name}: only games of a single player can be played")

    @cached_property
    def alike(self) -> bool:
        """Whether most games open alike."""
        return open_alike(Game(self).open)

    @cached_property
    def chance(self) -> float:
        return sum(self._guess(seed) for seed in range(CHANCE_GAMES)) / CHANCE_GAMES

    def _guess(self, seed: int) -> bool:
        """Whether the random guesser passes."""
        rng, game = Random(seed), Game(self)
        shown = game.open(seed)
        for _ in range(_GUESSES):
            forms = re.findall(r"\[[^\[\]\n]{1,40}\]", shown) or ["[]"]
            step = game.step({"role": "assistant", "content": _another(rng.choice(forms), rng)})
            if step.done:
                return step.reward >= 1
            shown += "".join(message["content"] for message in step.observation)
        return False

    def environment(self) -> "Game":
        return Game(self)

    def demonstration(self, seed: int) -> Demonstration:
        """Raises ValueError: textarena's games come without solutions."""
        raise ValueError(f"{self.name}: textarena gives no solutions: its games cannot be demonstrated")


def _another(form: str, rng: Random) -> str:
    form = re.sub(r"\d+", lambda _: str(rng.randint(0, 20)), form)
    return f"[{rng.choice('abcdefghijklmnopqrstuvwxyz')}]" if re.fullmatch(r"\[[A-Za-z]\]", form) else form


class Game:
    """The environment: one game at a time, a message a move."""

    def __init__(self, domain: TextArena) -> None:
        self._domain = domain
        self._game: Any = None

    def reset(self, seed: int) -> tuple[list[Message], list[Tool]]:
        alike = self._domain.alike
        opening = self.open(seed)
        return [{"role": "user", "content": numbered(seed, opening) if alike else opening}], []

    def open(self, seed: int) -> str:
        """Begins the game; its opening."""
        import textarena

        self._randomness = OwnRandomness(seed)
        with self._randomness:
            self._game = textarena.make(self._domain.id, **self._domain.config)
            self._game.reset(num_players=1, seed=seed)
            return self._news()

    @property
    def core(self) -> Any:
        """The game without textarena's wrappers, which repeat all that was said before with each observation."""
        core = self._game
        while hasattr(core, "env"):
            core = core.env
        return core

    def _news(self) -> str:
        """What the game has said since it was last asked, without the player's own words (which some games note in
        the wrong order, so that a number is in the text's place)."""
        from textarena import ObservationType

        _, said = self.core.get_observation()
        spoken = [text for _, text, kind in said if kind != ObservationType.PLAYER_ACTION and isinstance(text, str)]
        return "\n".join(text.strip() for text in spoken)

    def step(self, message: Message) -> Step:
        if self._game is None:
            raise ValueError("Game.step: no game is open; call reset(seed) first")
        with self._randomness:
            done, _ = self._game.step(content_of(message))
            if not done:
                return Step([{"role": "user", "content": self._news()}], 0.0, False, {})
            rewards, info = self._game.close()
        self._game = None
        # some games give the reason in the reward's place for a move that is none: it has earned nothing
        earned = float(rewards[0]) if isinstance(rewards[0], int | float) else 0.0
        return Step([], min(max(earned, 0.0), 1.0), True, {"game": info[0]})

    def close(self) -> None:
        self._game = None
