"""Answers in the page: streaming, thinking, tools, stop, regenerate, branches, continue, failures."""

# ruff: noqa: E501 -- lines of HTML and script stay whole

import re
import time

import pytest


def test_an_answer_streams_in_and_its_numbers_stand_below(chat):
    chat.send("slow")
    chat.prose.get_by_text("one two three").wait_for()
    early = chat.prose.inner_text()
    assert chat.answer.get_attribute("aria-busy") == "true"
    assert chat.page.locator("#live").inner_text() == "Answer started"
    chat.finished()
    assert len(chat.prose.inner_text()) > len(early)
    assert "accept length 2.61" in chat.answer.inner_text()
    assert "123.4 tokens/s" in chat.answer.inner_text()
    assert chat.answer.get_attribute("aria-busy") == "false"
    assert chat.page.locator("#live").inner_text() == "Answer finished"
    gauge = chat.page.locator("#gauge")
    assert re.search(r"\d+ of 4096 tokens", gauge.inner_text())
    assert gauge.locator("meter").evaluate("m => m.max") == 4096


def test_only_the_last_block_is_drawn_again(chat):
    chat.send("long")
    chat.prose.locator("p").nth(5).wait_for()
    chat.page.evaluate("window.kept = document.querySelector('.assistant > .prose p')")
    chat.finished()
    assert chat.page.evaluate("window.kept === document.querySelector('.assistant > .prose p')")
    assert chat.prose.locator("p").count() == 200


def test_the_streamed_answer_equals_the_one_drawn_at_once(chat):
    text = (
        "# T\n\n1. a\n\n   more\n2. b\n\n> q\n> r\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n$$\nx\n\ny\n$$\n\n```py\nx = 1\n\n\ny = 2\n```\n"
        "see [it][1] and $z$\n\n[1]: https://example.org/x\n\n- [x] done\n\nend"
    )
    chat.ask("markdown " + text)
    streamed = chat.prose.inner_html()
    chat.reload()
    chat.answer.wait_for()
    assert chat.prose.inner_html() == streamed
    assert chat.prose.locator("a").get_attribute("href") == "https://example.org/x"


def test_thinking_is_folded_with_its_time_and_goes_back_to_the_server(chat):
    chat.page.click("#thinking")
    chat.ask("think now")
    assert chat.requests[0]["chat_template_kwargs"] == {"enable_thinking": True}
    summary = chat.answer.locator("summary")
    assert re.fullmatch(r"Thought for \d\.\d s", summary.inner_text())
    assert not chat.answer.get_by_text("First I look").is_visible()
    summary.click()
    chat.answer.get_by_text("First I look at the question.").wait_for()
    assert chat.prose.locator("strong").inner_text() == "42"
    chat.ask("again")
    assert chat.requests[1]["messages"][1] == {
        "role": "assistant", "content": "The answer is **42**.",
        "reasoning_content": "First I look at the question. Then I answer it.",
    }


def test_stop_keeps_what_was_said_and_continue_goes_on(chat):
    chat.send("slow")
    chat.prose.get_by_text("one two").wait_for()
    chat.page.keyboard.press("Escape")
    chat.finished(2000)
    said = chat.prose.inner_text()
    assert "Stopped." in chat.answer.inner_text()
    assert len(said) < 300
    chat.button("Continue").click()
    chat.prose.get_by_text("and the rest of it.").wait_for()
    assert chat.prose.inner_text().startswith(said.rstrip())
    last = chat.requests[-1]
    assert last["continue_final_message"] is True
    assert last["add_generation_prompt"] is False
    assert last["messages"][-1]["role"] == "assistant"


def test_an_answer_at_its_limit_can_be_continued(chat):
    chat.ask("limit")
    assert "limit of tokens" in chat.answer.inner_text()
    chat.button("Continue").click()
    chat.prose.get_by_text("This was cut and the rest of it.").wait_for()
    chat.finished()
    assert chat.answer.locator(".notice").is_hidden()


def test_regenerate_and_edit_make_branches_that_one_can_leaf_through(chat):
    chat.ask("first question")
    chat.button("Regenerate").click()
    chat.answer.get_by_text("2/2").wait_for()
    chat.button("Previous version").click()
    chat.answer.get_by_text("1/2").wait_for()

    user = chat.page.locator(".message.user").first
    user.get_by_role("button", name="Edit").click()
    user.get_by_role("textbox").fill("second question")
    user.get_by_role("button", name="Send").click()
    chat.prose.get_by_text("You said: second question").wait_for()
    chat.finished()
    assert chat.page.locator(".bubble").first.inner_text() == "second question"
    chat.page.locator(".message.user").first.get_by_role("button", name="Previous version").click()
    chat.prose.get_by_text("You said: first question").wait_for()
    assert "1/2" in chat.answer.inner_text()
    chat.reload()
    chat.prose.get_by_text("You said: first question").wait_for()


def test_copy(chat):
    chat.ask("markdown a **bold** word\n\n```python\nprint(1)\n```")
    chat.button("Copy").click()
    assert chat.page.evaluate("navigator.clipboard.readText()").startswith("a **bold** word")
    chat.button("Copy code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "print(1)"


def test_scrolling_up_frees_the_view_and_a_button_leads_back(chat):
    chat.send("long")
    chat.prose.locator("p").nth(40).wait_for()
    at = "(e => e.scrollHeight - e.scrollTop - e.clientHeight)(document.querySelector('#scroller'))"
    assert chat.page.evaluate(at) < 60
    chat.page.mouse.move(640, 400)
    chat.page.mouse.wheel(0, -300)
    chat.page.locator("#to-end").wait_for()
    top = chat.page.evaluate("document.querySelector('#scroller').scrollTop")
    time.sleep(0.5)
    assert abs(chat.page.evaluate("document.querySelector('#scroller').scrollTop") - top) < 320
    assert chat.page.evaluate(at) > 200
    chat.page.click("#to-end")
    chat.page.locator("#to-end").wait_for(state="hidden")
    chat.finished()
    assert chat.page.evaluate(at) < 60


def test_tools_of_the_browser_run_and_the_answer_goes_on(chat):
    chat.set(tool_calculator=True, tool_clock=True)
    chat.ask("calculate (3 + 4) * 2 ^ 3")
    names = [tool["function"]["name"] for tool in chat.requests[0]["tools"]]
    assert names == ["calculator", "current_date_and_time"]
    cards = chat.page.locator(".call")
    assert cards.count() == 2
    assert '"expression": "(3 + 4) * 2 ^ 3"' in cards.first.inner_text()
    assert "56" in cards.first.inner_text()
    assert re.search("The tool said: 56; .*20\\d\\d", chat.prose.inner_text())
    assert [m["role"] for m in chat.requests[1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert chat.requests[1]["messages"][2]["tool_call_id"] == "call_a"


def test_a_tool_that_does_not_run_here_is_answered_by_hand(chat):
    chat.set(ownTools='[{"name": "weather", "parameters": {"type": "object", "properties": {}}}]')
    chat.ask("weather")
    assert chat.requests[0]["tools"][0]["function"]["name"] == "weather"
    chat.answer.get_by_label("Result of weather").fill("sunny")
    chat.answer.get_by_role("button", name="Give result").click()
    chat.prose.get_by_text("The tool said: sunny").wait_for()


def test_a_call_left_open_is_closed_for_the_server(chat):
    chat.ask("weather")
    chat.ask("never mind")
    assert [m["role"] for m in chat.requests[-1]["messages"]] == ["user", "assistant", "tool", "user"]


def test_rounds_of_tools_end(chat):
    chat.set(tool_calculator=True)
    chat.ask("forever")
    assert "Stopped after 8 rounds" in chat.answer.inner_text()
    assert len(chat.requests) == 9


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("broken", "The server failed: the engine stopped"), ("cut", "The connection"), ("refused", "temperature: must be at most 2"),
     ("locked", "no such API key")],
)
def test_failures_say_what_happened_and_offer_a_retry(chat, prompt, said):
    answer = chat.ask(prompt)
    assert said in answer.locator(".notice").inner_text()
    assert chat.button("Retry").is_enabled()
    if prompt in ("broken", "cut"):
        assert "Half an answer" in chat.prose.inner_text()
        chat.reload()
        chat.prose.get_by_text("Half an answer").wait_for()
        chat.button("Continue").click()
        chat.prose.get_by_text("Half an answer and the rest of it.").wait_for()


def test_a_busy_server_is_waited_for(chat):
    chat.ask("busy")
    assert "The server is busy: the queue is full" in chat.answer.inner_text()
    waiting = chat.answer.get_by_role("button", name=re.compile(r"Retry in \d s"))
    assert waiting.is_disabled()
    chat.button("Retry").click()
    chat.prose.get_by_text("You said: busy").wait_for()
    assert chat.page.locator(".message.assistant").count() == 1
    assert chat.answer.locator(".branches").count() == 0  # the refusal left no branch


def test_a_server_that_is_gone_is_named_and_a_key_goes_with_each_request(chat, url):
    chat.set(baseUrl="http://127.0.0.1:9")
    chat.page.locator("#server-problem").get_by_text("No server answers at 127.0.0.1:9").wait_for()
    assert "No server answers" in chat.ask("hello").inner_text()
    chat.set(baseUrl=url, apiKey="right")
    chat.page.locator("#server-problem").wait_for(state="hidden")
    assert "You said: locked" in chat.ask("locked please").inner_text()


def test_sampling_settings_and_system_prompt_are_sent(chat):
    chat.set(temperature="0.3", top_p="0.9", max_tokens="77", seed="5", system="Be brief.", thinking="unsaid")
    chat.page.select_option("#model", "other")
    chat.reload()
    chat.ask("hello")
    sent = chat.requests[0]
    expected = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 77, "seed": 5, "model": "other"}
    assert {key: sent[key] for key in expected} == expected
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "chat_template_kwargs" not in sent
    assert chat.page.locator("#gauge").is_hidden()  # this model tells no context length


def test_an_answer_goes_on_while_another_conversation_is_open(chat):
    chat.send("slow")
    chat.prose.get_by_text("one two").wait_for()
    chat.page.click("#new")
    assert "You said: other" in chat.ask("other").inner_text()
    chat.page.locator("#conversations .title", has_text="slow").click()
    chat.prose.get_by_text("one two").wait_for()
    chat.finished()
    assert chat.prose.inner_text().count("ten") == 10
