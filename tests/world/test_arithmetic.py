"""Arithmetic against Python's: questions read back, the reasoning checked line by line, answers judged."""

import math
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mimoflash.world import domain
from mimoflash.world.answers import last_number
from mimoflash.world.arithmetic import Problem, answers

SEEDS = st.integers(0, 2**40)
WORLDS = st.sampled_from([{}, {"digits": [1]}, {"digits": [1, 2, 3, 4, 5, 6]}, {"operators": "-"}, {"digits": [18]}])


def solve(question: str) -> int:
    """What the question asks for, read from its words."""
    a, b = map(int, re.findall(r"\d+", question))
    if re.search(r"\+|plus|Add|sum", question):
        return a + b
    if re.search(r"\*|times|Multiply|product", question):
        return a * b
    return b - a if question.startswith("Subtract") else a - b


def value(expression: str) -> int:
    assert re.fullmatch(r"\d+([+*-]\d+)*", expression)
    return eval(re.sub(r"\b0+(?=\d)", "", expression))


@settings(deadline=None)
@given(WORLDS, SEEDS)
def test_the_answer_is_pythons(options, seed):
    question, answer = domain("arithmetic", **options).demonstration(seed).messages
    assert int(answer["content"]) == solve(question["content"]) >= 0
    assert answer["content"] == str(int(answer["content"]))


@settings(deadline=None)
@given(WORLDS, SEEDS)
def test_every_line_of_the_reasoning_is_true_and_together_they_are_the_answer(options, seed):
    world = domain("arithmetic", **options)
    problem, answer = world.problem(seed), world.demonstration(seed).messages[1]
    lines = answer["reasoning_content"].split("\n")
    width = max(len(str(problem.a)), len(str(problem.b)))
    carry = 0
    for line, x, y in zip(lines, f"{problem.a:0{width}}"[::-1], f"{problem.b:0{width}}"[::-1], strict=True):
        left, *others = line.split("=")
        assert len({value(side) for side in (left, *others)}) == 1, line
        used_x, used_y, used_carry = re.split(r"[+*-]", left)
        assert used_x[-1] == x
        assert used_y == (str(problem.b) if problem.op == "*" else y)
        assert int(used_carry) == carry
        assert len(others[-1]) == 2
        carry = 1 - int(others[-1][0]) if problem.op == "-" else int(others[-1][0])
    digits = "".join(line[-1] for line in reversed(lines))
    assert int(("" if problem.op == "-" else str(carry)) + digits) == problem.answer
    assert carry == 0 or problem.op != "-"


@settings(deadline=None)
@given(SEEDS, st.integers(-1000, 1000).filter(bool))
def test_only_the_last_number_counts_and_it_has_to_be_right(seed, off):
    world = domain("arithmetic")
    environment = world.environment()

    def reward(content):
        environment.reset(seed)
        return environment.step({"role": "assistant", "content": content}).reward

    right = world.problem(seed).answer
    assert reward(f"{right}") == reward(f"It is {right}.") == reward(f"{right + off}? No: **{right:,}**\n") == 1.0
    assert reward(f"{right + off}") == reward(f"{right} or {right + off}") == reward(f"{right}.5") == 0.0
    assert reward("") == reward("-") == reward(f"{right}1") == 0.0
    assert right == 0 or reward(f"-{right}") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", "12"), ("12 - 5 = 7", "7"), ("5-338", "338"), ("is -5", "-5"), ("(2)-3", "3"), ("x-3", "3"),
        ("0012", "12"),        ("1,234,567", "1234567"), ("1,2345", "2345"),
        ("3.50", "3.5"), ("3.", "3"), ("-0", "0"), ("-0.50", "-0.5"),
        ("none", None), ("", None), ("٣", None), ("1e5", "5"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@given(st.integers(), st.text(alphabet="abc .,:\n("))
@example(-3, "")
def test_last_number_finds_any_integer_after_any_words(number, words):
    assert last_number(f"17 {words} {number}") == str(number)


@pytest.mark.parametrize("options", [{}, {"digits": [1]}, {"digits": [2], "operators": "-"}])
def test_chance_is_the_pass_rate_of_the_guesser_it_describes(options):
    world, rng, count = domain("arithmetic", **options), random.Random(0), 20_000
    environment, passed = world.environment(), 0
    for seed in range(count):
        environment.reset(seed)
        problem = world.problem(seed)
        digits = rng.choice(world.digits) if problem.op == "*" else len(str(problem.b))
        guess = rng.choice(answers(problem.op, len(str(problem.a)), digits))
        passed += environment.step({"content": str(guess)}).reward
    assert abs(passed / count - world.chance) < 4.5 * math.sqrt(world.chance / count)


@pytest.mark.parametrize("op", "+-*")
@pytest.mark.parametrize("digits", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_the_guessers_range_is_the_range_of_the_answers(op, digits):
    first, second = ([n for n in range(100) if len(str(n)) == count] for count in digits)
    if op == "*":
        second = range(2, 10)
    results = [Problem(a, op, b).answer for a in first for b in second]
    results = [abs(result) for result in results]
    assert (min(results), max(results)) == (answers(op, *digits)[0], answers(op, *digits)[-1])


def test_operands_and_operators_are_those_of_the_levels():
    problems = [domain("arithmetic", digits=[2, 4]).problem(seed) for seed in range(2000)]
    assert {len(str(problem.a)) for problem in problems} == {2, 4}
    assert {problem.op for problem in problems} == set("+-*")
    assert {problem.b for problem in problems if problem.op == "*"} == set(range(2, 10))
    assert all(problem.a >= problem.b for problem in problems if problem.op == "-")
