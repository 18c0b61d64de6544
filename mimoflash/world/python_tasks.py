"""Tasks written in Python: a file with a prompt, a verifier and, if wanted, tools.

    def prompt(seed):                   # text, or a list of messages
        return f"What is {seed % 90 + 10} squared?"

    def verify(seed, answer):           # of the answer's text: True or False, or a score from 0 to 1
        return answer.strip().endswith(str((seed % 90 + 10) ** 2))

    def multiply(a: int, b: int):       # optional: functions that the model may call
        "The product of two numbers."
        return a * b

    TOOLS = [multiply]

    def demonstrate(seed):              # optional: an answer that passes, to fine-tune on
        return str((seed % 90 + 10) ** 2)
"""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from mimoflash.world.episode import Judge, Question
from mimoflash.world.functions import Toolbox
from mimoflash.world.judge import RubricJudge
from mimoflash.world.protocol import Demonstration, Message

CHANCE_TASKS = 100
_ROLES = ("system", "user", "assistant", "tool")


class PythonTasks:
    """The tasks of a Python file: see above. Both functions must give the same for the same seed, always.

    With a judge there is no `verify`; what `demonstrate` gives is then shown to the judge as an answer known to be
    right. An answer to a tool call is an observation; the first message without a call is the answer.

    The random guesser gives the demonstration of the next seed, or nothing where the file has no `demonstrate`; chance
    is his pass rate over the first 100 seeds. With a judge, who costs, it is not measured: 0.

    Raises ValueError for a file that does not run or has not got the functions, with its name.
    """

    def __init__(self, file: Path, judge: RubricJudge | None = None) -> None:
        self.name = f"file/{file.stem}"
        self.file, self.judge = file, judge
        module = _load(file)
        self._prompt = _function(module, file, "prompt(seed)")
        self._verify = None if judge else _function(module, file, "verify(seed, answer)")
        if judge and hasattr(module, "verify"):
            raise ValueError(f"{file}: verify and judge are both given; one of them must score the answers")
        self._demonstrate = _function(module, file, "demonstrate(seed)") if hasattr(module, "demonstrate") else None
        try:
            self.toolbox = Toolbox(getattr(module, "TOOLS", []))
        except (ValueError, NameError) as error:  # a type may be a name that nothing has
            raise ValueError(f"{file}: {error}") from error
        self._messages(0)

    def _messages(self, seed: int) -> list[Message]:
        return as_messages(self._call(self._prompt, seed), f"{self.file}: prompt({seed})")

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the user's function gives. Raises ValueError that says where in the file it failed."""
        try:
            return function(*arguments)
        except Exception as error:
            what = f"{function.__name__}({arguments[0]}{', ...' if len(arguments) > 1 else ''})"
            raise ValueError(f"{_where(self.file, error)}: {what} raised {type(error).__name__}: {error}") from error

    @cached_property
    def chance(self) -> float:
        if self._verify is None:
            return 0.0
        guesses = [self._answer(seed + 1) or "" for seed in range(CHANCE_TASKS)]
        return sum(self._score(seed, guess) >= 1 for seed, guess in enumerate(guesses)) / CHANCE_TASKS

    def _answer(self, seed: int) -> str | None:
        return None if self._demonstrate is None else str(self._call(self._demonstrate, seed))

    def _score(self, seed: int, answer: str) -> float:
        assert self._verify is not None
        score = self._call(self._verify, seed, answer)
        if not hasattr(score, "__float__") or not 0 <= float(score) <= 1:
            raise ValueError(f"{self.file}: verify({seed}, ...) gave {score!r}; give True, False or 0.0 to 1.0")
        return float(score)

    def environment(self) -> Question:
        return Question(self._ask, self.toolbox)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process runs the file itself."""
        return PythonTasks, (self.file.resolve(), self.judge)

    def _ask(self, seed: int) -> tuple[list[Message], Judge]:
        messages = self._messages(seed)
        if self.judge is not None:
            return messages, self.judge.grader(messages, self._answer(seed))
        return messages, lambda content: (self._score(seed, content), {})

    def demonstration(self, seed: int) -> Demonstration:
        """What `demonstrate` answers, without tools. Raises ValueError where there is none or it does not pass."""
        answer = self._answer(seed)
        if answer is None:
            raise ValueError(f"{self.file}: there is no demonstrate(seed): its tasks cannot be demonstrated")
        if self._verify is not None and self._score(seed, answer) < 1:
            raise ValueError(f"{self.file}: demonstrate({seed}) gave {answer!r}, which verify does not pass")
        return Demonstration([*self._messages(seed), {"role": "assistant", "content": answer}], self.toolbox.tools)


def _load(file: Path) -> ModuleType:
    """The file as a module, under a name that no other module has."""
    name = "mimoflash_tasks_" + hashlib.blake2b(str(file.resolve()).encode(), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{_where(file, error)}: {type(error).__name__}: {error}") from error
    return module


def _where(file: Path, error: Exception) -> str:
    """The file with the last of its lines that the error came by."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _function(module: ModuleType, file: Path, signature: str) -> Callable[..., Any]:
    function = getattr(module, signature.split("(")[0], None)
    if not callable(function):
        raise ValueError(f"{file}: there is no function {signature} in it")
    return function


def as_messages(prompt: Any, where: str) -> list[Message]:
    """A prompt as messages: text is what the user says. Raises ValueError, beginning with `where`, for any other."""
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(map(_is_message, prompt)):
        roles = [message["role"] for message in prompt]
        if "user" in roles and roles[-1] != "assistant":
            return list(prompt)
    raise ValueError(
        f"{where}: the prompt is {prompt!r:.200}; it must be text, or a list of messages such as "
        '{"role": "user", "content": ".."}, some of them the user\'s and the last one not the assistant\'s'
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
