"""The streaming parser: failures seen in other servers, independence of cuts, nothing lost, linear time."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoflash.text import ChatParser, Event, StreamDecoder, Tokenizer, parse_chat, render_chat
from mimoflash.text.tokenizer import _BYTE_OF_CHAR

HEADER = "<|im_start|>user\nx<|im_end|><|im_start|>assistant\n"
OFF = HEADER + "<think></think>"
TYPES = {"text": "string", "count": "integer", "ratio": "number", "flag": "boolean", "list": "array", "map": "object"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {name: {"type": kind} for name, kind in TYPES.items()}},
        },
    }
]


def parsed(text: str, prompt: str = HEADER) -> tuple[str, str, list[tuple[str, dict]]]:
    """Reasoning, content and calls."""
    message = parse_chat(text, TOOLS, prompt)
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [(function["name"], json.loads(function["arguments"])) for function in functions]
    return message["reasoning_content"], message["content"], calls


NEWLINES = (
    "<tool_call>\n<function=f>\n<parameter=text>a</parameter>\n<parameter=count>2</parameter>\n"
    "</function>\n</tool_call>"
)
COMPACT = NEWLINES.replace("\n", "")
A_CALL = ("f", {"text": "a", "count": 2})


# The failures that SPEC names.


@pytest.mark.parametrize("prompt", [OFF, HEADER, "", HEADER + "<think>\n\n</think>\n\n"])
def test_an_answer_without_thinking_is_content(prompt: str):
    assert parsed("The answer.", prompt) == ("", "The answer.", [])


@pytest.mark.parametrize("history", ["never call inside <think></think>", "an open <think>", "</think>"])
def test_the_state_comes_from_the_prompts_end_only(history: str):
    prompt = history + "<|im_end|><|im_start|>assistant\n"
    assert parsed("<think>a</think>b", prompt) == ("a", "b", [])
    assert parsed("b", prompt) == ("", "b", [])
    assert parsed("a</think>b", prompt + "<think>") == ("a", "b", [])
    assert parsed("a</think>b", prompt + "<think>\n") == ("a", "b", [])
    assert parsed("a</think>b<think>", prompt + "<think></think>") == ("", "a</think>b<think>", [])


@pytest.mark.parametrize("call", [NEWLINES, COMPACT])
def test_a_call_ends_the_reasoning(call: str):
    assert parsed("<think>I look" + call) == ("I look", "", [A_CALL])
    assert parsed("<think>I look" + call + "\n</think>\n" + call + "Done") == ("I look", "Done", [A_CALL, A_CALL])
    assert parsed("I look" + call + "</think>b</think>", HEADER + "<think>") == ("I look", "b</think>", [A_CALL])


def test_a_mention_of_the_tag_does_not_end_the_reasoning():
    assert parsed("<think>use <tool_call> or\n<tool_call>\n not</think>b") == (
        "use <tool_call> or\n<tool_call>\n not",
        "b",
        [],
    )


def test_a_stream_gives_a_call_whole_and_once():
    for size in (1, 7, 1000):
        parser = ChatParser(TOOLS, OFF)
        text = "Look:" + NEWLINES + COMPACT
        events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
        calls = [event.call for event in events if event.kind == "tool_call"]
        assert [call["index"] for call in calls] == [0, 1]
        assert [call["function"]["arguments"] for call in calls] == ['{"text": "a", "count": 2}'] * 2
        assert len({call["id"] for call in calls}) == 2
        assert parser.finish() == []


@pytest.mark.parametrize(
    "value",
    [
        "null",
        "None",
        "&lt;b&gt; &amp;",
        "\n\na\n",
        " ",
        "",
        "true",
        "1",
        '"x"',
        "{}",
        "</function>\n</tool_call>",
        "<parameter=x>",
        "<think></think>",
        "a < b <",
    ],
)
def test_values_of_strings_are_verbatim(value: str):
    text = f"<tool_call><function=f><parameter=text>{value}</parameter></function></tool_call>"
    assert parsed(text) == ("", "", [("f", {"text": value})])
    assert parsed(text.replace("=f>", "=unknown>")) == ("", "", [("unknown", {"text": value})])


def test_types_are_the_schemas():
    given_text = {"count": "5", "ratio": "0.5", "flag": "True", "list": '[1, "é"]', "map": '{"a": null}', "other": "7"}
    body = "".join(f"<parameter={key}>{value}</parameter>" for key, value in given_text.items())
    assert parsed(f"<tool_call><function=f>{body}</function></tool_call>")[2] == [
        ("f", {"count": 5, "ratio": 0.5, "flag": True, "list": [1, "é"], "map": {"a": None}, "other": "7"})
    ]


def test_text_around_calls_is_kept_and_space_between_them_is_not():
    assert parsed(f"a\n{NEWLINES}\n\n{COMPACT}\n", OFF) == ("", "a\n", [A_CALL, A_CALL])
    assert parsed(f"{COMPACT}\n b <tool {COMPACT} \n", OFF) == ("", "\n b <tool ", [A_CALL, A_CALL])
    assert parsed(f"{COMPACT} <tool_ca", OFF) == ("", " <tool_ca", [A_CALL])


def test_calls_as_json():
    body = '{"name": "f", "arguments": {"text": "a", "count": 2}}'
    assert parsed(f"<tool_call>\n{body}\n</tool_call><tool_call>{body}</tool_call>") == ("", "", [A_CALL, A_CALL])
    assert parsed('<tool_call>{"name": "g", "arguments": "{\\"x\\": 1}"}</tool_call>')[2] == [("g", {"x": 1})]
    assert parsed('<tool_call>{"name": "g", "parameters": {}}</tool_call>')[2] == [("g", {})]
    assert parsed('<tool_call>{"name": "g"}</tool_call>')[2] == [("g", {})]


MALFORMED = [
    "<tool_call>nothing</tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>\n<function=>\n</function>\n</tool_call>",
    "<tool_call><function=a\nb></function></tool_call>",
    "<tool_call><function=f>stray<parameter=text>a</parameter></function></tool_call>",
    "<tool_call><function=f><parameter=>a</parameter></function></tool_call>",
    "<tool_call><function=f></function>x</tool_call>",
    "<tool_call><function=f></function><function=g></function></tool_call>",
    '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    "<tool_call>{broken}</tool_call>",
    '<tool_call>{"name": "f", "arguments": "no"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"a":' + "[" * 100_000 + "</tool_call>",
    "<function=f></function>",
    "<tool_call",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_call_is_content_and_the_next_call_is_read(text: str):
    assert parsed(text, OFF) == ("", text, [])
    assert parsed(text + NEWLINES, OFF) == ("", text, [A_CALL])


@pytest.mark.parametrize("call", [NEWLINES, COMPACT, '<tool_call>\n{"name": "f"}\n</tool_call>'])
def test_a_call_that_breaks_off_is_text_of_where_it_stands(call: str):
    for end in range(1, len(call)):
        assert parsed("a" + call[:end], OFF) == ("", "a" + call[:end], [])
        if end >= len("<tool_call>"):
            assert parsed("<think>a" + call[:end]) == ("a" + call[:end], "", [])


def test_call_ids_differ_from_turn_to_turn():
    first, second = (parse_chat(COMPACT, prompt=prompt)["tool_calls"][0]["id"] for prompt in (OFF, OFF + OFF))
    assert first != second
    assert parse_chat(COMPACT, prompt=OFF)["tool_calls"][0]["id"] == first


def test_nothing_is_lost_before_the_stream_ends():
    parser = ChatParser()
    assert parser.feed("a<") == [Event("content", "a")]
    assert parser.feed("b") == [Event("content", "<b")]
    assert parser.feed("<tool_") == []
    assert parser.finish() == [Event("content", "<tool_")]
    assert parser.message["content"] == "a<b<tool_"


# Properties.

PIECES = [
    NEWLINES + " \n" + COMPACT,
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=f>",
    "</function>",
    "<parameter=text>",
    "<parameter=count>",
    "</parameter>",
    NEWLINES,
    COMPACT,
    '<tool_call>{"name": "f", "arguments": {"count": 1}}</tool_call>',
    "\n",
    " ",
    "<",
    "</",
    ">",
    "7",
    "é🙂",
]
turns = st.lists(st.sampled_from(PIECES) | st.text(st.sampled_from("ab<>/\n {"), max_size=4), max_size=14).map("".join)
prompts = st.sampled_from([OFF, HEADER, HEADER + "<think>"])


def joined(events: list[Event]) -> list[Event]:
    """The events, with neighbours of one kind joined."""
    result: list[Event] = []
    for event in events:
        if result and event.kind == result[-1].kind != "tool_call":
            result[-1] = Event(event.kind, result[-1].text + event.text)
        else:
            result.append(event)
    return result


@settings(max_examples=400, deadline=None)
@given(text=turns, prompt=prompts, data=st.data())
def test_events_and_message_do_not_depend_on_the_cuts(text: str, prompt: str, data: st.DataObject):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    streams = {"whole": [text], "by character": list(text)}
    streams["by cuts"] = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    outcomes = {}
    for name, pieces in streams.items():
        parser = ChatParser(TOOLS, prompt)
        events = [event for piece in pieces for event in parser.feed(piece)]
        events += parser.finish()
        assert all(event.text or event.call for event in events)
        outcomes[name] = (joined(events), parser.message)
    assert outcomes["by character"] == outcomes["by cuts"] == outcomes["whole"]
    events, message = outcomes["whole"]
    for kind, key in (("reasoning", "reasoning_content"), ("content", "content")):
        assert "".join(event.text for event in events if event.kind == kind) == message[key]
    assert [{k: v for k, v in event.call.items() if k != "index"} for event in events if event.call] == message[
        "tool_calls"
    ]


@settings(max_examples=400, deadline=None)
@given(text=turns, prompt=prompts)
def test_nothing_is_lost(text: str, prompt: str):
    """Every character that is not space or a think tag is in reasoning or content, unless a call was read."""
    parser = ChatParser(TOOLS, prompt)
    events = [*parser.feed(text), *parser.finish()]
    if not any(event.call for event in events):
        seen = "".join(event.text for event in events)
        removed = [text, text.replace("<think>", "", 1) if text.startswith("<think>") else text]
        assert seen in [*removed, *(one.replace("</think>", "", 1) for one in removed)]


def test_special_tokens_in_pieces_of_bytes(tokenizer: Tokenizer):
    message = {
        "role": "assistant",
        "content": "é🙂",
        "reasoning_content": "世",
        "tool_calls": [{"function": {"name": "f", "arguments": {"text": "🙂<think>"}}}],
    }
    whole = render_chat(tokenizer, [message], TOOLS, generation_prompt=False)
    text = whole[whole.rindex("assistant\n") + len("assistant\n") :]
    for ids in (tokenizer.encode(text), [tokenizer.core.token_to_id(char) for char in byte_characters(text)]):
        decoder, parser = StreamDecoder(tokenizer), ChatParser(TOOLS, HEADER)
        for index in ids:
            parser.feed(decoder.feed([index]))
        parser.feed(decoder.finish())
        parser.finish()
        assert parser.message["content"].removesuffix("<|im_end|>") == "é🙂"
        assert parser.message["reasoning_content"] == "世"
        assert json.loads(parser.message["tool_calls"][0]["function"]["arguments"]) == {"text": "🙂<think>"}


def byte_characters(text: str) -> str:
    """The printable character that byte-level vocabularies write for each byte of the text."""
    character = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    return "".join(character[byte] for byte in text.encode())


UNITS = ["a", "<", "<tool_call>", " ", "<tool_call> ", COMPACT, "</think>", "<function=f>"]
PREFIXES = ["", "<think>", "<tool_call>{", "<tool_call><function=", "<tool_call><function=f><parameter=text>", COMPACT]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_between_pieces_no_more_than_a_tags_beginning_is_looked_at_again(prefix: str):
    for unit in UNITS:
        parser = ChatParser(TOOLS, HEADER)
        for piece in [prefix, *[unit[:5], unit[5:]] * 50]:
            parser.feed(piece)
            assert len(parser._buffer) < len("</parameter>")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_time_is_linear_in_the_text(prefix: str):
    def seconds(unit: str, size: int) -> float:
        text = prefix + unit * (size // len(unit))
        taken = []
        for _ in range(3):
            start = time.thread_time()  # of this thread alone: others may be spinning
            parse_chat(text, TOOLS, HEADER)
            taken.append(time.thread_time() - start)
        return min(taken)

    for unit in UNITS:
        small, large = seconds(unit, 5_000), seconds(unit, 150_000)
        assert large < 200 * small + 0.1  # linear: 30 times, quadratic: 900 times


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        (
            "<think>The form is <tool_call><function=f> then args. So 4.</think>The answer is 4.",
            "The form is <tool_call><function=f> then args. So 4.",
            "The answer is 4.",
        ),
        (
            '<think>I will use <tool_call> and <tool_call>{"a":1} </think>answer',
            'I will use <tool_call> and <tool_call>{"a":1} ',
            "answer",
        ),
    ],
)
def test_a_call_that_is_only_mentioned_in_reasoning_stays_there(text, reasoning, content):
    message = parse_chat(text)
    assert (message["reasoning_content"], message["content"], message["tool_calls"]) == (reasoning, content, [])
    parser = ChatParser()
    for character in text:
        parser.feed(character)
    parser.finish()
    assert parser.message == message
