"""Any dataset of reasoning-gym (a hundred generated families of puzzles with verifiers) as a domain; extra `rl`."""

import difflib
from functools import cached_property
from typing import Any

from mimoflash.world.episode import Judge, Question
from mimoflash.world.protocol import Demonstration

CHANCE_TASKS = 100


class ReasoningGym:
    """The reasoning-gym dataset of that name with its own configuration; the seed is the dataset's seed.

    The reward is the dataset's own score of the answer's content, from 0 to 1. Demonstrations have no reasoning, as
    the datasets give none.

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

    def _create(self, seed: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self.dataset, seed=seed, size=1, **self.config)

    @cached_property
    def chance(self) -> float:
        datasets = [self._create(seed) for seed in range(CHANCE_TASKS + 1)]
        entries = [dataset[0] for dataset in datasets]
        passed = [
            datasets[i].score_answer(answer=str(entries[i + 1]["answer"]), entry=entries[i]) >= 1
            for i in range(CHANCE_TASKS)
        ]
        return sum(passed) / CHANCE_TASKS

    def environment(self) -> Question:
        return Question(self._ask)

    def _ask(self, seed: int) -> tuple[str, Judge]:
        dataset = self._create(seed)
        entry = dataset[0]

        def judge(content: str) -> tuple[float, dict[str, Any]]:
            return float(dataset.score_answer(answer=content.strip(), entry=entry)), {"wanted": entry["answer"]}

        return entry["question"], judge

    def demonstration(self, seed: int) -> Demonstration:
        """The dataset's own answer. Raises ValueError where it gives none that its verifier passes."""
        dataset = self._create(seed)
        entry = dataset[0]
        if entry["answer"] is None or dataset.score_answer(answer=str(entry["answer"]), entry=entry) < 1:
            raise ValueError(f"{self.name}: seed {seed} has no answer that passes: it cannot be demonstrated")
        answer = {"role": "assistant", "content": str(entry["answer"])}
        return Demonstration([{"role": "user", "content": entry["question"]}, answer], [])
