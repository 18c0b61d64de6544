"""A user's own tasks as a domain: a JSONL file of prompts and answers, or a Python file (see `python_tasks.py`)."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from mimoflash.world.answers import same_answer
from mimoflash.world.episode import Judge, Question
from mimoflash.world.judge import RubricJudge
from mimoflash.world.protocol import Demonstration, Domain, Message
from mimoflash.world.python_tasks import PythonTasks, as_messages

CHANCE_TASKS = 1000


def own_tasks(path: str, judge: Mapping[str, Any] | None = None) -> Domain:
    """The tasks of a file; a relative path is relative to the working directory.

    `judge` (base_url, model, rubric and more: see `RubricJudge`) scores the answers in place of the file's own
    verifier, from 0 to 1; a task passes where it gives full marks.

    Raises ValueError for a file that cannot be read, with the line.
    """
    file = Path(path).expanduser()
    grader = None if judge is None else RubricJudge(**judge)
    if file.suffix == ".jsonl":
        return JsonlTasks(file, grader)
    if file.suffix == ".py":
        return PythonTasks(file, grader)
    raise ValueError(f"file: path is {path!r}; give a file of tasks that ends in .jsonl or .py")


class JsonlTasks:
    """A line a task: {"prompt": "What is 2 + 2?", "answer": "4"}; other keys are let be.

    `prompt` is text, or a list of messages of which the last is not the assistant's. An answer passes where its content
    is `answer` but for space around it, or, if `answer` is a number, where its last number is that one. With a judge
    `answer` may be missing; where it is there, the judge sees it as one known to be right.

    The task of a seed is line seed modulo the number of lines. What the user says in `prompt` before any assistant's
    message decides whether a task is held out, so that a line that occurs twice is not in both splits.

    The random guesser gives the answer of another line; chance is his pass rate over 1000 draws of two lines. With a
    judge, who costs, it is not measured: 0.
    """

    def __init__(self, file: Path, judge: RubricJudge | None = None) -> None:
        self.name = f"file/{file.stem}"
        self.file, self.judge = file, judge
        self.tasks = _read(file, answers=judge is None)

    def _task(self, seed: int) -> tuple[list[Message], str | None]:
        return self.tasks[seed % len(self.tasks)]

    @cached_property
    def chance(self) -> float:
        if self.judge is not None or len(self.tasks) < 2:
            return 0.0
        rng = Random(0)
        pairs = [rng.sample(self.tasks, 2) for _ in range(CHANCE_TASKS)]
        return sum(same_answer(str(other), str(wanted)) for (_, wanted), (_, other) in pairs) / CHANCE_TASKS

    def environment(self) -> Question:
        return Question(self._ask)

    def _ask(self, seed: int) -> tuple[list[Message], Judge]:
        messages, wanted = self._task(seed)
        if self.judge is not None:
            return messages, self.judge.grader(messages, wanted)
        return messages, lambda content: (float(same_answer(content, str(wanted))), {"wanted": wanted})

    def demonstration(self, seed: int) -> Demonstration:
        """The line's answer. Raises ValueError where the line has none."""
        messages, wanted = self._task(seed)
        if wanted is None:
            raise ValueError(f"{self.file}: the task of seed {seed} has no answer: it cannot be demonstrated")
        return Demonstration([*messages, {"role": "assistant", "content": wanted}], [])


def _read(file: Path, answers: bool) -> list[tuple[list[Message], str | None]]:
    try:
        lines = file.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    tasks = [_task_of(f"{file}:{number}", line, answers) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise ValueError(f'{file}: no task is in it; write one a line, such as {{"prompt": "..", "answer": ".."}}')
    return tasks


def _task_of(where: str, line: str, answers: bool) -> tuple[list[Message], str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(f'{where}: a task is an object with "prompt" and "answer"')
    answer: Any = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = repr(answer)
    said = isinstance(answer, str) and answer.strip()
    if not said and (answers or answer is not None):
        raise ValueError(f'{where}: "answer" is {row.get("answer")!r}; it must be text or a number')
    return as_messages(row["prompt"], where), answer
