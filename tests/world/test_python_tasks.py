"""A user's Python file of tasks: a few lines suffice, tools are called, and what is wrong is named with its line."""

import pickle
import subprocess
import sys
import textwrap

import pytest

from mimoflash.world import domain, play, python_tasks

SQUARES = """
def prompt(seed):
    return f"What is {seed} squared?"

def verify(seed, answer):
    return answer == str(seed * seed)
"""


@pytest.fixture
def load(tmp_path):
    def write_and_load(text, name="mine.py", **options):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return domain("file", path=str(tmp_path / name), **options)

    return write_and_load


def says(*messages):
    said = iter(messages)
    return lambda before, tools: {"role": "assistant", "content": "", **next(said)}


def test_two_functions_are_a_domain(load):
    world = load(SQUARES)
    assert (world.name, world.chance) == ("file/mine", 0.0)
    for seed in (0, 3, 12):
        episode = play(world.environment(), seed, says({"content": str(seed**2)}))
        assert (episode.reward, episode.done) == (1.0, True)
        assert episode.messages[0] == {"role": "user", "content": f"What is {seed} squared?"}
    assert play(world.environment(), 3, says({"content": "6"})).reward == 0.0
    with pytest.raises(ValueError, match=r"mine.py: there is no demonstrate"):
        world.demonstration(0)


def test_another_process_runs_the_file_itself(load, tmp_path):
    (tmp_path / "tasks.pickle").write_bytes(pickle.dumps(load(SQUARES)))
    code = "import pickle; w = pickle.load(open('tasks.pickle', 'rb')); print(w.environment().reset(7)[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "What is 7 squared?" in done.stdout


def test_the_example_in_the_docstring_works(load):
    world = load(python_tasks.__doc__.split("\n\n", 1)[1])
    messages = world.demonstration(7).messages
    assert play(world.environment(), 7, says({"content": messages[1]["content"]})).reward == 1.0
    assert [tool["function"]["name"] for tool in world.environment().reset(0)[1]] == ["multiply"]


def test_prompts_may_be_conversations(load):
    world = load("""
        def prompt(seed):
            return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": str(seed)}]
        def verify(seed, answer):
            return True
    """)
    assert [message["content"] for message in world.environment().reset(5)[0]] == ["Be brief.", "5"]
    assert world.chance == 1.0  # nothing is an answer too


def test_chance_is_the_pass_rate_of_the_next_seeds_demonstration(load):
    world = load("""
        def prompt(seed): return f"Is {seed} in the first half of its four?"
        def verify(seed, answer): return answer == demonstrate(seed)
        def demonstrate(seed): return "yes" if seed % 4 < 2 else "no"
    """)
    assert world.chance == 0.5


TOOLS = SQUARES + """
def multiply(seed: int, a: int, b: int = 1):
    "The product."
    return {"product": a * b, "seed": seed}

TOOLS = [multiply]
"""


def call(name, arguments, **more):
    return {"function": {"name": name, "arguments": arguments}, **more}


def test_tools_are_called_before_the_answer(load):
    world = load(TOOLS)
    calls = [call("multiply", {"a": 3, "b": 4}, id="call_1"), call("multiply", '{"a": 5}')]
    episode = play(world.environment(), 9, says({"tool_calls": calls}, {"content": "81"}))
    assert (episode.reward, episode.turns, episode.done) == (1.0, 2, True)
    assert [m for m in episode.messages if m["role"] == "tool"] == [
        {"role": "tool", "content": '{"product": 12, "seed": 9}', "tool_call_id": "call_1"},
        {"role": "tool", "content": '{"product": 5, "seed": 9}'},
    ]
    [tool] = episode.tools
    assert tool["function"]["description"] == "The product."
    parameters = tool["function"]["parameters"]
    assert parameters["properties"] == {"a": {"type": "integer"}, "b": {"type": "integer"}}
    assert parameters["required"] == ["a"]


@pytest.mark.parametrize(
    ("result", "text"),
    [("'as it is'", "as it is"), ("[1, None]", "[1, null]"), ("3", "3"), ("{'when': date(2026, 1, 2)}", "2026-01-02")],
)
def test_results_are_text_or_json(load, result, text):
    world = load(f"from datetime import date\n{SQUARES}\ndef look():\n    return {result}\nTOOLS = [look]")
    episode = play(world.environment(), 9, says({"tool_calls": [call("look", {})]}, {"content": "81"}))
    assert text in episode.messages[2]["content"]
    assert episode.tools[0]["function"]["description"] == "look"


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        ("list[int]", {"type": "array", "items": {"type": "integer"}}), ("dict", {"type": "object"}),
        ("list", {"type": "array"}), ("float", {"type": "number"}), ("'bool'", {"type": "boolean"}),
        ("list[list[str]]", {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
    ],
)
def test_types_become_schemas(load, hint, schema):
    world = load(f"{SQUARES}\ndef look(a: {hint}): pass\nTOOLS = [look]")
    assert world.environment().reset(0)[1][0]["function"]["parameters"]["properties"] == {"a": schema}


@pytest.mark.parametrize(
    ("wrong", "says_so"),
    [
        (call("divide", {"a": 1}), "there is no tool 'divide'; the tools are multiply"),
        (call("multiply", {"c": 1}), "error: TypeError"),
        (call("multiply", {"a": None}), "error: TypeError"),
        (call("multiply", "{"), "there is no tool ''"),
        (call("multiply", {"a": 1, "seed": 0}), '"seed": 9'),  # the task's seed is not the model's to choose
        (None, "there is no tool ''"),
    ],
)
def test_a_wrong_call_is_told_to_the_model_and_costs_nothing_else(load, wrong, says_so):
    episode = play(load(TOOLS).environment(), 9, says({"tool_calls": [wrong]}, {"content": "81"}))
    assert says_so in episode.messages[2]["content"]
    assert episode.reward == 1.0


def test_calls_without_tools_are_an_answer(load):
    episode = play(load(SQUARES).environment(), 9, says({"content": "81", "tool_calls": [call("f", {})]}))
    assert (episode.turns, episode.reward) == (1, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def prompt(seed) return", r"mine.py:1: SyntaxError"),
        ("import nothing_of_that_name", r"mine.py:1: ModuleNotFoundError"),
        ("\nx = 1 / 0", r"mine.py:2: ZeroDivisionError"),
        ("import json\njson.loads('[')", r"mine.py:2: JSONDecodeError"),  # the user's line, not the library's
        ("verify = print", r"mine.py: there is no function prompt\(seed\)"),
        ("def prompt(seed): return 'a'", r"mine.py: there is no function verify\(seed, answer\)"),
        ("prompt = 'a'", r"mine.py: there is no function prompt\(seed\)"),
        (SQUARES.replace("return f", "return seed and f"), r"mine.py: prompt\(0\): the prompt is 0"),
        (SQUARES.replace("return f", "return 1 / seed or f"), r"mine.py:3: prompt\(0\) raised ZeroDivisionError"),
        (SQUARES + "TOOLS = 3", r"mine.py: TOOLS is 3; give a list of functions"),
        (SQUARES + "TOOLS = [3]", r"mine.py: TOOLS is \[3\]"),
        (SQUARES + "def f(a): pass\nTOOLS = [f]", r"mine.py: TOOLS: the type of f\(a\) is not"),
        (SQUARES + "def f(a: bytes): pass\nTOOLS = [f]", r"mine.py: TOOLS: the type of f\(a\) is not"),
        (SQUARES + "def f(a: 'No'): pass\nTOOLS = [f]", r"mine.py: name 'No' is not defined"),
        (SQUARES + "demonstrate = 3", r"mine.py: there is no function demonstrate\(seed\)"),
    ],
)
def test_a_wrong_file_is_named_with_the_line(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.py: there is no such file"):
        domain("file", path=str(tmp_path / "none.py"))


@pytest.mark.parametrize("result", ["None", "2", "-0.1", "'yes'", "float('nan')", "1 / 0", "open('/none')"])
def test_a_verifier_that_gives_no_score_breaks_its_own_sample_only(load, result):
    world = load(f"def prompt(seed): return 'a'\ndef verify(seed, answer): return {result}")
    episode = play(world.environment(), 4, says({"content": "b"}))
    assert (episode.reward, episode.done) == (0.0, True)
    assert "mine.py" in episode.info["error"]
    assert "verify(4, ...)" in episode.info["error"]


@pytest.mark.parametrize(("result", "reward"), [("True", 1), ("0.25", 0.25), ("1", 1), ("numpy.True_", 1)])
def test_scores_are_truth_or_numbers(load, result, reward):
    world = load(f"import numpy\ndef prompt(seed): return 'a'\ndef verify(seed, answer): return {result}")
    assert play(world.environment(), 4, says({"content": "b"})).reward == reward


def test_a_demonstration_that_does_not_pass_is_an_error(load):
    world = load(SQUARES + "def demonstrate(seed): return '4'")
    assert world.demonstration(2).messages[1]["content"] == "4"
    with pytest.raises(ValueError, match=r"demonstrate\(3\) gave '4', which verify does not pass"):
        world.demonstration(3)


def test_files_of_one_name_are_modules_of_their_own(load, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "json.py").write_text(SQUARES.replace("squared", "doubled"))
    before = sys.modules["json"]
    dataclass = """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Task:
            seed: int
        """
    world = load(textwrap.dedent(dataclass) + SQUARES, name="json.py")
    other = domain("file", path=str(tmp_path / "other" / "json.py"))
    assert sys.modules["json"] is before
    assert "squared" in world.environment().reset(1)[0][0]["content"]
    assert "doubled" in other.environment().reset(1)[0][0]["content"]
    for each in (world, other):  # so that their classes can be pickled
        assert sys.modules[each._prompt.__module__].prompt is each._prompt


def test_a_file_that_does_not_run_leaves_no_module(load):
    before = set(sys.modules)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load("1 / 0")
    assert not {name for name in set(sys.modules) - before if name.startswith("mimoflash_tasks")}
