"""What holds for every domain: pure functions of the seed, demonstrations that pass, disjoint splits, odd messages."""

import os
import random
import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.world import Demonstration, domain, is_held_out, play, seeds, task_id

DOMAINS = st.one_of(
    st.builds(
        lambda digits, operators: domain("arithmetic", digits=digits, operators="".join(operators)),
        st.lists(st.integers(1, 18), min_size=1, max_size=3),
        st.sets(st.sampled_from("+-*"), min_size=1),
    ),
    st.builds(lambda sizes: domain("maze", sizes=sizes), st.lists(st.integers(3, 9), min_size=1, max_size=3)),
    st.builds(
        lambda offered, parameters: domain("tools", offered=offered, parameters=parameters),
        st.lists(st.integers(1, 10), min_size=1, max_size=3),
        st.integers(1, 5),
    ),
)
SEEDS = st.integers(0, 2**40)
ALL = ("arithmetic", "maze", "tools")


def replay(demonstration: Demonstration):
    """An `act` that says what the demonstration's assistant says."""
    said = (message for message in demonstration.messages if message["role"] == "assistant")
    return lambda messages, tools: next(said)


@settings(deadline=None, max_examples=200)
@given(DOMAINS, SEEDS)
def test_a_demonstration_replays_to_reward_one(world, seed):
    demonstration = world.demonstration(seed)
    episode = play(world.environment(), seed, replay(demonstration))
    assert (episode.reward, episode.done) == (1.0, True)
    assert episode.messages == demonstration.messages
    assert episode.tools == demonstration.tools


@settings(deadline=None, max_examples=50)
@given(DOMAINS, SEEDS)
def test_without_reasoning_an_episode_passes_too_and_is_the_same_task(world, seed):
    thinking = world.demonstration(seed)
    assert all(m["reasoning_content"] for m in thinking.messages if m["role"] == "assistant")
    plain = thinking.without_reasoning()
    assert not any("reasoning_content" in message for message in plain.messages)
    assert play(world.environment(), seed, replay(plain)).reward == 1.0
    assert task_id(plain.messages) == task_id(thinking.messages)


@settings(deadline=None, max_examples=50)
@given(DOMAINS, SEEDS)
def test_a_hasty_answer_is_the_last_one_and_the_same_task(world, seed):
    """It calls no tool, so that where one is needed it earns nothing."""
    careful = world.demonstration(seed)
    *asked, answer = careful.hasty().messages
    assert asked == [message for message in careful.messages if message["role"] == "user"]
    assert answer == {"role": "assistant", "reasoning_content": "", "content": careful.messages[-1]["content"]}
    reward = play(world.environment(), seed, replay(careful.hasty())).reward
    assert reward == (0.0 if careful.tools else 1.0)


@pytest.mark.parametrize("name", ALL)
def test_everything_is_a_function_of_the_seed_alone(name):
    state = random.getstate()
    first = [domain(name).demonstration(seed) for seed in range(50)]
    again = [domain(name).demonstration(seed) for seed in reversed(range(50))][::-1]
    assert first == again
    assert random.getstate() == state
    assert len({str(demonstration) for demonstration in first}) > 40


def test_another_process_makes_the_same_tasks():
    code = (
        "from hashlib import md5; from mimoflash.world import domain;"
        f"print([md5(str([domain(n).demonstration(s) for s in range(30)]).encode()).hexdigest() for n in {ALL}])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": salt}, capture_output=True, check=True
        ).stdout
        for salt in ("1", "2")
    ]
    assert outputs[0] == outputs[1] != b""


def test_extras_are_imported_when_they_are_asked_for():
    extras = {"gymnasium", "minigrid", "textarena", "reasoning_gym"}
    code = f"import sys, mimoflash.world; print({extras} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


@pytest.mark.parametrize(
    ("world", "task"),
    [
        (domain("arithmetic", digits=[1, 2]), lambda world, seed: world.problem(seed)),
        (domain("maze", sizes=[3]), lambda world, seed: world.grid(seed).question().split("  1 2 3")[1][:24]),
        (domain("tools", offered=[1], parameters=1), lambda world, seed: world.errand(seed).request),
    ],
    ids=ALL,
)
def test_no_task_is_in_both_splits_in_whatever_words(world, task):
    """Few small tasks, so that each comes up many times, and what is asked, without the words around it."""
    held_out = [task(world, seed) for seed in islice(seeds(world, "held_out"), 400)]
    train = [task(world, seed) for seed in islice(seeds(world, "train"), 3600)]
    assert not set(held_out) & set(train)
    assert len(set(train)) < len(train), "no task came up twice: the test says nothing"


@pytest.mark.parametrize("name", ALL)
def test_the_seeds_of_the_two_splits_are_all_seeds_once(name):
    world = domain(name)
    held_out = list(islice(seeds(world, "held_out", start=100), 20))
    train = list(islice(seeds(world, "train", start=100), 20))
    assert min(held_out + train) >= 100
    assert all(is_held_out(world.demonstration(seed).messages) for seed in held_out)
    last = min(held_out[-1], train[-1])
    assert sorted(seed for seed in held_out + train if seed <= last) == list(range(100, last + 1))


def test_a_tenth_of_the_tasks_is_held_out():
    world = domain("maze")
    held_out = sum(is_held_out(world.demonstration(seed).messages) for seed in range(2000))
    assert abs(held_out - 200) < 5 * 13.4  # five standard deviations


def test_task_identity_is_what_the_user_says_first():
    user = {"role": "user", "content": "What is 1 + 1?"}
    reply, later = {"role": "assistant", "content": "2"}, {"role": "user", "content": "Thanks"}
    assert task_id([user]) == task_id([{"role": "system", "content": "Be brief."}, user, reply, later])
    assert task_id([user]) != task_id([later])
    assert task_id([user, later]) != task_id([{"role": "user", "content": "What is 1 + 1?Thanks"}])
    assert task_id([{"role": "user", "content": None}])  # conversations from elsewhere have an identity as well
    assert task_id([{"role": "user", "content": "\ud800"}])


def test_a_split_without_tasks_is_an_error_and_not_an_endless_search(monkeypatch):
    monkeypatch.setattr("mimoflash.world.protocol._SEARCH_LIMIT", 500)
    world = domain("arithmetic", digits=[1])
    held_out = is_held_out(world.demonstration(3).messages)
    only = world.problem(3)
    monkeypatch.setattr(type(world), "problem", lambda self, seed: only)
    with pytest.raises(ValueError, match=r"no .* task of arithmetic"):
        next(seeds(world, "train" if held_out else "held_out"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chess", {}, "the domains are arithmetic, file, gymnasium, maze"),
        ("maze", {"size": 4}, "unexpected keyword argument 'size'"),
        ("maze", {"sizes": [4, 20]}, "whole numbers from 3 to 9"),
        ("maze", {"sizes": 4}, "give a list"),
        ("arithmetic", {"digits": []}, "give a list"),
        ("arithmetic", {"digits": [1.5]}, "give a list"),
        ("arithmetic", {"operators": "+/"}, "some of"),
        ("tools", {"offered": [0]}, "from 1 to 10"),
        ("tools", {"parameters": 6}, "from 1 to 5"),
    ],
)
def test_a_wrong_name_or_option_says_what_is_right(name, options, message):
    with pytest.raises(ValueError, match=message):
        domain(name, **options)
    with pytest.raises(ValueError, match="train"):
        seeds(domain("maze"), "test")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    JSON | st.fixed_dictionaries({"function": JSON | st.fixed_dictionaries({"name": JSON, "arguments": JSON})}),
    max_size=3,
)
ODD = [
    None,
    [],
    {},
    {"content": None},
    {"content": "9" * 1_000_000},
    {"content": "U " * 1_000_000},
    {"content": "-" * 100_000 + "1," * 100_000},
    {"content": [{"type": "text", "text": "4"}]},
    {"tool_calls": None},
    {"tool_calls": "call"},
    {"tool_calls": [None]},
    {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]},
    {"tool_calls": [{"function": {"name": "f", "arguments": "9" * 100_000}}]},
    {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]},
    {"tool_calls": [{"function": {"name": ["f"], "arguments": {"a": float("nan")}}}]},
]


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(ALL),
    st.integers(0, 100),
    JSON | st.sampled_from(ODD) | st.fixed_dictionaries({"content": JSON, "tool_calls": CALLS | JSON}),
)
def test_no_message_makes_a_verifier_raise(name, seed, message):
    environment = domain(name).environment()
    environment.reset(seed)
    step = environment.step(message)
    assert step.reward in (0.0, 1.0)
    assert step.done


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("message", ODD)
def test_an_odd_message_earns_nothing(name, message):
    environment = domain(name).environment()
    environment.reset(5)
    assert environment.step(message).reward == 0.0


@pytest.mark.parametrize("name", ALL)
def test_a_step_without_a_task_asks_for_reset(name):
    environment = domain(name).environment()
    with pytest.raises(ValueError, match="reset"):
        environment.step({"content": "1"})
    environment.reset(1)
    environment.step({"content": "no"})
    with pytest.raises(ValueError, match="reset"):
        environment.step({"content": "1"})
