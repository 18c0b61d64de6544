"""Conversations in the browser: the pure tree, and its list with search, rename, delete, export and import."""

# ruff: noqa: E501 -- lines of HTML and script stay whole

import json
import re

import pytest


def in_module(chat, module, body):
    """Runs a function's body in the page with a module's exports as `m`."""
    return chat.page.evaluate(f"async () => {{ const m = await import('/page/{module}.js'); {body} }}")


def test_the_path_follows_the_choices(chat):
    seen = in_module(chat, "conversation", """
        const c = m.createConversation(), seen = [];
        const see = () => seen.push(m.path(c).map((x) => x.content).join(" "));
        const u = m.add(c, null, {role: "user", content: "u"});
        const a = m.add(c, u.id, {role: "assistant", content: "a"});
        const u2 = m.add(c, a.id, {role: "user", content: "u2"});
        const b = m.add(c, u.id, {role: "assistant", content: "b"}); see();
        m.choose(c, a.id); see();
        const v = m.add(c, null, {role: "user", content: "v"}); see();
        m.choose(c, b.id); see();
        m.choose(c, u2.id); see();
        return [seen, m.siblings(c, b.id).map((x) => x.content), m.siblings(c, v.id).map((x) => x.content)];
    """)
    assert seen == [["u b", "u a u2", "v", "u b", "u a u2"], ["a", "b"], ["u", "v"]]


def test_any_tree_has_a_path_from_its_root_to_a_leaf(chat):
    assert in_module(chat, "conversation", """
        let seed = 1;
        const dice = (n) => (seed = (seed * 1664525 + 1013904223) % 4294967296) % n;
        for (let trial = 0; trial < 100; trial += 1) {
          const c = m.createConversation();
          for (let step = 0; step < 20; step += 1) {
            const parent = c.messages.length && dice(5) ? c.messages[dice(c.messages.length)].id : null;
            if (dice(3) || !c.messages.length) m.add(c, parent, {role: "user", content: String(step)});
            else m.choose(c, c.messages[dice(c.messages.length)].id);
            const path = m.path(c);
            if (path[0].parent !== null || path.some((x, at) => at && x.parent !== path[at - 1].id)) return "broken";
            if (c.messages.some((x) => x.parent === path.at(-1).id)) return "not a leaf";
          }
        }
        return "sound";
    """) == "sound"


def test_a_request_holds_thinking_calls_and_results(chat):
    request = in_module(chat, "conversation", """
        return m.toRequest([
          {role: "user", content: "q"},
          {role: "assistant", content: "", reasoning: "r", toolCalls: [{id: "1", name: "f", arguments: "{}"}, {id: "2", name: "g", arguments: "{}"}]},
          {role: "tool", toolCallId: "1", content: "x"},
          {role: "assistant", content: ""},
          {role: "user", content: "p"},
        ], " ");
    """)
    assert [message["role"] for message in request] == ["user", "assistant", "tool", "tool", "user"]
    assert request[1]["reasoning_content"] == "r"
    assert request[1]["tool_calls"][1] == {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    assert request[3] == {"role": "tool", "tool_call_id": "2", "content": "No result was given."}


def test_deltas_build_a_message_however_they_are_cut(chat):
    message = in_module(chat, "conversation", """
        const message = {content: ""};
        for (const delta of [
          {role: "assistant", content: ""}, {reasoning_content: "th"}, {reasoning: "ink"}, {content: "a"}, {content: "b"},
          {tool_calls: [{index: 1, id: "y", function: {name: "g", arguments: ""}}, {index: 0, id: "x", function: {name: "f", arguments: "{"}}]},
          {tool_calls: [{index: 0, function: {arguments: "}"}}]}, {tool_calls: [{index: 1, function: {arguments: "[]"}}]},
        ]) m.takeDelta(message, delta);
        return message;
    """)
    assert message == {
        "content": "ab", "reasoning": "think",
        "toolCalls": [{"id": "x", "name": "f", "arguments": "{}"}, {"id": "y", "name": "g", "arguments": "[]"}],
    }


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1 + 2 * 3", 7), ("-2 ^ 2", -4), ("2 ** 3 ** 2", 512), ("(1 + 2) × 3 ÷ 4", 2.25), ("sqrt(16) + max(1, 2, 3)", 7), ("0.1 + 0.2", 0.3),
     ("1e3 - 1", 999), ("2^-1", 0.5), ("7 % 4", 3)],
)
def test_the_calculator(chat, expression, value):
    assert in_module(chat, "tools", f"return m.calculate({json.dumps(expression)})") == value


def test_the_calculator_refuses_what_is_no_arithmetic(chat):
    wrong = ["alert(1)", "constructor(1)", "1 +", "(1", "1 2", "a.b", "__proto__", "'x'", "", "1;2", "sqrt 2"]
    said = in_module(chat, "tools", f"""
        return {json.dumps(wrong)}.map((text) => {{ try {{ return m.calculate(text); }} catch (error) {{ return error.message; }} }});
    """)
    assert all(isinstance(message, str) and message for message in said), said


def titles(chat):
    return chat.page.locator("#conversations .title").all_inner_texts()


def test_conversations_are_kept_searched_and_renamed(chat):
    chat.ask("the first about whales")
    chat.page.click("#new")
    chat.ask("the second about bees")
    chat.reload()
    assert titles(chat) == ["the second about bees", "the first about whales"]
    chat.prose.get_by_text("You said: the second about bees").wait_for()  # the one that was open

    chat.page.keyboard.press("Control+k")
    chat.page.keyboard.type("said whales")
    chat.page.locator("#conversations li", has_text="bees").wait_for(state="detached")
    assert titles(chat) == ["the first about whales"]
    chat.page.fill("#search", "no such thing")
    chat.page.get_by_text("Nothing found.").wait_for()
    chat.page.fill("#search", "")

    entry = chat.page.locator("#conversations li", has_text="whales")
    entry.hover()
    entry.get_by_role("button", name="Rename").click()
    chat.page.get_by_label("New title").fill("Whales & co")
    chat.page.keyboard.press("Enter")
    chat.page.locator("#conversations .title", has_text="Whales & co").click()
    assert chat.page.locator("#title").inner_text() == "Whales & co"
    chat.reload()
    assert "Whales & co" in titles(chat)


def test_delete_can_be_undone(chat):
    chat.ask("keep me")
    entry = chat.page.locator("#conversations li")
    entry.hover()
    entry.get_by_role("button", name="Delete").click()
    chat.page.get_by_text("Conversations appear here.").wait_for()
    assert chat.page.locator("#empty").is_visible()
    chat.page.get_by_role("button", name="Undo").click()
    chat.page.locator("#conversations .title", has_text="keep me").click()
    chat.prose.get_by_text("You said: keep me").wait_for()


def test_a_deleted_conversation_does_not_come_back_with_its_answer(chat):
    chat.send("slow")
    chat.prose.get_by_text("one two").wait_for()
    entry = chat.page.locator("#conversations li")
    entry.hover()
    entry.get_by_role("button", name="Delete").click()
    chat.page.wait_for_timeout(1500)
    chat.reload()
    assert titles(chat) == []


def test_export_and_import_give_the_same_conversations(chat, open_chat, tmp_path):
    chat.page.click("#thinking")
    chat.ask("think well")
    chat.button("Regenerate").click()
    chat.answer.get_by_text("2/2").wait_for()
    chat.ask("weather")
    with chat.page.expect_download() as download:
        chat.page.click("#export-all")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert re.fullmatch(r"conversations-\d{4}-\d\d-\d\d\.json", file.name)

    other = open_chat()
    other.page.set_input_files("#import-files", file)
    other.page.get_by_text("1 conversation imported.").wait_for()
    other.page.locator("#conversations .title").click()
    other.answer.locator(".call").wait_for()
    assert other.page.locator("#thread").inner_text() == chat.page.locator("#thread").inner_text()
    with other.page.expect_download() as download:
        other.page.click("#export-all")
    assert json.loads(file.read_text())["conversations"] == json.loads(download.value.path().read_text())["conversations"]

    other.page.set_input_files("#import-files", file)  # a second time: beside the first, not over it
    other.page.locator("#conversations li").nth(1).wait_for()


GOOD = {"id": "m1", "parent": None, "chosen": None, "role": "user", "content": "x", "created": 1}


def exported(*messages, **changes):
    conversation = {"id": "c1", "title": "t", "created": 1, "updated": 1, "chosen": "m1", "messages": list(messages)} | changes
    return json.dumps({"format": "mimoflash-conversations", "version": 1, "conversations": [conversation]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no export of this page"),
        ('{"format": "mimoflash-conversations", "version": 9}', "version 9 is unknown"),
        ('{"format": "mimoflash-conversations", "version": 1, "conversations": 1}', '"conversations" is not a list'),
        (exported(GOOD | {"role": "root"}), "conversation 1: message 1: role is none of"),
        (exported(GOOD | {"content": 5}), "content is not a text"),
        (exported(GOOD | {"parent": "m2"}), "message m1 has no parent before it"),
        (exported(GOOD, GOOD), "two messages have one id"),
        (exported(GOOD | {"id": "<img>"}), "id is not an identifier"),
        (exported(GOOD | {"toolCalls": [{"id": "a"}]}), "call name is not a text"),
        (exported(title=None), "title is not a text"),
    ],
)
def test_broken_files_are_named_with_what_is_wrong(chat, tmp_path, text, said):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text(text)
    good.write_text(exported(GOOD | {"extra": "<script>", "chosen": "nowhere"}))
    chat.page.set_input_files("#import-files", [bad, good])
    problem = chat.page.locator("#import-problems li")
    problem.wait_for()
    assert problem.count() == 1
    assert problem.inner_text().startswith("bad.json: ")
    assert said in problem.inner_text()
    assert titles(chat) == ["t"]  # the good one came in


def test_another_tab_sees_what_was_said(chat):
    chat.ask("from one tab")
    other = chat.page.context.new_page()
    other.goto(chat.page.url)
    other.get_by_text("You said: from one tab").wait_for()
    chat.ask("and more")
    other.get_by_text("You said: and more").wait_for()
