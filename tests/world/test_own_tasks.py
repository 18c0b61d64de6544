"""A user's JSONL of tasks: what is read, what passes, and which line is wrong."""

import json
import math
from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mimoflash.world import domain, is_held_out, play, seeds
from mimoflash.world.answers import same_answer


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return str(path)


def answered(world, seed, content):
    return play(world.environment(), seed, lambda messages, tools: {"role": "assistant", "content": content})


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Capital of Peru?"},
]


@pytest.fixture
def world(tmp_path):
    rows = (
        {"prompt": "What is 2 + 2?", "answer": "4", "id": 7},
        "",
        {"prompt": CHAT, "answer": "Lima"},
        {"prompt": "Half of 5?", "answer": 2.50},
    )
    return domain("file", path=write(tmp_path / "mine.jsonl", *rows))


def test_seeds_are_lines_over_and_over(world):
    assert world.name == "file/mine"
    for seed in (0, 3, 3000):
        messages, tools = world.environment().reset(seed)
        assert (messages, tools) == ([{"role": "user", "content": "What is 2 + 2?"}], [])
    assert world.environment().reset(4)[0] == CHAT


@pytest.mark.parametrize(
    ("seed", "content", "reward"),
    [
        (0, "4", 1), (0, "It is 2 + 2 = 4.", 1), (0, "4 or 5", 0), (0, "four", 0), (0, "", 0), (0, None, 0),
        (0, "44", 0),
        (1, " Lima\n", 1), (1, "lima", 0), (1, "It is Lima", 0), (1, "", 0),
        (2, "2.5", 1), (2, "It is 2.500", 1), (2, "2", 0),
    ],
)
def test_an_answer_passes_by_its_text_or_its_last_number(world, seed, content, reward):
    episode = answered(world, seed, content)
    assert (episode.reward, episode.done, episode.turns) == (reward, True, 1)


def test_the_demonstration_is_the_lines_answer(world):
    for seed in range(3):
        demonstration = world.demonstration(seed)
        assert answered(world, seed, demonstration.messages[-1]["content"]).messages == demonstration.messages
        assert answered(world, seed, demonstration.messages[-1]["content"]).reward == 1


WORDS = st.text(alphabet="ab 12.,-\n", max_size=12)


@given(WORDS, WORDS)
@example(" 4", "4\n")
@example("x 4", "4 x")  # a text in which a number stands is no number
def test_same_answer_is_the_same_text_or_the_last_number(given, wanted):
    same = given.strip() == wanted.strip()
    try:
        number = float(wanted) if not wanted.strip().startswith((".", "+")) else None
    except ValueError:
        assert same_answer(given, wanted) == same or "," in wanted
        return
    if number is not None and not wanted.strip().endswith("."):
        tail = f"so: {given} {wanted.strip()}"
        assert same_answer(tail, wanted)
        assert not same_answer(f"{tail} {number + 1}", wanted)


def test_chance_is_the_pass_rate_of_another_lines_answer(tmp_path):
    """Four lines of five say yes, in one block: neighbours would nearly always agree."""
    rows = [{"prompt": f"Is {i} small?", "answer": "yes" if i < 80 else "no"} for i in range(100)]
    chance = domain("file", path=write(tmp_path / "yes.jsonl", *rows)).chance
    exact = (80 * 79 + 20 * 19) / (100 * 99)
    assert abs(chance - exact) < 4.5 * math.sqrt(exact * (1 - exact) / 1000)
    assert domain("file", path=write(tmp_path / "one.jsonl", rows[0])).chance == 0


def test_a_line_that_occurs_twice_is_in_one_split(tmp_path):
    rows = [{"prompt": f"Double {i % 30}", "answer": 2 * (i % 30)} for i in range(60)]
    world = domain("file", path=write(tmp_path / "twice.jsonl", *rows))
    asked = {
        split: {world.environment().reset(seed)[0][0]["content"] for seed in islice(seeds(world, split), 200)}
        for split in ("train", "held_out")
    }
    assert asked["train"] | asked["held_out"] == {row["prompt"] for row in rows}
    assert not asked["train"] & asked["held_out"]
    assert all(is_held_out([{"role": "user", "content": text}]) for text in asked["held_out"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"mine.jsonl:3: no JSON"),
        ('["a", "b"]', r"mine.jsonl:3: a task is an object"),
        ('{"question": "a", "answer": "b"}', r"mine.jsonl:3: a task is an object with .prompt. and .answer."),
        ('{"prompt": "a"}', r"mine.jsonl:3: .answer. is None"),
        ('{"prompt": "a", "answer": " "}', r"mine.jsonl:3: .answer. is ' '"),
        ('{"prompt": "a", "answer": true}', r"mine.jsonl:3: .answer. is True"),
        ('{"prompt": "a", "answer": ["b"]}', r"mine.jsonl:3: .answer. is \['b'\]"),
        ('{"prompt": "", "answer": "b"}', r"mine.jsonl:3: the prompt is ''"),
        ('{"prompt": [], "answer": "b"}', r"mine.jsonl:3: the prompt is \[\]"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}', r"mine.jsonl:3: the prompt is"),
        (json.dumps({"prompt": [*CHAT, {"role": "bot", "content": ""}], "answer": "b"}), r"jsonl:3: the prompt is"),
        ('{"prompt": [{"role": "system", "content": "a"}], "answer": "b"}', r"mine.jsonl:3: the prompt is"),
        (json.dumps({"prompt": CHAT[:3], "answer": "b"}), r"mine.jsonl:3: the prompt is"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "mine.jsonl", {"prompt": "a", "answer": "b"}, "  ", line)
    with pytest.raises(ValueError, match=message):
        domain("file", path=path)


def test_a_file_that_holds_no_tasks_is_an_error(tmp_path):
    (tmp_path / "odd.jsonl").write_bytes(b'{"prompt": "\xff"}')
    for name, message in (
        ("none.jsonl", "cannot be read"), ("odd.jsonl", "cannot be read"), ("tasks.txt", r"ends in .jsonl or .py"),
    ):
        with pytest.raises(ValueError, match=message):
            domain("file", path=str(tmp_path / name))
    with pytest.raises(ValueError, match="no task is in it"):
        domain("file", path=write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(ValueError, match="path"):
        domain("file")


def test_a_relative_path_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "mine.jsonl", {"prompt": "a", "answer": "b"})
    monkeypatch.chdir(tmp_path)
    assert domain("file", path="mine.jsonl").demonstration(0).messages[1]["content"] == "b"
