"""Tool use: the request determines one call, checked by types; each part that can be wrong earns nothing."""

import json
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.world import domain, play
from mimoflash.world.answers import same_value
from mimoflash.world.tools import guess_pass_rate

SEEDS = st.integers(0, 2**40)
WORLDS = st.sampled_from([{}, {"offered": [10], "parameters": 5}, {"offered": [1], "parameters": 1}])
PYTHON_TYPES = {"string": str, "integer": int, "boolean": bool, "array": list}


def parts(demonstration):
    """The request, the call's name and arguments, the tool's result, the final answer."""
    user, call, result, answer = demonstration.messages
    function = call["tool_calls"][0]["function"]
    return user["content"], function["name"], function["arguments"], result["content"], answer["content"]


def run(world, seed, call, answer="none"):
    """Play the call (None for no call) and then the answer."""
    said = iter([{"content": "", "tool_calls": call}, {"content": answer}])
    return play(world.environment(), seed, lambda messages, tools: {"role": "assistant", **next(said)})


def one_call(name, arguments):
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


@settings(deadline=None)
@given(WORLDS, SEEDS)
def test_the_request_determines_the_tool_and_the_arguments_are_typed_by_its_schema(options, seed):
    demonstration = domain("tools", **options).demonstration(seed)
    request, name, arguments, _, _ = parts(demonstration)
    words = re.sub(r"[,.?]", "", request).split()
    opening = re.sub(r"[,.?].*", "", request).split()
    named = {tool["function"]["name"]: tool["function"]["parameters"] for tool in demonstration.tools}
    assert len(named) == len(demonstration.tools)
    asked = [n for n in named if set(n.split("_")[1:]) <= set(opening)]
    assert asked == [name]
    schemas = named[name]["properties"]
    assert list(schemas) == list(arguments)
    for key, value in arguments.items():
        assert type(value) is PYTHON_TYPES[schemas[key]["type"]]
        assert value in schemas[key].get("enum", [value])
        spoken = value if isinstance(value, list) else [value]
        if isinstance(value, bool):
            spoken = [word for word in words if word in (("yes", "on", "true") if value else ("no", "off", "false"))][
                :1
            ]
            assert spoken, request
        assert all(str(part) in words for part in spoken), request


@settings(deadline=None)
@given(WORLDS, SEEDS, st.booleans())
def test_the_answer_is_the_tools_result(options, seed, as_text):
    world = domain("tools", **options)
    _, name, arguments, result, answer = parts(world.demonstration(seed))
    (value,) = json.loads(result).values()
    assert str(value) in answer
    call = one_call(name, json.dumps(arguments) if as_text else arguments)
    call[0]["id"] = "call_7"
    episode = run(world, seed, call, answer)
    assert episode.reward == 1.0
    assert episode.messages[2] == {"role": "tool", "content": result, "tool_call_id": "call_7"}
    assert run(world, seed, call, str(value)).reward == 1.0
    for wrong in (str(value + 1), f"{value} {value}0", "", "done", f"-{value}"):
        failed = run(world, seed, call, wrong)
        assert (failed.reward, failed.done, failed.info["failed"], failed.turns) == (0.0, True, "answer", 2)


def corruptions(name, arguments, other_tool):
    """Calls that differ from the right one in a single thing."""
    yield []
    yield one_call(name, arguments) * 2
    yield one_call(other_tool, arguments)
    yield one_call(name.upper(), arguments)
    yield one_call(name, {**arguments, "more": 1})
    yield one_call(name, json.dumps(arguments)[:-1])
    yield one_call(name, [arguments])
    for key, value in arguments.items():
        without = {k: v for k, v in arguments.items() if k != key}
        yield one_call(name, without)
        yield one_call(name, {**without, key + "s": value})
        if isinstance(value, bool):
            others = [not value, int(value), str(value)]
        elif isinstance(value, int):
            others = [value + 1, float(value), str(value), math.nan]
        elif isinstance(value, list):
            others = [value[:-1], [*value, "x"], ", ".join(value), [value]]
        else:
            others = [value + "x", value.upper(), [value], None]
        for other in others:
            yield one_call(name, {**without, key: other})


@settings(deadline=None)
@given(WORLDS, SEEDS)
def test_a_call_with_anything_wrong_ends_the_episode_without_reward(options, seed):
    world = domain("tools", **options)
    demonstration = world.demonstration(seed)
    _, name, arguments, _, answer = parts(demonstration)
    others = [tool["function"]["name"] for tool in demonstration.tools if tool["function"]["name"] != name]
    for call in corruptions(name, arguments, others[0] if others else "search"):
        episode = run(world, seed, call, answer)
        assert (episode.reward, episode.done, episode.turns) == (0.0, True, 1), call
        assert episode.info["failed"] == "call"
        assert all(message["role"] != "tool" for message in episode.messages)


def test_a_second_call_is_no_answer():
    world = domain("tools")
    _, name, arguments, result, _ = parts(world.demonstration(0))
    environment = world.environment()
    environment.reset(0)
    message = {"content": result, "tool_calls": one_call(name, arguments)}
    assert not environment.step(message).done
    step = environment.step(message)
    assert (step.reward, step.done, step.info["failed"]) == (0.0, True, "answer")


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        (1, 1, True), (1, True, False), (True, 1, False), (1.0, 1, False), ("1", 1, False), (math.nan, math.nan, False),
        ([1, "a"], [1, "a"], True), ([1], [1, 1], False), ([True], [1], False), ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"b": 1}, False), (None, None, True), ({}, [], False),
    ],
)
def test_values_are_compared_with_their_types(given, wanted, same):
    assert same_value(given, wanted) is same


def guesses_passed(world, seeds, rng):
    passed = 0.0
    for seed in seeds:
        demonstration = world.demonstration(seed)
        chosen = rng.choice(demonstration.tools)["function"]
        words = [word.strip(",.?") for word in parts(demonstration)[0].split()]
        arguments = {key: guess(schema, words, rng) for key, schema in chosen["parameters"]["properties"].items()}
        passed += run(world, seed, one_call(chosen["name"], arguments), parts(demonstration)[3]).reward
    return passed


def test_chance_is_the_pass_rate_of_the_guesser_it_describes():
    world, rounds = domain("tools"), 12
    count = 500 * rounds
    passed = guesses_passed(world, list(range(500)) * rounds, random.Random(2))
    assert abs(passed / count - world.chance) < 4.5 * math.sqrt(world.chance / count)


@pytest.mark.parametrize("kind", ["string", "integer", "boolean", "enum", "array"])
def test_each_kind_of_parameter_is_guessed_as_often_as_said(kind):
    world = domain("tools", offered=[1], parameters=1)
    errands = {seed: world.errand(seed) for seed in range(1500)}
    rates = {
        seed: guess_pass_rate(errand) for seed, errand in errands.items() if errand.meant.parameters[0].kind == kind
    }
    passed = guesses_passed(world, [seed for seed in rates for _ in range(4)], random.Random(3))
    variance = 4 * sum(rate * (1 - rate) for rate in rates.values())
    assert abs(passed - 4 * sum(rates.values())) < 4.5 * math.sqrt(variance)


def guess(schema, words, rng):
    if schema["type"] == "boolean":
        return rng.random() < 0.5
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "array":
        start, end = rng.choice([(i, j) for i in range(len(words)) for j in range(i + 1, len(words) + 1)])
        return [word for word in words[start:end] if word != "and"]
    word = rng.choice(words)
    return int(word) if schema["type"] == "integer" and word.isdigit() else word


def test_the_place_of_the_tool_says_nothing():
    errands = [domain("tools", offered=[3]).errand(seed) for seed in range(1500)]
    places = [errand.offered.index(errand.meant) for errand in errands]
    assert all(abs(places.count(place) - 500) < 90 for place in range(3))


def test_the_kinds_of_parameters_are_a_level():
    world = domain("tools", parameters=2, kinds=["integer", "enum"])
    kinds = {parameter.kind for seed in range(200) for parameter in world.errand(seed).meant.parameters}
    assert kinds == {"integer", "enum"}
    for wrong in ({"kinds": []}, {"kinds": ["float"]}, {"kinds": "enum"}, {"kinds": ["enum"], "parameters": 2}):
        with pytest.raises(ValueError, match=r"tools: (kinds|parameters)"):
            domain("tools", **wrong)
