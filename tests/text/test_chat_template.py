"""Rendering: the format to the letter, transformers as oracle for the template environment, masks for training."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimoflash.text import Tokenizer, encode_training_chat, load_tokenizer, parse_chat, render_chat

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & later",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where", "enum": ["Rom", "Köln"]},
                "days": {"type": ["integer", "null"], "default": 3},
                "where": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            },
            "required": ["place"],
        },
        "strict": True,
    },
}
BARE = {"type": "function", "function": {"name": "now"}}


def call(name: str, arguments: object) -> dict:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi </think> <b>&amp;</b>\n"},
    {"role": "assistant", "content": "Hello.", "reasoning_content": "greet\n"},
    {"role": "system", "content": "Later."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": " look ",
        "tool_calls": [
            call("weather", {"place": 'a\n"null" <é>\n', "days": None, "where": {"x": [1, "ü<"]}, "f": 0.5, "b": True}),
            call("now", {}),
        ],
    },
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    {"role": "tool", "content": "noon", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "tool", "content": "late"},
]

RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>"
    "<|im_start|>user\nHi </think> <b>&amp;</b>\n<|im_end|>"
    "<|im_start|>assistant\n<think></think>Hello.<|im_end|>"
    "<|im_start|>system\nLater.<|im_end|>"
    "<|im_start|>user\nWeather?<|im_end|>"
    "<|im_start|>assistant\n<think> look </think>"
    '<tool_call>\n<function=weather>\n<parameter=place>a\n"null" <é>\n</parameter>\n<parameter=days>None</parameter>\n'
    '<parameter=where>{"x": [1, "ü<"]}</parameter>\n<parameter=f>0.5</parameter>\n<parameter=b>True</parameter>\n'
    "</function>\n</tool_call><tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>"
    "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\n<|im_end|>"
    "<|im_start|>assistant\n<think></think>Sunny.<|im_end|>"
    "<|im_start|>tool\n<tool_response>\nlate\n</tool_response>\n<|im_end|>"
)


def test_a_conversation_to_the_letter():
    assert render_chat(None, HISTORY, generation_prompt=False) == RENDERED
    assert render_chat(None, HISTORY) == RENDERED + "<|im_start|>assistant\n<think></think>"
    assert render_chat(None, HISTORY, enable_thinking=True).endswith("<|im_end|><|im_start|>assistant\n")


def test_reasoning_before_the_last_user_message_is_kept_on_demand_only():
    kept = RENDERED.replace("<think></think>Hello.", "<think>greet\n</think>Hello.")
    assert render_chat(None, HISTORY, generation_prompt=False, keep_all_reasoning=True) == kept
    assert render_chat(None, HISTORY[2:3], generation_prompt=False).endswith("<think>greet\n</think>Hello.<|im_end|>")


def test_reasoning_is_split_off_content_that_begins_with_it_and_only_then():
    def turn(content: str, **more: str) -> str:
        text = render_chat(None, [{"role": "assistant", "content": content, **more}], generation_prompt=False)
        return text.split("<|im_start|>assistant\n")[1]

    assert turn("<think>\na</think>\n\nb</think>") == "<think>\na</think>\n\nb</think><|im_end|>"
    assert turn("<think></think>b") == "<think></think>b<|im_end|>"
    assert turn("write </think> here") == "<think></think>write </think> here<|im_end|>"
    assert turn("<think>b</think>c", reasoning_content="a") == "<think>a</think><think>b</think>c<|im_end|>"


def test_tools_stand_in_the_system_turn_as_xml():
    text = render_chat(None, [{"role": "user", "content": "x"}], [WEATHER, BARE])
    system, rest = text.split("<|im_end|>", 1)
    assert rest == "<|im_start|>user\nx<|im_end|><|im_start|>assistant\n<think></think>"
    default, tools = system.split("\n\n# Tools\n\n")
    assert default == "<|im_start|>system\nYou are a helpful assistant."
    assert tools[tools.index("<tools>") : tools.index("</tools>")] == (
        "<tools>\n<function>\n<name>weather</name>\n<description>The weather <now> & later</description>\n<parameters>"
        "\n<parameter>\n<name>place</name>\n<type>string</type>\n<description>Where</description>"
        '\n<enum>["Rom", "Köln"]</enum>\n</parameter>'
        '\n<parameter>\n<name>days</name>\n<type>["integer", "null"]</type>\n<default>3</default>\n</parameter>'
        '\n<parameter>\n<name>where</name>\n<anyOf>[{"type": "object"}, {"type": "array"}]</anyOf>\n</parameter>'
        '\n<required>["place"]</required>\n</parameters>\n<strict>True</strict>\n</function>'
        "\n<function>\n<name>now</name>\n<parameters>\n</parameters>\n</function>\n"
    )
    assert "<tool_call>\n<function=" in tools[tools.index("</tools>") :]
    assert render_chat(None, [{"role": "system", "content": "S"}], [BARE]).startswith(
        "<|im_start|>system\nS\n\n# Tools"
    )


def test_openai_forms_of_a_message_are_the_same_message():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render_chat(None, parts) == render_chat(None, [{"role": "user", "content": "ab"}])
    null = {"role": "assistant", "content": None, "reasoning_content": None, "tool_calls": [call("f", '{"a": 1}')]}
    plain = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    assert render_chat(None, [null]) == render_chat(None, [plain])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "part that is not text"),
        (
            {"role": "assistant", "tool_calls": [call("f", "{broken")]},
            "arguments of the call of 'f' are not a JSON object",
        ),
        ({"role": "assistant", "tool_calls": [call("f", "[1]")]}, "arguments of the call of 'f' are not a JSON object"),
        ({"role": "robot", "content": "x"}, 'has role "robot"'),
    ],
)
def test_a_message_that_cannot_be_rendered_is_named(message: dict, error: str):
    with pytest.raises(ValueError, match=error):
        render_chat(None, [message])


FOREIGN = (  # whitespace control, helpers, sandbox: what hub templates use
    "{%- set ns = namespace(n=0) %}\n{% for m in messages %}\n    {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
    "    {% set ns.n = ns.n + 1 %}\n"
    "[{{ bos_token }}{{ m['role'] }}] {{ m['content'] | trim }}\n    {# note #}\n{% endfor %}\n"
    "{{ tools | tojson(indent=2) if tools }}{{ {'a<': 'é&'} | tojson }}{{ ns.n }}{{ strftime_now('%Y') | length }}\n"
    "{% generation %}x{% endgeneration %}{{ eos_token if add_generation_prompt }}\n"
)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tools", [None, [WEATHER, BARE]])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_our_template_alike(tokenizer: Tokenizer, theirs, tools, thinking, keep, prompt):
    text = render_chat(
        tokenizer, HISTORY, tools, generation_prompt=prompt, enable_thinking=thinking, keep_all_reasoning=keep
    )
    options = {"enable_thinking": thinking, "keep_all_reasoning": keep}
    assert text == theirs.apply_chat_template(HISTORY, tools, add_generation_prompt=prompt, tokenize=False, **options)
    ids, mask = encode_training_chat(tokenizer, HISTORY, tools, **options)
    encoded = theirs.apply_chat_template(
        HISTORY, tools, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False, **options
    )
    assert ids == encoded["input_ids"]
    assert mask == [bool(written) for written in encoded["assistant_masks"]]


def test_transformers_renders_a_foreign_template_alike(tokenizer: Tokenizer, theirs):
    own = Tokenizer(tokenizer.core, chat_template=FOREIGN, config=tokenizer.config)
    expected = theirs.apply_chat_template(HISTORY, [WEATHER], chat_template=FOREIGN, tokenize=False, bos_token="")
    assert render_chat(own, HISTORY, [WEATHER], generation_prompt=False) == expected
    assert render_chat(FOREIGN, HISTORY, [WEATHER], generation_prompt=False) == expected
    assert render_chat(own, HISTORY).endswith("x<|im_end|>")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[9].role.x }}",
        "{% if %}",
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_a_value_error(source: str):
    with pytest.raises(ValueError, match="chat template refuses"):
        render_chat(source, [{"role": "user", "content": "x"}])


def test_special_tokens_of_another_map_are_rendered(tokenizer: Tokenizer):
    mapped = Tokenizer(tokenizer.core, special_texts={"im_end": "<|eot|>", "think": "<thought>"})
    text = render_chat(mapped, [{"role": "user", "content": "x"}])
    assert text.endswith("<|im_start|>user\nx<|eot|><|im_start|>assistant\n<thought></think>")


def written(tokenizer: Tokenizer, messages: list, **options: bool) -> list[str]:
    """The texts of the runs of tokens that the mask gives to the assistant."""
    ids, mask = encode_training_chat(tokenizer, messages, **options)
    runs: list[list[int]] = []
    for index, (token, own) in enumerate(zip(ids, mask, strict=True)):
        if own and not mask[index - 1]:
            runs.append([])
        if own:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_the_mask_is_what_the_model_writes_after_its_prompt(tokenizer: Tokenizer):
    calls = RENDERED[RENDERED.index("<think> look") : RENDERED.index("<|im_start|>tool")]
    assert written(tokenizer, HISTORY) == ["Hello.<|im_end|>", calls, "Sunny.<|im_end|>"]
    # thinking on: the model writes the empty tags itself, but not those that stand for reasoning which was dropped
    assert written(tokenizer, HISTORY, enable_thinking=True) == [
        "Hello.<|im_end|>",
        calls,
        "<think></think>Sunny.<|im_end|>",
    ]
    assert written(tokenizer, HISTORY, keep_all_reasoning=True)[0] == "<think>greet\n</think>Hello.<|im_end|>"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(st.sampled_from("a \n1é<"), max_size=6), reasoning=st.sampled_from(["", "\n", "so 1"]))
def test_training_ids_are_the_prompts_and_the_answers(tokenizer: Tokenizer, content: str, reasoning: str):
    question = [{"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    for source in (
        None,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ):
        own = Tokenizer(tokenizer.core, chat_template=source)
        ids, mask = encode_training_chat(own, [*question, answer, *question])
        start = mask.index(True)
        end = start + mask[start:].index(False)
        assert ids[:start] == own.encode(render_chat(own, question))  # its reasoning is dropped: not thinking
        assert ids[start:end] == own.encode(content + "<|im_end|>")
        assert not any(mask[end:])


def test_a_template_that_rewrites_earlier_turns_cannot_give_a_mask(tokenizer: Tokenizer):
    source = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    with pytest.raises(ValueError, match="changes earlier turns, once message 2 follows"):
        encode_training_chat(Tokenizer(tokenizer.core, chat_template=source), HISTORY[1:3])


def test_smol_renders_and_trains_by_its_own_template(smol_gguf: Path):
    smol = load_tokenizer(smol_gguf)
    assert render_chat(smol, HISTORY[:2]).endswith("</b>\n<|im_end|>\n<|im_start|>assistant\n")
    assert written(smol, HISTORY[:3]) == ["Hello.<|im_end|>"]


plain = st.text(st.sampled_from("ab <>&/\"'\n\t{}[]=é0") | st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    plain | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(plain, inner, max_size=2),
    max_leaves=4,
)
KINDS = {
    str: "string",
    int: "integer",
    bool: "boolean",
    type(None): "null",
    float: "number",
    list: "array",
    dict: "object",
}
names = st.text(st.sampled_from("abc_-.1é "), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    content=plain,
    reasoning=plain,
    calls=st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), max_size=3),
    thinking=st.booleans(),
)
def test_parsing_inverts_rendering(content: str, reasoning: str, calls: list, thinking: bool):
    calls = [(f"{index}{name}", arguments) for index, (name, arguments) in enumerate(calls)]
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [call(name, arguments) for name, arguments in calls],
    }
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": KINDS[type(value)]} for key, value in arguments.items()},
                },
            },
        }
        for name, arguments in calls
    ]
    question = [{"role": "user", "content": "</think> <think>"}]
    prompt = render_chat(None, question, tools, enable_thinking=thinking or bool(reasoning))
    whole = render_chat(None, [*question, message], tools, generation_prompt=False, enable_thinking=thinking)
    assert whole.startswith(prompt)
    parsed = parse_chat(whole[len(prompt) :].removesuffix("<|im_end|>"), tools, prompt)
    again = render_chat(None, [*question, parsed], tools, generation_prompt=False, enable_thinking=thinking)
    assert again == whole
    assert (parsed["content"], parsed["reasoning_content"]) == (content, reasoning)
    functions = [parsed_call["function"] for parsed_call in parsed["tool_calls"]]
    assert [(function["name"], json.loads(function["arguments"])) for function in functions] == calls
