"""Arithmetic: a sum, a difference or a product by one digit, worked out column by column.

The reasoning is written the way it is done by hand, from the last digit on, a line a column, and every line is a true
equality whose result has two digits:

    47 + 385        385 - 47         385 * 7
    7+5+0=12        15-7-0=08        5*7+0=35+0=35
    4+8+1=13        18-4-1=13        8*7+3=56+3=59
    0+3+1=04        13-0-0=13        3*7+5=21+5=26

The second digit is the result's; the first is carried (in a difference ten is always lent, so that a first digit of 0
means that the next column has to give one back).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, ClassVar
from zlib import crc32

from mimoflash.world.answers import last_number
from mimoflash.world.episode import Judge, Question
from mimoflash.world.protocol import Demonstration, check_levels

_ANY = ("What is {a} {op} {b}?", "Compute {a} {op} {b}.", "{a} {op} {b} = ?", "How much is {a} {word} {b}?")
_PHRASINGS = {
    "+": (*_ANY, "Add {b} to {a}.", "What is the sum of {a} and {b}?"),
    "-": (*_ANY, "Subtract {b} from {a}.", "What is left of {a} without {b}?"),
    "*": (*_ANY, "Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
}
_WORDS = {"+": "plus", "-": "minus", "*": "times"}


@dataclass(frozen=True)
class Problem:
    a: int
    op: str
    b: int

    @property
    def answer(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]

    def question(self) -> str:
        """One wording per problem: the same numbers in other words would be the same task in both splits."""
        phrasings = _PHRASINGS[self.op]
        phrasing = phrasings[crc32(f"{self.a}{self.op}{self.b}".encode()) % len(phrasings)]
        return phrasing.format(a=self.a, op=self.op, b=self.b, word=_WORDS[self.op])

    def reasoning(self) -> str:
        column = {"+": _add, "-": _subtract, "*": _multiply}[self.op]
        width = len(str(self.a)) if self.op == "*" else max(len(str(self.a)), len(str(self.b)))
        digits_a = f"{self.a:0{width}}"[::-1]
        digits_b = str(self.b) * width if self.op == "*" else f"{self.b:0{width}}"[::-1]
        lines, carry = [], 0
        for x, y in zip(digits_a, digits_b, strict=True):
            line, carry = column(int(x), int(y), carry)
            lines.append(line)
        return "\n".join(lines)


def _add(x: int, y: int, carry: int) -> tuple[str, int]:
    total = x + y + carry
    return f"{x}+{y}+{carry}={total:02}", total // 10


def _subtract(x: int, y: int, borrow: int) -> tuple[str, int]:
    total = 10 + x - y - borrow
    return f"{10 + x}-{y}-{borrow}={total:02}", 1 - total // 10


def _multiply(x: int, y: int, carry: int) -> tuple[str, int]:
    total = x * y + carry
    return f"{x}*{y}+{carry}={x * y:02}+{carry}={total:02}", total // 10


@dataclass(frozen=True)
class Arithmetic:
    """Questions such as "What is 47 + 385?"; the last number of the answer's content counts.

    `digits` are the levels: each operand draws its number of digits from them, evenly (an entry given twice weighs
    twice). `operators` is some of "+-*"; the second factor of a product is one digit, 2 to 9; differences are not
    negative.

    The random guesser knows the operator and the operands' lengths, hence the range of possible answers, and draws a
    number from it evenly: for one shape he is right with probability 1 / |range|, so
    chance = mean over operators and pairs of lengths of 1 / (highest - lowest possible answer + 1).
    """

    digits: Sequence[int] = (1, 2, 3)
    operators: str = "+-*"
    name: ClassVar[str] = "arithmetic"

    def __post_init__(self) -> None:
        check_levels("arithmetic: digits", self.digits, 1, 18)
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"arithmetic: operators is {self.operators!r}; give some of '+-*'")

    @cached_property
    def chance(self) -> float:
        shapes = [(op, m, n) for op in self.operators for m in self.digits for n in self.digits]
        return sum(1 / len(answers(*shape)) for shape in shapes) / len(shapes)

    def problem(self, seed: int) -> Problem:
        rng = Random(seed)
        op = rng.choice(self.operators)
        a, b = (rng.choice(_numbers(rng.choice(self.digits))) for _ in range(2))
        if op == "*":
            return Problem(a, op, rng.randint(2, 9))
        return Problem(max(a, b), op, min(a, b)) if op == "-" else Problem(a, op, b)

    def environment(self) -> Question:
        return Question(self._ask)

    def _ask(self, seed: int) -> tuple[str, Judge]:
        problem = self.problem(seed)
        wanted = str(problem.answer)

        def judge(content: str) -> tuple[float, dict[str, Any]]:
            given = last_number(content)
            return float(given == wanted), {"given": given, "wanted": wanted}

        return problem.question(), judge

    def demonstration(self, seed: int) -> Demonstration:
        problem = self.problem(seed)
        answer = {"role": "assistant", "reasoning_content": problem.reasoning(), "content": str(problem.answer)}
        return Demonstration([{"role": "user", "content": problem.question()}, answer], [])


def _numbers(digits: int) -> range:
    return range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def answers(op: str, digits_a: int, digits_b: int) -> range:
    """The range of possible answers to operands of these lengths (of a product, only the first one's matters)."""
    a, b = _numbers(digits_a), _numbers(digits_b)
    if op == "+":
        return range(a[0] + b[0], a[-1] + b[-1] + 1)
    if op == "*":
        return range(a[0] * 2, a[-1] * 9 + 1)
    longer, shorter = (a, b) if digits_a >= digits_b else (b, a)
    return range(max(longer[0] - shorter[-1], 0), longer[-1] - shorter[0] + 1)
