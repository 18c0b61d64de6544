"""Any dataset of reasoning-gym (a hundred generated families of puzzles with verifiers) as a domain; extra `rl`."""

import difflib
import json
from functools import cached_property
from typing import Any

from mimoflash.world.episode import Judge, Question
from mimoflash.world.protocol import Demonstration
from mimoflash.world.randomness import OwnRandomness

CHANCE_TASKS = 100

# Where datasets whose questions have many answers keep one of them, in an entry's metadata.
_EXAMPLES = ("example_answer", "example_correct_answer", "possible_answer")


class ReasoningGym:
    """The reasoning-gym dataset of that name with its own configuration; the seed is the dataset's seed.

    "composite" takes `datasets`, a list of {name, weight, config}, of which `name` is needed.

    The reward is the dataset's own score of the answer's content, from 0 to 1, and 0 for an answer that its verifier
    cannot read. Demonstrations have no reasoning, as the datasets give none.

    The tasks of isomorphic_strings, polynomial_multiplication and ransom_note depend on the order of Python's sets too:
    another process makes others of the same seeds, unless both have the same PYTHONHASHSEED.

    The random guesser knows what answers look like but not the question: he gives the answer of another task;
    chance = share of the first 100 tasks that the answer of the next one passes (score 1).

    Raises ImportError without the extra, ValueError for a dataset or a configuration that reasoning-gym does not know.
    """

    def __init__(self, dataset: str, **config: Any) -> None:
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ImportError("the domain reasoning_gym needs an extra: pip install -e '.[rl]'") from error
        if dataset not in DATASETS:
            near = difflib.get_close_matches(dataset, DATASETS) or sorted(DATASETS)
            raise ValueError(f"reasoning_gym: there is no dataset {dataset!r}; did you mean {', '.join(near)}?")
        if reserved := {"seed", "size"} & config.keys():
            raise ValueError(f"reasoning_gym: {', '.join(sorted(reserved))} cannot be set: each task has its own seed")
        self.name = f"reasoning_gym/{dataset}"
        self.dataset, self.config = dataset, config
        try:
            self._create(0)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"reasoning_gym: the configuration of {dataset} is refused: {error}") from error

    def _create(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """The dataset of that seed and its only entry."""
        import reasoning_gym

        config = self.config
        if self.dataset == "composite":
            config = {**config, "datasets": _specs(config.get("datasets"))}
        with OwnRandomness(seed):
            dataset = reasoning_gym.create_dataset(self.dataset, seed=seed, size=1, **config)
            return dataset, dataset[0]

    @cached_property
    def chance(self) -> float:
        tasks = [self._create(seed) for seed in range(CHANCE_TASKS + 1)]
        guesses = [_own_answer(*task) or "" for task in tasks]
        passed = [_score(*tasks[i], guesses[i + 1])[0] >= 1 for i in range(CHANCE_TASKS)]
        return sum(passed) / CHANCE_TASKS

    def environment(self) -> Question:
        return Question(self._ask)

    def _ask(self, seed: int) -> tuple[str, Judge]:
        dataset, entry = self._create(seed)

        def judge(content: str) -> tuple[float, dict[str, Any]]:
            reward, info = _score(dataset, entry, content.strip())
            return reward, {"wanted": entry["answer"], **info}

        return entry["question"], judge

    def demonstration(self, seed: int) -> Demonstration:
        """The dataset's own answer. Raises ValueError where it gives none that its verifier passes."""
        dataset, entry = self._create(seed)
        answer = _own_answer(dataset, entry)
        if answer is None:
            raise ValueError(f"{self.name}: seed {seed} has no answer that passes: it cannot be demonstrated")
        messages = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": answer}]
        return Demonstration(messages, [])


def _specs(datasets: Any) -> list[Any]:
    """What composite wants for `datasets`. Raises ValueError or TypeError as reasoning-gym does."""
    from reasoning_gym.composite import DatasetSpec

    if not isinstance(datasets, list | tuple) or not all(isinstance(each, dict) for each in datasets):
        raise ValueError('composite needs datasets, a list such as [{"name": "chain_sum"}, {"name": "maze"}]')
    return [DatasetSpec(**{"weight": 1.0, "config": {}, **each}) for each in datasets]


def _score(dataset: Any, entry: dict[str, Any], answer: str) -> tuple[float, dict[str, Any]]:
    try:
        return float(dataset.score_answer(answer=answer, entry=entry)), {}
    except Exception as error:  # some verifiers parse without care: the answer is wrong, the environment is not broken
        return 0.0, {"unreadable": f"{type(error).__name__}: {error}"}


def _own_answer(dataset: Any, entry: dict[str, Any]) -> str | None:
    """The first answer that the dataset itself gives and passes, if any."""
    for answer in (entry["answer"], *map(entry["metadata"].get, _EXAMPLES)):
        text = json.dumps(answer) if isinstance(answer, dict) else str(answer)
        if answer is not None and _score(dataset, entry, text)[0] >= 1:
            return text
    return None
